"""The revoker: ends leases at the vault, and does not let go of one before it is over.

Owns what is still to be revoked. A lease is done with when the vault said that it is gone, when the vault refused for
good, or when it ended by its own TTL. Until then it is tried again with back-off, and `pending` names it for whoever
comes after this process.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable

from tokenward.auditlog import AuditLog
from tokenward.clock import Clock
from tokenward.core.audit import Record
from tokenward.core.model import Issued, Key
from tokenward.core.schedule import backoff_s
from tokenward.errors import Reason, TokenwardError

_log = logging.getLogger(__name__)

Revoke = Callable[[Issued], Awaitable[None]]
"""Ends what was made at the vault for a value. Raises a TokenwardError when it may still be there."""


class Revoker:
    """Revokes what it is given, in the background. `draw` gives random fractions in [0, 1) for the back-off."""

    def __init__(
        self, *, revoke: Revoke, audit: AuditLog, clock: Clock, draw: Callable[[], float] = random.random
    ) -> None:
        self._revoke = revoke
        self._audit = audit
        self._clock = clock
        self._draw = draw
        self._tasks: dict[asyncio.Task[None], tuple[Key, Issued]] = {}

    @property
    def pending(self) -> tuple[tuple[Key, Issued], ...]:
        """What is not over yet."""
        return tuple(self._tasks.values())

    def end(self, key: Key, ended: Iterable[Issued], *, why: str = "") -> None:
        """Begins to revoke the leases of `ended`; what has none needs nothing. `why` goes into the record."""
        for issued in ended:
            if issued.lease is not None:
                task = asyncio.get_running_loop().create_task(self._end(key, issued, why), name=f"revoke {key}")
                self._tasks[task] = (key, issued)
                task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def settled(self) -> None:
        """Waits until nothing is pending any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def stop(self) -> tuple[tuple[Key, Issued], ...]:
        """Tries no more; returns what is left."""
        left = self.pending
        for task in self._tasks:
            task.cancel()
        self._tasks = {}
        return left

    async def _end(self, key: Key, issued: Issued, why: str) -> None:
        failures = 0
        outcome: str
        while True:  # once at least: by the vault's clock it may live on when it has ended by ours
            try:
                await self._revoke(issued)
            except TokenwardError as error:
                outcome = error.reason
                if not error.retryable:
                    break
                if not issued.is_live(self._clock.now()):
                    outcome = Reason.EXPIRED
                    break
                failures += 1
                if failures == 1:
                    _log.warning("a lease of %s could not be revoked yet, and is tried again: %s", key, error)
                await asyncio.sleep(max(backoff_s(failures, draw=self._draw()), error.retry_after_s or 0.0))
            else:
                outcome = "ok"
                break
        accessor = issued.lease.token.accessor if issued.lease is not None else ""
        try:
            self._audit.append(
                Record(
                    event="revoke",
                    outcome=outcome,
                    workload=key.workload,
                    credential=key.credential,
                    audience=key.audience,
                    accessor=accessor,
                    detail=why,
                )
            )
        except TokenwardError as error:
            _log.error("the end of a lease of %s is not in the audit log: %s", key, error)
