"""Who is still there: the processes that asked for something, by workload, until the last of them has gone.

Owns a pidfd of its own for each such process, since a process may close its connection and go on using what it got.
When the last one of a workload has ended and no other came within `linger_s`, `on_gone` is told the workload's name.
Invariants: at most `most` processes are followed; a workload of which one could not be followed is never reported gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tokenward.attest.peer import Peer

_MOST: Final = 1024


@dataclass(slots=True)
class _Crowd:
    """The processes of one workload."""

    pidfds: dict[int, int] = field(default_factory=dict)
    """pidfd by pid; processes of other pid namespaces have no pid here, and stand under minus their pidfd."""
    untold: bool = False
    """True when there was one that could not be followed."""
    leaving: asyncio.TimerHandle | None = None


class Presence:
    """Follows processes. Everything runs in the event loop's thread."""

    def __init__(self, *, linger_s: float, on_gone: Callable[[str], None], most: int = _MOST) -> None:
        self.linger_s = linger_s
        self._on_gone = on_gone
        self._most = most
        self._crowds: dict[str, _Crowd] = {}
        self.count = 0
        """How many processes are followed."""

    def note(self, workload: str, peer: Peer) -> None:
        """The process of `peer` asks for something as `workload`."""
        crowd = self._crowds.get(workload)
        if crowd is None:
            crowd = self._crowds[workload] = _Crowd()
        if peer.pid in crowd.pidfds:  # it was there all the time, or its pid would not be followed any more
            return
        if crowd.leaving is not None:
            crowd.leaving.cancel()
            crowd.leaving = None
        if self.count >= self._most or peer.pidfd < 0:
            crowd.untold = True
            return
        try:
            pidfd = os.dup(peer.pidfd)
        except OSError:
            crowd.untold = True
            return
        name = peer.pid or -pidfd
        crowd.pidfds[name] = pidfd
        self.count += 1
        asyncio.get_running_loop().add_reader(pidfd, self._exited, workload, name)

    def close(self) -> None:
        """Follows nobody any more."""
        for crowd in self._crowds.values():
            if crowd.leaving is not None:
                crowd.leaving.cancel()
            for pidfd in crowd.pidfds.values():
                asyncio.get_running_loop().remove_reader(pidfd)
                os.close(pidfd)
        self._crowds.clear()
        self.count = 0

    def _exited(self, workload: str, name: int) -> None:
        crowd = self._crowds[workload]
        pidfd = crowd.pidfds.pop(name)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        self.count -= 1
        if not crowd.pidfds and not crowd.untold:
            crowd.leaving = asyncio.get_running_loop().call_later(self.linger_s, self._left, workload)

    def _left(self, workload: str) -> None:
        del self._crowds[workload]
        self._on_gone(workload)
