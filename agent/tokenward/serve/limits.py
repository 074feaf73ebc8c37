"""What callers may take of the agent at once and per second, before anybody has been attested.

Owns the numbers that the configuration leaves open (`Room`), what grpcio is told of them (`server_options`), and the
turnstile that every request passes: by uid, since nothing else is known of a caller yet and nothing is cheaper to know.
The front door has the limits of connections, `attest.caller` those of attestations.

Invariants: what passed `enter` leaves by `leave`, once; of two uids the one below its limits is never refused because
of the other, except when a limit in all is reached; a flood of refusals writes one record a second, and none is
forgotten: the next record of the same caller has their number.
"""

from __future__ import annotations

import inspect
import os
import resource
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import grpc

from tokenward.clock import Clock
from tokenward.config.sections import Limits
from tokenward.core.model import AnyGrant
from tokenward.core.rates import Rates
from tokenward.errors import RateLimitedError, TokenwardError
from tokenward.serve.front_door import DoorLimits, FrontDoor
from tokenward.serve.status import abort

_INTAKE_PER_REQUEST = 128
"""Bytes that a uid may send for each request of its rate, all of HTTP/2 included; one is 60 to 120. So some are left to
be refused, and whoever goes on regardless is read later: an answer that says no costs half of one that says yes."""
_LEAST_INTAKE = 32 << 10
"""Bytes a second: room for the beginning of a connection, and for refusals, where the rate is low."""

_MOST_PLACES = 4096  # more is a decision for an operator
_LEAST_PLACES = 32
_BYTES_PER_PLACE = 80 * 1024  # a connection with a stream and a request: docs/limits.md
_BYTES_IDLE = 64 << 20
_MAX_REMEMBERED = 1024
_CONCURRENT_PER_CONNECTION = 100  # RFC 9113, section 6.5.2: no fewer, so as not to limit parallelism needlessly
_NO_BOUND = 1 << 20
_PING_EVERY_S = 10.0
_PING_STRIKES = 3
_BURST_S = 2.0
"""How many seconds' worth of a rate may come at once: processes start together."""
_BUSY_S = 1.0
"""When to come back where a place, not a token, is missing."""
_RECORD_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many of each thing there may be, in all and of one uid: the configuration's numbers, or what fits."""

    connections: int
    connections_per_uid: int
    streams: int
    streams_per_uid: int
    requests: int
    requests_per_uid: int

    @classmethod
    def of(cls, limits: Limits, *, places: int) -> Self:
        """What `limits` says, and where it says nothing: `places` of each, half of them for one uid."""
        connections = limits.connections or places
        streams, requests = limits.streams or connections, limits.requests or connections
        return cls(
            connections=connections,
            connections_per_uid=limits.connections_per_uid or _half(connections),
            streams=streams,
            streams_per_uid=limits.streams_per_uid or _half(streams),
            requests=requests,
            requests_per_uid=limits.requests_per_uid or _half(requests),
        )


def _half(most: int) -> int:
    return max(1, most // 2)


def places(*, max_descriptors: int, max_memory_bytes: int | None) -> int:
    """How many callers fit, each with a connection, a stream and a request. Half of what is left of the memory beyond
    the idle agent is for them, the rest for what they ask for."""
    fit = DoorLimits.within(max_descriptors).max_connections
    if max_memory_bytes is not None:
        fit = min(fit, (max_memory_bytes - _BYTES_IDLE) // 2 // _BYTES_PER_PLACE)
    return max(_LEAST_PLACES, min(_MOST_PLACES, fit))


def places_here() -> int:
    """`places` for this process, by its limit of descriptors, its cgroup's limit of memory and the machine's memory."""
    return places(max_descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0], max_memory_bytes=memory_limit())


def memory_limit(*, cgroups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int | None:
    """Bytes that this process and its neighbours in the cgroup may have, or None where nobody says."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError), open(own, encoding="utf-8") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "":
                found += _limits_above(cgroups, path, "memory.max")
            elif controllers == "memory":
                found += _limits_above(f"{cgroups}/memory", path, "memory.limit_in_bytes")
    known = [one for one in found if one > 0]
    return min(known, default=None)


def _limits_above(root: str, path: str, name: str) -> Iterable[int]:
    """The limits of a cgroup and of those above it; in a container, whose root is its own cgroup, of the root alone."""
    while True:
        with suppress(OSError, ValueError), open(f"{root}{path.rstrip('/')}/{name}", encoding="ascii") as file:
            yield int(file.read())  # "max" is no number
        if path in {"/", ""}:
            return
        path = os.path.dirname(path)


def door_limits(limits: Limits, room: Room) -> DoorLimits:
    """What the front door keeps to."""
    return DoorLimits(
        max_connections=room.connections,
        max_connections_per_uid=room.connections_per_uid,
        first_bytes_s=limits.preface_s,
        max_head_bytes=limits.max_head_bytes,
        accept_rate=limits.accept_rate,
        intake_bytes_per_s=max(_LEAST_INTAKE, limits.request_rate * _INTAKE_PER_REQUEST),
        max_attestations=limits.attestations,
    )


def server_options(limits: Limits) -> list[tuple[str, Any]]:
    """What grpcio keeps to by itself. Each has its test in tests/integration/test_limits.py."""
    return [
        ("grpc.max_concurrent_streams", _CONCURRENT_PER_CONNECTION),
        # What waits to be taken up is one queue for all callers, from which grpcio would drop at random: a flood of one
        # uid would cost another its answers. How long it gets is bounded by connections and the streams of each.
        ("grpc.server.max_pending_requests", _NO_BOUND),
        ("grpc.server.max_pending_requests_hard_limit", _NO_BOUND),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        # One number for both: between the two, grpcio would refuse by chance.
        ("grpc.max_metadata_size", limits.max_head_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_head_bytes),
        ("grpc.server_handshake_timeout_ms", round(limits.preface_s * 1000)),
        # Does not count while a stream is open, so it cuts no quiet watcher off.
        ("grpc.max_connection_idle_ms", round(limits.idle_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", round(_PING_EVERY_S * 1000)),
        ("grpc.http2.max_ping_strikes", _PING_STRIKES),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


# -- requests ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Unrecorded:
    """Refusals of one caller since `since_mono`, when one was recorded."""

    since_mono: float
    count: int = 0


class Turnstile:
    """Counts what goes on and how fast, by uid. `rate` is in requests per second, of one uid."""

    def __init__(self, *, room: Room, rate: float) -> None:
        self.rate = rate
        self.room = room
        self._uids: Rates[int] = Rates(most=_MAX_REMEMBERED)
        self._grants: Rates[tuple[str, str]] = Rates(most=_MAX_REMEMBERED)
        self._requests: Counter[int] = Counter()
        self._streams: Counter[int] = Counter()
        self._refused: dict[tuple[int, str], _Unrecorded] = {}
        self.requests = 0
        """In progress now, of all uids; streams are not among them."""
        self.streams = 0

    def enter(self, uid: int, now_mono: float, *, stream: bool = False) -> None:
        """One request of `uid` begins, or one stream. Raises RateLimitedError: then it does not."""
        wait_s = self._uids.take(uid, now_mono, rate=self.rate, burst=max(1.0, _BURST_S * self.rate))
        if wait_s:
            raise _limited(f"uid {uid} makes more than {self.rate:g} requests a second", wait_s)
        if stream:
            if self._streams[uid] >= self.room.streams_per_uid or self.streams >= self.room.streams:
                raise _limited(f"too many watches are open, {self._streams[uid]} of them of uid {uid}", _BUSY_S)
            self._streams[uid] += 1
            self.streams += 1
        else:
            if self._requests[uid] >= self.room.requests_per_uid or self.requests >= self.room.requests:
                raise _limited(f"too many requests wait for answers, {self._requests[uid]} of uid {uid}", _BUSY_S)
            self._requests[uid] += 1
            self.requests += 1

    def leave(self, uid: int, *, stream: bool = False) -> None:
        """What `enter` let in is over."""
        counts = self._streams if stream else self._requests
        if counts[uid] > 1:
            counts[uid] -= 1
        else:
            del counts[uid]
        if stream:
            self.streams -= 1
        else:
            self.requests -= 1

    def charge(self, workload: str, grants: Iterable[AnyGrant], now_mono: float) -> None:
        """`workload` asks for all of `grants`, each of which may have a rate of its own.

        Raises RateLimitedError when it is too soon for one of them: then none is charged.
        """
        paced = [(grant.name, rate) for grant in grants if (rate := grant.policy.rate) is not None]
        for name, rate in paced:
            wait_s = self._grants.wait_s((workload, name), now_mono, rate=rate, burst=max(1.0, _BURST_S * rate))
            if wait_s:
                raise _limited(f"workload {workload} asks for {name} more than {_per(rate)}, its policy's rate", wait_s)
        for name, rate in paced:
            self._grants.spend((workload, name), now_mono, rate=rate)

    # -- what is recorded of refusals ---------------------------------------------------------------------------------

    def refused(self, uid: int, workload: str, now_mono: float) -> str | None:
        """One refusal is to be recorded: with what detail, or None for not at all."""
        caller = (uid, workload)
        since = self._refused.get(caller)
        if since is not None and now_mono - since.since_mono < _RECORD_EVERY_S:
            since.count += 1
            return None
        detail = self.owed(uid, workload)
        self._refused.pop(caller, None)
        self._refused[caller] = _Unrecorded(now_mono)
        if len(self._refused) > _MAX_REMEMBERED:
            del self._refused[next(iter(self._refused))]
        return detail

    def owed(self, uid: int, workload: str) -> str:
        """What the next record of this caller has to say of refusals that were not recorded; empty for nothing.

        Those from before anybody knew the workload are among them.
        """
        if not self._refused:
            return ""
        count = 0
        for caller in {(uid, ""), (uid, workload)}:
            since = self._refused.get(caller)
            if since is not None:
                count += since.count
                since.count = 0
        return f"{count} more were refused by rate since the last record of it" if count else ""


def _limited(what: str, wait_s: float) -> RateLimitedError:
    text = f"{what}; come back after the delay, or raise the limit"
    return RateLimitedError(text, retry_after_s=max(0.001, wait_s))


def _per(rate: float) -> str:
    return f"{rate:g} times a second" if rate >= 1 else f"{rate * 60:g} times a minute"


# -- services of others -----------------------------------------------------------------------------------------------


class Guarded:
    """Stands for `server` where a service is added that knows no limits: health, reflection.

    Each of its calls passes the turnstile, as a stream if it is one. None is recorded: there is nothing to be had.
    """

    def __init__(self, server: grpc.aio.Server, *, door: FrontDoor, turnstile: Turnstile, clock: Clock) -> None:
        self._server = server
        self._door = door
        self._turnstile = turnstile
        self._clock = clock

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Nothing: the same handlers come by name as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Adds the methods of `service`, each behind the turnstile."""
        guarded = {name: self._guard(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))

    def _guard(self, handler: Any) -> Any:
        kinds = {
            "unary_unary": grpc.unary_unary_rpc_method_handler,
            "unary_stream": grpc.unary_stream_rpc_method_handler,
            "stream_unary": grpc.stream_unary_rpc_method_handler,
            "stream_stream": grpc.stream_stream_rpc_method_handler,
        }
        [(kind, make)] = [(name, make) for name, make in kinds.items() if getattr(handler, name)]
        behaviour = self._limited(getattr(handler, kind), stream=kind != "unary_unary")
        return make(
            behaviour,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _limited(self, behaviour: Any, *, stream: bool) -> Any:
        async def answers(request: Any, context: Any) -> Any:
            async with self._entered(context, stream=stream):
                return await behaviour(request, context)

        async def yields(request: Any, context: Any) -> Any:
            async with self._entered(context, stream=stream):
                async for message in behaviour(request, context):
                    yield message

        return yields if inspect.isasyncgenfunction(behaviour) else answers

    @asynccontextmanager
    async def _entered(self, context: Any, *, stream: bool) -> AsyncIterator[None]:
        try:
            uid = self._door.caller(context.peer()).peer.uid
            self._turnstile.enter(uid, self._clock.now().mono, stream=stream)
        except TokenwardError as error:
            await abort(context, error)
        try:
            yield
        finally:
            self._turnstile.leave(uid, stream=stream)
