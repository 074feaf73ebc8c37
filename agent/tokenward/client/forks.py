"""What happens to the clients of a process when it forks, as prefork servers do.

gRPC's core keeps threads and locks that a forked child inherits broken: with a live channel in the parent a few
children in a hundred crash or hang, whether or not `GRPC_ENABLE_FORK_SUPPORT` is set. What holds is a core that is not
running: so before a fork every channel of ours is closed, and when ours were the only ones the core stops within some
20 ms; after it, parent and child open a new channel at their next use. The child never has its parent's connection,
which the agent would take for the parent.

Owns the hooks and the gate that keeps everybody else from starting a call meanwhile. Leaves to each participant what it
puts away and takes up again. Invariant: between the hooks, none of our channels exists.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol
from weakref import WeakSet

_CORE_STOPS_WITHIN_S = 0.25
_CORE_THREADS = ("event_engine", "grpc_", "lifeguard", "timer_manager")

# Reentrant: a finalizer may run at any allocation, in a thread that is already inside.
_gate = threading.RLock()


class Participant(Protocol):
    """Somebody who has to put something away before a fork."""

    def before_fork(self) -> None:
        """In the forking thread, with the gate held: lets go of every object of gRPC."""

    def after_fork_in_child(self) -> None:
        """In the child, where no other thread exists: forgets threads, and replaces locks that one of them may hold."""


_participants: WeakSet[Participant] = WeakSet()
_hooks: list[str] = []


def gate() -> threading.RLock:
    """What must be held while a call is started; held by the forking thread while the process forks."""
    return _gate


def take_part(participant: Participant) -> None:
    """Has `participant` told about forks for as long as it lives.

    Call it with the gate held, once gRPC is in use: gRPC's own hooks, where the application turned them on, are then
    there already, and before a fork ours come first.
    """
    _participants.add(participant)
    if not _hooks:
        _hooks.append("registered")
        os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


def _before() -> None:
    _gate.acquire()
    if not _participants:
        return
    for participant in list(_participants):
        participant.before_fork()
    give_up_mono = time.monotonic() + _CORE_STOPS_WITHIN_S
    while _core_runs() and time.monotonic() < give_up_mono:
        time.sleep(0.002)


def _after_in_parent() -> None:
    _gate.release()


def _after_in_child() -> None:
    global _gate  # noqa: PLW0603 -- threads that wait for the parent's lock do not exist here, their traces in it do
    _gate = threading.RLock()
    for participant in list(_participants):
        participant.after_fork_in_child()


def _core_runs() -> bool:
    """Whether gRPC's core has threads, by their names: it has no question for that in Python."""
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm", encoding="ascii", errors="replace") as file:
                if file.read().startswith(_CORE_THREADS):
                    return True
        except OSError:
            continue  # the thread has just ended
    return False
