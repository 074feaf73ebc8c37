"""What workloads call: who am I, what may I have, the value of one credential, and every change of it.

A handler is five steps: attest, decide, ask the broker, record, convert. No identity comes from a request. What is
asked for is charged to its policy's rate; an acknowledgement is not: one comes from every watcher of a new value.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping

import grpc

from tokenward.attest.caller import Attested
from tokenward.auditlog import AuditLog
from tokenward.broker import Broker
from tokenward.clock import Clock
from tokenward.core.model import AnyGrant, JwtGrant, Key, Served
from tokenward.core.policy import audience_of
from tokenward.errors import TokenwardError
from tokenward.presence import Presence
from tokenward.serve import convert
from tokenward.serve.call import Call
from tokenward.serve.front_door import FrontDoor
from tokenward.serve.limits import Turnstile
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc
from tokenward.watchers import State, Watcher, Watchers

_FIRST_STATE_S = 2.0
"""How long a watcher waits for what is slow before it gets the rest."""
_RECHECK_S = 5.0
"""How often the caller of an open, quiet stream is looked at again."""

_Context = grpc.aio.ServicerContext[object, object]


class CredentialService(rpc.CredentialServiceServicer):
    """`tokenward.v1.CredentialService`."""

    def __init__(
        self,
        *,
        door: FrontDoor,
        broker: Broker,
        watchers: Watchers,
        presence: Presence,
        turnstile: Turnstile,
        audit: AuditLog,
        clock: Clock,
    ) -> None:
        self._door = door
        self._turnstile = turnstile
        self._broker = broker
        self._watchers = watchers
        self._presence = presence
        self._audit = audit
        self._clock = clock

    def _call(self, context: _Context, event: str, credential: str = "", *, stream: bool = False) -> Call:
        return Call(
            context,
            event,
            door=self._door,
            turnstile=self._turnstile,
            audit=self._audit,
            clock=self._clock,
            credential=credential,
            stream=stream,
        )

    async def GetCredential(self, request: pb.GetCredentialRequest, context: _Context) -> pb.GetCredentialResponse:
        async with self._call(context, "get", request.name) as call:
            attested = await call.attest()
            grant = call.decide(attested, request.name, request.audience)
            call.charge(attested, grant)
            self._presence.note(attested.workload.name, call.caller.peer)
            served = await self._broker.get(attested.workload, grant, request.audience, timeout_s=call.patience_s())
            call.record(served)
            self._watchers.lend(call.caller, served.key, served.current.number)
            return pb.GetCredentialResponse(credential=convert.credential(served))

    async def WatchCredentials(
        self, request: pb.WatchCredentialsRequest, context: _Context
    ) -> AsyncIterator[pb.WatchCredentialsResponse]:
        async with self._call(context, "watch", stream=True) as call:
            attested = await call.attest()
            wanted = _keys(call, attested, request.names)
            call.charge(attested, *wanted.values())
            with self._watchers.watch(wanted, call.caller) as watcher:
                told: dict[Key, State] = {}
                self._presence.note(attested.workload.name, call.caller.peer)
                states = await self._full_state(attested, wanted)
                while True:
                    for state in states.values():
                        if isinstance(state, Served):
                            call.record(state)
                    yield pb.WatchCredentialsResponse(
                        states=[convert.state(key.credential, state) for key, state in states.items()]
                    )
                    told.update(states)
                    states = await _news(watcher, call, told)

    async def AcknowledgeVersion(
        self, request: pb.AcknowledgeVersionRequest, context: _Context
    ) -> pb.AcknowledgeVersionResponse:
        async with self._call(context, "acknowledge", request.name) as call:
            attested = await call.attest()
            grant = call.decide(attested, request.name, request.audience)
            key = Key(attested.workload.name, grant.name, audience_of(grant, request.audience))
            call.record()
            if self._watchers.acknowledge(call.caller, key, request.version):
                self._broker.moved_on(key, request.version)
            return pb.AcknowledgeVersionResponse()

    async def ReportRejected(self, request: pb.ReportRejectedRequest, context: _Context) -> pb.ReportRejectedResponse:
        async with self._call(context, "reject", request.name) as call:
            attested = await call.attest()
            grant = call.decide(attested, request.name, request.audience)
            call.charge(attested, grant)
            served = await self._broker.look_again(
                attested.workload, grant, request.audience, request.version, timeout_s=call.patience_s()
            )
            call.record(served)
            return pb.ReportRejectedResponse(credential=convert.credential(served))

    async def ListGrants(self, request: pb.ListGrantsRequest, context: _Context) -> pb.ListGrantsResponse:
        async with self._call(context, "list") as call:
            attested = await call.attest()
            call.record()
            return pb.ListGrantsResponse(grants=map(convert.grant_info, attested.workload.grants.values()))

    async def _full_state(self, attested: Attested, wanted: dict[Key, AnyGrant]) -> dict[Key, State]:
        async def one(key: Key, grant: AnyGrant) -> State:
            try:
                return await self._broker.get(attested.workload, grant, key.audience, timeout_s=_FIRST_STATE_S)
            except TokenwardError as error:
                return error

        states = await asyncio.gather(*(one(key, grant) for key, grant in wanted.items()))
        return dict(zip(wanted, states, strict=True))


class IdentityService(rpc.IdentityServiceServicer):
    """`tokenward.v1.IdentityService`."""

    def __init__(self, *, door: FrontDoor, turnstile: Turnstile, audit: AuditLog, clock: Clock) -> None:
        self._door = door
        self._turnstile = turnstile
        self._audit = audit
        self._clock = clock

    async def GetIdentity(self, request: pb.GetIdentityRequest, context: _Context) -> pb.GetIdentityResponse:
        call = Call(
            context, "identity", door=self._door, turnstile=self._turnstile, audit=self._audit, clock=self._clock
        )
        async with call:
            attested = await call.attest()
            call.record()
            return pb.GetIdentityResponse(
                spiffe_id=str(attested.workload.spiffe_id),
                workload=attested.workload.name,
                selectors=sorted(map(str, attested.attestation.selectors)),
            )


def _keys(call: Call, attested: Attested, names: Iterable[str]) -> dict[Key, AnyGrant]:
    """The keys that a stream watches: those of `names`, or of every grant; a JWT for its first audience."""
    wanted: dict[Key, AnyGrant] = {}
    for name in tuple(names) or attested.workload.grants:
        grant = attested.workload.grants.get(name)
        audience = grant.audiences[0] if isinstance(grant, JwtGrant) else ""
        grant = call.decide(attested, name, audience)
        wanted[Key(attested.workload.name, name, audience)] = grant
    return wanted


async def _news(watcher: Watcher, call: Call, told: Mapping[Key, State]) -> dict[Key, State]:
    """The next changes, once the caller has been looked at again: it may have gone, or become another."""
    while True:
        changes: dict[Key, State] = {}
        try:
            async with asyncio.timeout(_RECHECK_S):
                changes = await watcher.changes()
        except TimeoutError:
            pass
        await call.attest()
        news = {key: state for key, state in changes.items() if not _is_told(state, told[key])}
        if news:
            return news


def _is_told(state: State, told: State) -> bool:
    """Whether `state` is no news to who was told `told`: a failure of the same cause as before is none."""
    if isinstance(state, TokenwardError) and isinstance(told, TokenwardError):
        return state.reason == told.reason
    return state is told
