"""`Callers`: threads that ask for credentials in loops, as applications do, and judge every answer.

Half of them ask the agent each time, the other half read a handle that the client keeps current. An answer is judged by
what this caller knows: a value that had ended before it was asked for is a failure (`expired`), and an error while the
last value that this caller saw has not ended is one (`refused`). Other errors are counted by reason.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from tokenward.client import Client, Credential
from tokenward.errors import TokenwardError

_NO_SECRETS = frozenset({"username", "accessor"})
_CLIENTS = 2
_Get = Callable[[str], Credential]


class Phase(StrEnum):
    """Where in the measurement an answer belongs."""

    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


@dataclass(slots=True)
class Tally:
    """What all callers met."""

    oks: int = 0
    stale: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """By reason, when there was nothing valid to be served."""
    refused: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set, repr=False)
    waits_s: dict[Phase, list[float]] = field(default_factory=lambda: {phase: [] for phase in Phase})
    """How long each answer of the agent took that was a value."""

    def latency_ms(self, phase: Phase, share: float = 0.95) -> float:
        """The wait that `share` of the agent's answers stayed within; 0 where there were none."""
        waits = sorted(self.waits_s[phase])
        return waits[int(len(waits) * share)] * 1000 if waits else 0.0


class Callers:
    """`count` threads that each go through `names`, one answer every `pace_s` seconds, while the block runs."""

    def __init__(self, socket: str, names: Sequence[str], *, count: int = 8, pace_s: float = 0.05) -> None:
        self.phase = Phase.BEFORE
        self.tally = Tally()
        self._socket = socket
        self._names = tuple(names)
        self._count = count
        self._pace_s = pace_s
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ends: dict[str, float] = {}
        """The latest end that anybody saw, by name."""
        self._threads: list[threading.Thread] = []
        self._clients = ExitStack()

    def __enter__(self) -> Self:
        clients = [self._clients.enter_context(Client(self._socket)) for _ in range(_CLIENTS)]
        for number in range(self._count):
            target, client = (self._ask if number % 2 else self._read), clients[number // 2 % _CLIENTS]
            thread = threading.Thread(target=target, args=(client, number), name=f"caller {number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends them. A second call does nothing."""
        self._over.set()
        for thread in self._threads:
            thread.join(10)
        self._clients.close()

    def go_on(self, seconds: float) -> None:
        """Lets them for so long."""
        self._over.wait(seconds)

    def wait_until_warm(self, within_s: float = 20.0) -> None:
        """Returns when every credential was there for somebody."""
        give_up = time.monotonic() + within_s
        while len(self._ends) < len(self._names):
            assert time.monotonic() < give_up, f"never there: {set(self._names) - set(self._ends)}: {self.tally.errors}"
            self._over.wait(0.02)

    def time_to_fresh(self, *, within_s: float) -> tuple[float | None, float | None]:
        """Seconds from now until somebody has a value that ends later than all now known, and until that holds of
        every credential; None when that took too long."""
        began = time.monotonic()
        known, first = dict(self._ends), None
        while time.monotonic() < began + within_s:
            fresh = [name for name, end in self._ends.items() if end > known[name]]
            passed = time.monotonic() - began
            first = passed if fresh and first is None else first
            if len(fresh) == len(known):
                return first, passed
            self._over.wait(0.01)
        return first, None

    # -- on a caller's thread -----------------------------------------------------------------------------------------

    def _ask(self, client: Client, number: int) -> None:
        self._loop(number, client.get, timed=True)

    def _read(self, client: Client, number: int) -> None:
        handles = {name: client.credential(name) for name in self._names}
        self._loop(number, lambda name: handles[name].credential, timed=False)

    def _loop(self, number: int, get: _Get, *, timed: bool) -> None:
        seen: dict[str, float] = {}
        turn = number
        while not self._over.wait(self._pace_s):
            name = self._names[turn % len(self._names)]
            turn += 1
            phase, asked, asked_mono = self.phase, time.time(), time.monotonic()
            try:
                credential = get(name)
            except TokenwardError as error:
                self._note_error(name, error, seen.get(name, 0.0))
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is the test's finding
                self.tally.crashes.append(repr(error))
            else:
                wait_s = time.monotonic() - asked_mono if timed and seen.get(name, 0.0) > asked else None
                seen[name] = self._note(name, credential, asked, phase, wait_s)

    def _note(self, name: str, credential: Credential, asked: float, phase: Phase, wait_s: float | None) -> float:
        assert credential.expires_at is not None
        end = credential.expires_at.timestamp()
        with self._lock:
            self.tally.oks += 1
            self.tally.stale += credential.stale
            self.tally.secrets.update(text for key, text in credential.values.items() if key not in _NO_SECRETS)
            self._ends[name] = max(end, self._ends.get(name, 0.0))
            if wait_s is not None:
                self.tally.waits_s[phase].append(wait_s)
            if end <= asked:
                self.tally.expired.append(f"{name} {asked - end:.2f} s after its end")
        return end

    def _note_error(self, name: str, error: TokenwardError, end: float) -> None:
        left_s = end - time.time()
        if self._over.is_set():
            return
        with self._lock:
            if left_s > 0:
                self.tally.refused.append(f"{name} {left_s:.2f} s before its end: {error.reason}")
            else:
                self.tally.errors[error.reason] += 1
