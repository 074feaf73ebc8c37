"""Hashes of executables, each computed once and off the event loop.

Owns the cache and who computes; leaves the reading to `procfs`. The invariant: a hash is kept under the exact state of
the file that was read, so a file that was changed or replaced is always read again.
"""

from __future__ import annotations

import asyncio

from tokenward.attest import procfs
from tokenward.attest.procfs import Executable

_MAX_KNOWN = 1024
_MAX_AT_ONCE = 2
"""Threads that may be busy hashing, so that large executables do not hold up other attestations."""


class Digests:
    """SHA-256 of executables, in hex."""

    def __init__(self) -> None:
        self._known: dict[Executable, str] = {}
        self._flights: dict[tuple[int, Executable], asyncio.Task[str]] = {}
        self._turns = asyncio.Semaphore(_MAX_AT_ONCE)

    async def of(self, pid: int, executable: Executable) -> str:
        """The hash of `executable`, which `pid` runs. Whoever asks for the same process meanwhile shares the reading.

        Raises:
            AttestationError: it could not be read, or `pid` runs another one by now.
        """
        if (known := self._known.get(executable)) is not None:
            return known
        key = (pid, executable)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._compute(pid, executable))
            flight.add_done_callback(lambda flight: self._landed(key, flight))
        await asyncio.wait({flight})  # unlike `await flight`, leaves it running when we are cancelled
        return flight.result()

    async def _compute(self, pid: int, executable: Executable) -> str:
        async with self._turns:
            if (known := self._known.get(executable)) is not None:  # another process of it had its turn
                return known
            digest = await asyncio.to_thread(procfs.sha256, pid, executable)
        if len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[executable] = digest
        return digest

    def _landed(self, key: tuple[int, Executable], flight: asyncio.Task[str]) -> None:
        del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # seen, even when whoever asked has left
