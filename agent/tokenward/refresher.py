"""The refresher: sleeps until the store says that something is due, hands it to the broker, touches nothing else.

Refreshes keep to a budget of vault calls per second, the most urgent first, so that what has gathered during an outage
is no storm when the vault is back. Callers who wait for a value, and revocations, are not held up: they only leave less
for refreshes. Nor is a value that is about to end: to be ahead of expiry comes before the budget.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import assert_never

from tokenward.broker import Broker
from tokenward.clock import Clock
from tokenward.core.pace import Pace
from tokenward.core.store import Lapse, Refresh, Retire, Store
from tokenward.watchers import Watchers

_log = logging.getLogger(__name__)

_LONGEST_SLEEP_S = 30.0
_SAY_AGAIN_S = 60.0


class Refresher:
    """Keeps every credential in use ahead of its expiry, and lets go of the others."""

    def __init__(
        self,
        *,
        store: Store,
        broker: Broker,
        watchers: Watchers,
        clock: Clock,
        rate: float = 10.0,
        calls: Callable[[], int] = lambda: 0,
    ) -> None:
        """`rate` is the budget in vault calls per second, `calls` counts those that were made, by whomever."""
        self._store = store
        self._broker = broker
        self._watchers = watchers
        self._clock = clock
        self._pace = Pace(rate)
        self._calls = calls
        self._held_back = 0
        self._said_mono = float("-inf")

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._broker.changed.clear()
            self.step()
            await self._sleep()

    def step(self) -> None:
        """Does what is due now, as far as the budget goes."""
        now = self._clock.now()
        room = self._pace.room(now.mono, self._calls())
        self._held_back = 0
        started = 0
        for task in self._store.due(now, self._watchers.watched):
            match task:
                case Refresh(key, urgent) if urgent or started < room:
                    started += 1
                    self._broker.renew(key)
                case Refresh():
                    self._held_back += 1
                case Retire(key):
                    self._broker.retire(key)
                case Lapse(key):
                    self._broker.lapse(key)
                case _:
                    assert_never(task)
        self._pace.start(started)

    async def _sleep(self) -> None:
        """Until the next due time, or earlier when the store changed. Never for long: the machine may be suspended."""
        if self._held_back:
            self._say(self._clock.now().mono)
            await asyncio.sleep(self._pace.wait_s())
            return
        next_mono = self._store.next_due_mono()
        left_s = _LONGEST_SLEEP_S if next_mono is None else next_mono - self._clock.now().mono
        try:
            async with asyncio.timeout(min(max(left_s, 0.0), _LONGEST_SLEEP_S)):
                await self._broker.changed.wait()
        except TimeoutError:
            pass

    @property
    def rate(self) -> float:
        """The budget, in vault calls per second."""
        return self._pace.rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._pace.rate = rate

    def _say(self, now_mono: float) -> None:
        if now_mono - self._said_mono >= _SAY_AGAIN_S:
            self._said_mono = now_mono
            _log.info("%d refreshes wait for the budget of calls (leases.refresh_rate)", self._held_back)
