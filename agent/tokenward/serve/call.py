"""One request on its way through the agent, from the caller's attestation to the audit record.

This is the RPC edge: whatever goes wrong inside the block becomes one audit record and one clear status. A record comes
before the answer, for a denial too; when it cannot be written, the caller gets nothing else than that. Refusals by rate
are the one exception: one a second of each caller is recorded, with the number of those that were not.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from types import TracebackType
from typing import Self, cast

import grpc
from msgspec.structs import replace

from tokenward.attest.caller import Attested, Caller
from tokenward.auditlog import AuditLog
from tokenward.clock import Clock
from tokenward.core.audit import Peer, Record
from tokenward.core.model import AnyGrant, Served
from tokenward.core.policy import granted
from tokenward.errors import DeniedError, Reason, TokenwardError, UnavailableError
from tokenward.serve.front_door import FrontDoor
from tokenward.serve.limits import Turnstile
from tokenward.serve.status import abort

_log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 5.0
_ANSWER_AHEAD_S = 0.25
_MAX_RECORDED_NAME = 64


class Call:
    """Collects what is known of one request so far, so that its record is complete wherever it ends.

    Use as `async with Call(...) as call:` around the whole handler: it begins only if the limits of its uid let it.
    """

    __slots__ = ("_audit", "_clock", "_context", "_door", "_entered", "_record", "_stream", "_turnstile")

    def __init__(
        self,
        context: grpc.aio.ServicerContext[object, object],
        event: str,
        *,
        door: FrontDoor,
        turnstile: Turnstile,
        audit: AuditLog,
        clock: Clock,
        credential: str = "",
        stream: bool = False,
    ) -> None:
        self._context = context
        self._door = door
        self._turnstile = turnstile
        self._audit = audit
        self._clock = clock
        self._stream = stream
        self._entered: int | None = None
        """The uid as which it passed the turnstile."""
        self._record = Record(event=event, credential=credential[:_MAX_RECORDED_NAME])

    @property
    def caller(self) -> Caller:
        """The caller of this request's connection. Raises DeniedError once that has ended."""
        return self._door.caller(self._context.peer())

    async def attest(self) -> Attested:
        """Who is calling, as of now. Raises DeniedError or AttestationError."""
        attested = await self.caller.identify(self._clock.now().mono)
        self._record = replace(
            self._record,
            workload=attested.workload.name,
            spiffe_id=str(attested.workload.spiffe_id),
            peer=Peer.of(attested.attestation.process),
        )
        return attested

    def decide(self, attested: Attested, credential: str, audience: str) -> AnyGrant:
        """The grant that lets the caller have `credential`. Raises DeniedError whether or not the name exists."""
        grant = granted(attested.workload, credential, audience)
        if grant is None:
            raise DeniedError(
                Reason.NOT_GRANTED,
                f"workload {attested.workload.name} has no grant for this credential and audience; "
                "list its grants, or have one added to the agent's configuration",
            )
        return grant

    def charge(self, attested: Attested, *grants: AnyGrant) -> None:
        """The caller asks for all of `grants` now. Raises RateLimitedError by their policies' rates."""
        if any(grant.policy.rate is not None for grant in grants):
            self._turnstile.charge(attested.workload.name, grants, self._clock.now().mono)

    def patience_s(self) -> float:
        """How long the caller may wait for the vault, in seconds: 5, or until shortly before its own deadline."""
        left_s = cast("float | None", self._context.time_remaining())  # the stubs do not know None
        if left_s is None:
            return _LONGEST_WAIT_S
        return max(0.0, min(_LONGEST_WAIT_S, left_s - _ANSWER_AHEAD_S))

    def record(self, served: Served | None = None) -> None:
        """Writes the record of an answer. Raises AuditError: then nothing may leave."""
        record = self._record
        if self._entered is not None and (owed := self._turnstile.owed(self._entered, record.workload)):
            record = replace(record, detail=owed)
        if served is not None:
            record = replace(
                record,
                credential=served.key.credential,
                audience=served.key.audience,
                version=served.current.number,
                fingerprint=served.current.fingerprint,
                stale=served.stale,
            )
        self._audit.append(record)

    def _refuse(self, error: TokenwardError) -> TokenwardError:
        """Records `error`; returns what the caller is told, which is that nothing can be recorded if that is so."""
        record = self._record
        if record.peer is None:
            with suppress(DeniedError):
                peer = self.caller.peer
                record = replace(record, peer=Peer(peer.pid, peer.uid, peer.gid))
        if error.reason is Reason.RATE_LIMITED and record.peer is not None:
            detail = self._turnstile.refused(record.peer.uid, record.workload, self._clock.now().mono)
            if detail is None:
                return error
            record = replace(record, detail=detail)
        try:
            self._audit.append(replace(record, outcome=error.reason))
        except TokenwardError as unrecorded:
            return unrecorded
        return error

    async def __aenter__(self) -> Self:
        try:
            uid = self.caller.peer.uid
            self._turnstile.enter(uid, self._clock.now().mono, stream=self._stream)
        except TokenwardError as error:
            await abort(self._context, self._refuse(error))
        self._entered = uid
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered is not None:
            self._turnstile.leave(self._entered, stream=self._stream)
        if error is None or not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        if not isinstance(error, TokenwardError):
            _log.error("a %s request failed in the agent: %s", self._record.event, type(error).__name__, exc_info=error)
            error = UnavailableError(Reason.INTERNAL, "the agent failed on this request; its log has the cause")
        await abort(self._context, self._refuse(error))
