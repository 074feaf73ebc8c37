"""The caller of one connection: proved once, looked at again on every request.

Owns how long a proof counts. Leaves the facts to `attestor` and the decision to `core.policy`. The invariant: whoever
is answered runs, at the moment of the answer, the executable that was attested less than `reattest_s` ago for the
workloads that are configured now; and one connection never becomes another workload.

    no proof, or too old, or other workloads configured    attest anew
    another executable than the one attested                attest anew
    the same workload as before                             go on
    another workload, or none                               IDENTITY_CHANGED

An attestation reads files and asks the user database, in threads: `Turns` bounds how many do at a time, so that a user
whose callers flood, or whose executables are slow to read, keeps to its half and its turn.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tokenward.attest import procfs
from tokenward.attest.attestor import Attestor
from tokenward.attest.peer import Peer, gone
from tokenward.attest.procfs import Executable
from tokenward.core.identity import Selector
from tokenward.core.model import Attestation, Workload
from tokenward.core.policy import Ambiguous, CouldNotTell, Matched, Unmatched, decide
from tokenward.errors import AttestationError, DeniedError, RateLimitedError, Reason, TokenwardError

_TRIES = 3
_MAX_SHOWN = 20
_MAX_SHOWN_CHARS = 1000
_TURN_S = 5.0
"""How long an attestation waits for its turn."""


@dataclass(frozen=True, slots=True)
class Attested:
    """Who is calling, and what proves it."""

    workload: Workload
    attestation: Attestation


@dataclass(frozen=True, slots=True)
class _Proof:
    attested: Attested
    executable: Executable | None
    generation: int
    begun_mono: float


class Turns:
    """At most `most` attestations at a time, at most half of them for one uid, and of those that wait each uid's in
    turn: first come, first served holds within a uid only."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._most_of_one = max(1, most // 2)
        self._taken: Counter[int] = Counter()
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}
        """By uid, the one whose turn is next first."""

    @asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """One attestation of `uid`. Raises RateLimitedError when its turn does not come in time."""
        await self._begin(uid)
        try:
            yield
        finally:
            self._end(uid)

    async def _begin(self, uid: int) -> None:
        if uid not in self._waiting and self._may(uid):
            self._taken[uid] += 1
            return
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(called)
        try:
            async with asyncio.timeout(_TURN_S):
                await called
        except TimeoutError:
            self._withdraw(uid, called)
            text = "too many processes are being attested; come back after the delay"
            raise RateLimitedError(text, retry_after_s=1) from None
        except BaseException:
            self._withdraw(uid, called)
            raise

    def _withdraw(self, uid: int, called: asyncio.Future[None]) -> None:
        if called.done() and not called.cancelled():  # its turn came at this very moment
            self._end(uid)
        elif called in (waiting := self._waiting.get(uid, deque())):
            waiting.remove(called)
            if not waiting:
                del self._waiting[uid]

    def _end(self, uid: int) -> None:
        self._taken[uid] -= 1
        if not self._taken[uid]:
            del self._taken[uid]
        for candidate in list(self._waiting):
            if self._may(candidate) and self._call(candidate):
                return

    def _call(self, uid: int) -> bool:
        """Whether there was one of `uid` to call; who was cancelled a moment ago is in the queue still."""
        waiting = self._waiting.pop(uid)
        while waiting:
            called = waiting.popleft()
            if called.done():
                continue
            if waiting:
                self._waiting[uid] = waiting  # behind the other uids
            self._taken[uid] += 1
            called.set_result(None)
            return True
        return False

    def _may(self, uid: int) -> bool:
        return self._taken.total() < self._most and self._taken[uid] < self._most_of_one


class Caller:
    """One connection's caller. `peer` stays the front door's to close."""

    __slots__ = ("_attestor", "_first", "_flight", "_proof", "_turns", "peer")

    def __init__(self, *, peer: Peer, attestor: Attestor, turns: Turns | None = None) -> None:
        """`turns` is shared by all callers; without it this one waits for nobody."""
        self.peer = peer
        self._attestor = attestor
        self._turns = turns or Turns(most=2)
        self._proof: _Proof | None = None
        self._flight: asyncio.Task[_Proof] | None = None
        self._first: Workload | None = None
        """The workload that this connection was first proved to be."""

    async def identify(self, now_mono: float) -> Attested:
        """Who is calling as of now, on the clock of `now_mono` in seconds. Does not wait while the last proof counts.

        Requests at the same time share one attestation, and one that is cancelled does not disturb the others.

        Raises:
            DeniedError: NO_MATCHING_WORKLOAD, AMBIGUOUS_WORKLOAD, IDENTITY_CHANGED or PEER_GONE.
            AttestationError: something that a workload needs could not be read.
            RateLimitedError: others are being attested.
        """
        for _ in range(_TRIES):
            if (attested := self._still_proved(now_mono)) is not None:
                return attested
            if self._flight is None:
                self._flight = asyncio.create_task(self._prove(now_mono))
                self._flight.add_done_callback(self._landed)
            flight = self._flight
            await asyncio.wait({flight})  # unlike `await flight`, leaves it running when we are cancelled
            flight.result()  # and then looked at again: the process may have gone on meanwhile
        raise AttestationError(
            Reason.ATTESTATION_INCOMPLETE, "the calling process or the configuration keeps changing; try again"
        )

    def _still_proved(self, now_mono: float) -> Attested | None:
        proof, peer = self._proof, self.peer
        executable = procfs.executable(peer.pid) if peer.pid and proof is not None else None
        if not peer.is_alive():  # asked last: until here the pid belonged to the process that connected
            raise gone()
        if (
            proof is not None
            and proof.executable == executable
            and proof.generation == self._attestor.generation
            and now_mono - proof.begun_mono < self._attestor.reattest_s
        ):
            return proof.attested
        return None

    async def _prove(self, now_mono: float) -> _Proof:
        async with self._turns.turn(self.peer.uid):
            examined = await self._attestor.examine(self.peer)
        workload = _matched(examined.workloads, examined.attestation, self._first)
        return _Proof(Attested(workload, examined.attestation), examined.executable, examined.generation, now_mono)

    def _landed(self, flight: asyncio.Task[_Proof]) -> None:
        """Runs before whoever waits for the flight goes on."""
        self._flight = None
        self._proof = None
        if not flight.cancelled() and flight.exception() is None:
            self._proof = flight.result()
            self._first = self._proof.attested.workload


def _matched(workloads: Iterable[Workload], seen: Attestation, before: Workload | None) -> Workload:
    """The one workload that `seen` proves, the same as `before`. Raises as `identify`."""
    match decide(workloads, seen):
        case Matched(workload):
            if before is not None and workload.spiffe_id != before.spiffe_id:
                raise _changed(before, f"workload {workload.name}")
            return workload
        case Unmatched():
            raise _unmatched(seen) if before is None else _changed(before, "no configured workload")
        case Ambiguous(names):
            raise DeniedError(
                Reason.AMBIGUOUS_WORKLOAD,
                f"workloads {' and '.join(names)} both match this process; "
                "add selectors to the agent's configuration until one does",
            )
        case CouldNotTell(unreadable):
            causes = "; ".join(f"{kind}: {cause}" for kind, cause in sorted(unreadable.items()))
            raise AttestationError(
                Reason.ATTESTATION_INCOMPLETE, _cut(f"selectors that could not be read: {_printable(causes)}")
            )


def _changed(before: Workload, now: str) -> TokenwardError:
    return DeniedError(
        Reason.IDENTITY_CHANGED,
        f"this connection was made by workload {before.name} and its process is {now} now; connect again",
    )


def _unmatched(seen: Attestation) -> TokenwardError:
    """Shows the caller's own facts, so that an operator can write the workload's selectors from them."""
    process = seen.process
    hint = ""
    told = process.path and "unix:path" not in seen.unreadable
    if told and Selector("unix:path", process.path) not in seen.selectors:
        hint = (
            f"; its executable {_printable(process.path)} was replaced, or is another file where the agent runs: "
            "restart the process, or use unix:sha256 or the unit or container instead"
        )
    return DeniedError(
        Reason.NO_MATCHING_WORKLOAD,
        _cut(f"no configured workload has selectors that all hold for this process{hint}; it has {_listed(seen)}"),
    )


def _listed(seen: Attestation) -> str:
    shown = [_printable(str(selector)) for selector in sorted(seen.selectors)]
    more = f" and {len(shown) - _MAX_SHOWN} more" if len(shown) > _MAX_SHOWN else ""
    return ", ".join(shown[:_MAX_SHOWN]) + more


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _cut(text: str) -> str:
    """Short enough for the trailers of a gRPC reply."""
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + " ..."
