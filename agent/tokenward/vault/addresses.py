"""The vault's addresses: which of them is asked, in which order, and what is said when none can answer.

Owns one `Breaker` per address, all behind one lock that is never held over I/O, and the count of requests. Leaves the
wire to `transport`, the meaning of an answer to `reply`, and threads and callers to `client`. Invariants: a request
that is not repeatable is never sent again once a vault may have done it; a warm address is asked before one that
failed; whatever a request does, it gives its admission back.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tokenward.errors import Reason, VaultBadReplyError, VaultUnavailableError
from tokenward.vault import reply as replies
from tokenward.vault.breaker import Admission, Breaker
from tokenward.vault.transport import Answer, Transport, Unusable

_GATEWAY = frozenset({502, 503, 504})
_FAIR = 0.5
"""The share of the timeout that an address must have had before its silence speaks against it."""


class State(StrEnum):
    """What an address said of itself."""

    ACTIVE = "active"
    STANDBY = "standby"
    SEALED = "sealed"
    UNINITIALIZED = "uninitialized"
    UNREACHABLE = "unreachable"


_STATES = {200: State.ACTIVE, 429: State.STANDBY, 472: State.STANDBY, 473: State.STANDBY}
_STATES |= {501: State.UNINITIALIZED, 503: State.SEALED}


@dataclass(frozen=True, slots=True)
class AddressHealth:
    """One address and its state; `why` says more where it is unreachable."""

    address: str
    state: State
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A request as it leaves: `path` is raw text without `/v1/`, `headers` say who asks."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)
    repeatable: bool


class _Verdict(StrEnum):
    """What a call that got no answer says of its address."""

    FAULT = "fault"
    SERVES_OTHERS = "serves other calls"
    NONE = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    reason: Reason
    why: str
    maybe_done: bool
    verdict: _Verdict
    retry_after_s: float | None = None


@dataclass(slots=True, eq=False)
class _Place:
    """One address; `fault` is the last thing that spoke against it."""

    number: int
    transport: Transport
    breaker: Breaker = field(default_factory=Breaker)
    fault: _Failure | None = None


class Addresses:
    """Asks the addresses in turn, beginning with the one that answered last. Safe to use from several threads.

    `now` is a monotonic clock and `draw` gives fractions in [0, 1): both are the breakers', deadlines are real.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        timeout_s: float,
        now: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        self._places = tuple(_Place(number, transport) for number, transport in enumerate(transports))
        self._timeout_s = timeout_s
        self._now = now
        self._draw = draw
        self._lock = threading.Lock()
        self._first = 0
        self._calls = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def calls(self) -> int:
        """Requests begun at any address, each attempt counted, health checks not."""
        return self._calls

    @property
    def all_serve(self) -> bool:
        """Whether nothing speaks against any address."""
        with self._lock:
            return all(place.breaker.is_closed for place in self._places)

    def verify_askable(self) -> None:
        """Raises VaultUnavailableError, at no cost, while there is no address that may be asked."""
        now_mono = self._now()
        with self._lock:
            if all(place.breaker.wait_s(now_mono) for place in self._places):
                raise self._unavailable({}, now_mono)

    def ask(self, request: Outgoing, *, deadline: float) -> Answer:
        """The first answer. Raises VaultUnavailableError when there is none until `deadline`, VaultBadReplyError."""
        failures: dict[int, _Failure] = {}
        for place in self._in_order():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            admission = self._admit(place)
            if admission is None:
                continue
            got = self._ask_one(place, admission, request, given_s=min(self._timeout_s, left_s))
            if isinstance(got, Answer):
                return got
            failures[place.number] = got
            if got.maybe_done and not request.repeatable:
                break
        with self._lock:
            raise self._unavailable(failures, self._now())

    def health_of(self, number: int) -> AddressHealth:
        """What the address says of itself, asked whatever its breaker says; one that serves is asked again from now."""
        place = self._places[number]
        address = place.transport.address
        got = place.transport.send("GET", "sys/health", query={}, headers={}, body=None, timeout_s=self._timeout_s)
        if isinstance(got, Unusable):
            return AddressHealth(address, State.UNREACHABLE, got.why)
        state = _STATES.get(got.status, State.UNREACHABLE)
        if state in {State.ACTIVE, State.STANDBY}:
            with self._lock:
                place.breaker.healthy()
        why = f"answered its health check with HTTP {got.status}" if state is State.UNREACHABLE else ""
        return AddressHealth(address, state, why)

    def close(self) -> None:
        """Closes every connection."""
        for place in self._places:
            place.transport.close()

    # -- one address ----------------------------------------------------------------------------------------------

    def _in_order(self) -> list[_Place]:
        """From the one that answered last; those whose breaker is not closed come after the others."""
        with self._lock:
            turned = self._places[self._first :] + self._places[: self._first]
            return sorted(turned, key=lambda place: not place.breaker.is_closed)

    def _admit(self, place: _Place) -> Admission | None:
        with self._lock:
            return place.breaker.admit(self._now())

    def _ask_one(self, place: _Place, admission: Admission, request: Outgoing, *, given_s: float) -> Answer | _Failure:
        try:
            got = self._send(place.transport, request, given_s=given_s)
            failure = _failure_of(got, is_fair=given_s >= self._timeout_s * _FAIR)
        except BaseException:  # a fault of ours: it is raised on, but the probe must not stay taken
            with self._lock:
                place.breaker.released(admission)
            raise
        self._judge(place, admission, failure)
        if failure is not None:
            return failure
        if isinstance(got, Unusable):
            raise VaultBadReplyError(f"the vault at {place.transport.address} {got.why}")
        return got

    def _judge(self, place: _Place, admission: Admission, failure: _Failure | None) -> None:
        now_mono, draw = self._now(), self._draw()
        with self._lock:
            # After a failure the next call begins elsewhere: this one may not come to ask the others.
            self._first = place.number if failure is None else (place.number + 1) % len(self._places)
            if failure is None or failure.verdict is _Verdict.SERVES_OTHERS:
                place.breaker.succeeded()
            elif failure.verdict is _Verdict.FAULT:
                place.fault = failure
                place.breaker.failed(admission, now_mono=now_mono, draw=draw)
            else:
                place.breaker.released(admission)

    def _send(self, transport: Transport, request: Outgoing, *, given_s: float) -> Answer | Unusable:
        """One address's answer; a read whose connection broke is sent once more, since that was an old connection."""
        send = functools.partial(
            transport.send,
            request.method,
            request.path,
            query=request.query,
            headers=request.headers,
            body=request.body,
        )
        ends = time.monotonic() + given_s
        self._count()
        got = send(timeout_s=given_s)
        left_s = ends - time.monotonic()
        if isinstance(got, Unusable) and got.broken and request.repeatable and left_s > 0:
            self._count()
            got = send(timeout_s=left_s)
        return got

    def _count(self) -> None:
        with self._lock:
            self._calls += 1

    # -- none could answer; the lock is held ----------------------------------------------------------------------

    def _unavailable(self, failures: Mapping[int, _Failure], now_mono: float) -> VaultUnavailableError:
        """One error for all addresses: the reason is the most telling one, the text has each."""
        told = dict(failures)
        for place in self._places:
            if place.number not in told and place.fault is not None and not place.breaker.is_closed:
                told[place.number] = dataclasses.replace(place.fault, why=f"{place.fault.why} (not asked again yet)")
        reasons = {failure.reason for failure in told.values()}
        telling = (Reason.VAULT_SEALED, Reason.VAULT_ERROR, Reason.VAULT_UNREACHABLE)
        reason = next((one for one in telling if one in reasons), Reason.VAULT_UNREACHABLE)
        said = "; ".join(f"{self._places[number].transport.address} {one.why}" for number, one in told.items())
        wait_s = [one.retry_after_s for one in failures.values() if one.retry_after_s]
        soonest_s = min((place.breaker.wait_s(now_mono) for place in self._places), default=0.0)
        return VaultUnavailableError(
            reason,
            f"the vault is not available: {said or 'there was no time left to ask it'}",
            retry_after_s=(wait_s[-1] if wait_s else soonest_s) or None,
        )


def _failure_of(got: Answer | Unusable, *, is_fair: bool) -> _Failure | None:
    """Why to ask the next address; None when this one has answered, be it with something that is refused."""
    if isinstance(got, Unusable):
        if got.refused:
            return None
        verdict = _Verdict.FAULT if is_fair and got.asked else _Verdict.NONE
        return _Failure(reason=Reason.VAULT_UNREACHABLE, why=got.why, maybe_done=got.sent, verdict=verdict)
    wait_s = replies.seconds_of(got.retry_after)
    known = replies.not_serving(got.status, got.body)
    if known is not None:
        verdict = _Verdict.SERVES_OTHERS if known.serves_others else _Verdict.FAULT
        return _Failure(reason=known.reason, why=known.why, maybe_done=False, verdict=verdict, retry_after_s=wait_s)
    if got.status in _GATEWAY:
        why = f"or a proxy before it answered HTTP {got.status}"
        return _Failure(
            reason=Reason.VAULT_ERROR, why=why, maybe_done=True, verdict=_Verdict.FAULT, retry_after_s=wait_s
        )
    return None
