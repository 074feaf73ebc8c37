"""Keeps the slots of one client current, by one watch stream for all of them, in one background thread.

    no names      no thread
    connecting    -> watching | waiting
    watching      each message goes to the slots; a name was added -> connecting; the stream ended -> waiting
    waiting       after back-off -> connecting

Owns the thread, the names that are watched, and reconnecting. Invariants: exactly the names in use are watched, since
the agent obtains what is watched; a value that was told stays until it expires, whatever becomes of the stream, unless
the agent refuses the caller: then it is dropped at once.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from tokenward.client.connection import ClosedError, Connection, CutOffError, Stream
from tokenward.client.credentials import Change, credential_from
from tokenward.client.errors import error_of_problem
from tokenward.client.slots import Slot
from tokenward.errors import DeniedError, Reason, TokenwardError
from tokenward.v1 import credentials_pb2 as pb

_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 5.0
_STEADY_S = 5.0
"""A stream that held this long makes the next failure count as the first."""
_LONGEST_PATIENCE_S = 60.0
_RECONSIDER_S = 5.0
_LIST_TIMEOUT_S = 5.0
_ACKNOWLEDGE_S = 5.0
_JOIN_S = 2.0


def backoff_s(attempt: int, draw: float) -> float:
    """Seconds to wait after failure number `attempt` (from 1): full jitter, `draw` in [0, 1), under a doubling cap."""
    return draw * min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 16))


def draw() -> float:
    """The jitter's fraction in [0, 1)."""
    return random.random()  # noqa: S311 -- spreads reconnects, keeps no secret


def changes_in(message: pb.WatchCredentialsResponse) -> list[Change]:
    """What a message of a watch says."""
    return [
        Change(name=state.name, credential=credential_from(state.credential))
        if state.HasField("credential")
        else Change(name=state.name, error=error_of_problem(state.problem))
        for state in message.states
    ]


def _asked_s(failure: TokenwardError | CutOffError) -> float:
    """Seconds that the agent asked to be left alone."""
    asked_s = failure.retry_after_s if isinstance(failure, TokenwardError) else None
    return min(asked_s or 0.0, _LONGEST_PATIENCE_S)


class Watcher:
    """The slots of one client. Its thread starts with the first `keep`."""

    def __init__(self, *, connection: Connection) -> None:
        self._connection = connection
        self._slots: dict[str, Slot] = {}
        self._kept: set[str] = set()
        self._refused: dict[str, float] = {}
        """Names that are not granted and so left out of the stream, and when that was found (monotonic)."""
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._stream: Stream | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def slot(self, name: str) -> Slot:
        """The slot of `name`, one for all who ask."""
        with self._lock:
            return self._slots.setdefault(name, Slot(name))

    def keep(self, slot: Slot) -> None:
        """Has `slot` kept current from now on; cheap when it is already. Raises ClosedError."""
        with self._lock:
            if self._closed:
                raise ClosedError("this tokenward client is closed; make a new one")
            slot.wake()
            refused_mono = self._refused.get(slot.name)
            reconsider = refused_mono is not None and time.monotonic() - refused_mono > _RECONSIDER_S
            if reconsider:
                del self._refused[slot.name]
            if reconsider or slot.name not in self._kept:
                self._kept.add(slot.name)
                self._reopen()
            if self._thread is None or not self._thread.is_alive():
                self._connection.open(self)
                self._thread = threading.Thread(target=self._run, name="tokenward-watch", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Has the thread end at its next step."""
        with self._lock:
            self._closed = True
            self._reopen()

    def close(self) -> None:
        """Waits for the thread's end and forgets every value. The connection must be closed by then."""
        self.stop()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)
        for slot in self._slots.values():
            slot.clear()

    def before_fork(self) -> None:
        """The stream is the connection's to put away."""

    def after_fork_in_child(self) -> None:
        """There is no thread here; the next use of a slot starts one."""
        self._thread = None
        self._stream = None
        self._lock = threading.RLock()
        self._wake = threading.Event()
        for slot in self._slots.values():
            slot.sleep()

    def _reopen(self) -> None:
        self._wake.set()
        if self._stream is not None:
            self._stream.cancel()

    def _run(self) -> None:
        attempt = 0
        with suppress(ClosedError):
            while not self._closed:
                self._wake.clear()
                names = frozenset(self._kept - self._refused.keys())
                began_mono = time.monotonic()
                failure = self._follow(names)
                if self._wake.is_set() or self._left_out(names, failure):
                    continue
                self._tell(self._consequences(names, failure))
                attempt = 1 if time.monotonic() - began_mono > _STEADY_S else attempt + 1
                self._wake.wait(max(backoff_s(attempt, draw()), _asked_s(failure)))

    def _follow(self, names: frozenset[str]) -> TokenwardError | CutOffError:
        """Watches `names` until the stream ends, and says why it did."""
        stream = self._connection.stream(sorted(names))
        with self._lock:
            self._stream = stream
            if self._wake.is_set():
                stream.cancel()
        try:
            while True:
                self._tell(changes_in(stream.read()))
        except (CutOffError, TokenwardError) as ended:
            return ended
        finally:
            self._stream = None

    def _tell(self, changes: Iterable[Change]) -> None:
        for change in changes:
            slot = self._slots.get(change.name)
            with self._lock:
                news = slot is not None and not self._closed and slot.take(change)
            if slot is not None and news:
                slot.call_back(change)
                self._acknowledge(change)

    def _acknowledge(self, change: Change) -> None:
        """Tells the agent that the value before is not used any more. Nobody waits for it: an overlap ends anyway."""
        new = change.credential
        if new is None or new.previous is None:
            return
        request = pb.AcknowledgeVersionRequest(name=new.name, version=new.version, audience=new.audience)
        with suppress(ClosedError):
            self._connection.unary(
                lambda stubs: stubs.credentials.AcknowledgeVersion, request, timeout_s=_ACKNOWLEDGE_S
            )

    def _consequences(self, names: frozenset[str], failure: TokenwardError | CutOffError) -> list[Change]:
        """What the stream's end means for `names`: a refusal drops every value, anything else leaves them be."""
        if isinstance(failure, CutOffError):
            return []
        if isinstance(failure, DeniedError):
            return [Change(name=name, error=failure) for name in names]
        return [Change(name=name, error=failure) for name in names if self._slots[name].live is None]

    def _left_out(self, names: frozenset[str], failure: TokenwardError | CutOffError) -> bool:
        """Whether the stream can go on without the names that are not granted: one wrong name must not stop all."""
        if not isinstance(failure, DeniedError) or failure.reason is not Reason.NOT_GRANTED or len(names) == 1:
            return False
        asked = self._connection.unary(
            lambda stubs: stubs.credentials.ListGrants, pb.ListGrantsRequest(), timeout_s=_LIST_TIMEOUT_S
        )
        try:
            granted = {grant.name for grant in asked.result(_LIST_TIMEOUT_S).grants}
        except (CutOffError, TokenwardError, TimeoutError):
            return False
        missing = names - granted
        if not missing or missing == names:
            return False
        self._tell(Change(name=name, error=failure) for name in missing)
        self._refused.update(dict.fromkeys(missing, time.monotonic()))
        return True
