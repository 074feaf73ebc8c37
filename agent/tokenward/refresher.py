"""The refresher: sleeps until the store says that something is due, hands it to the broker, touches nothing else."""

from __future__ import annotations

import asyncio
from typing import assert_never

from tokenward.broker import Broker
from tokenward.clock import Clock
from tokenward.core.store import Lapse, Refresh, Retire, Store
from tokenward.watchers import Watchers

_LONGEST_SLEEP_S = 30.0


class Refresher:
    """Keeps every credential in use ahead of its expiry, and lets go of the others."""

    def __init__(self, *, store: Store, broker: Broker, watchers: Watchers, clock: Clock) -> None:
        self._store = store
        self._broker = broker
        self._watchers = watchers
        self._clock = clock

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._broker.changed.clear()
            self.step()
            await self._sleep()

    def step(self) -> None:
        """Does what is due now."""
        for task in self._store.due(self._clock.now(), self._watchers.watched):
            match task:
                case Refresh(key):
                    self._broker.renew(key)
                case Retire(key):
                    self._broker.retire(key)
                case Lapse(key):
                    self._broker.lapse(key)
                case _:
                    assert_never(task)

    async def _sleep(self) -> None:
        """Until the next due time, or earlier when the store changed. Never for long: the machine may be suspended."""
        next_mono = self._store.next_due_mono()
        left_s = _LONGEST_SLEEP_S if next_mono is None else next_mono - self._clock.now().mono
        try:
            async with asyncio.timeout(min(max(left_s, 0.0), _LONGEST_SLEEP_S)):
                await self._broker.changed.wait()
        except TimeoutError:
            pass
