"""One request on its way through the agent, from the caller's attestation to the audit record.

This is the RPC edge: whatever goes wrong inside the block becomes one audit record and one clear status. A record comes
before the answer, for a denial too; when it cannot be written, the caller gets nothing else than that.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

import grpc

from tokenward.attest.caller import Attested
from tokenward.auditlog import AuditLog
from tokenward.clock import Clock
from tokenward.core.audit import Peer, Record
from tokenward.core.model import AnyGrant, Process, Served
from tokenward.core.policy import granted
from tokenward.errors import DeniedError, Reason, TokenwardError, UnavailableError
from tokenward.serve.front_door import FrontDoor
from tokenward.serve.status import abort

_log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 5.0
_ANSWER_AHEAD_S = 0.25
_MAX_RECORDED_NAME = 64


class Call:
    """Collects what is known of one request so far, so that its record is complete wherever it ends.

    Use as `async with Call(...) as call:` around the whole handler.
    """

    __slots__ = ("_attested", "_audit", "_clock", "_context", "_credential", "_door", "_event")

    def __init__(
        self,
        context: grpc.aio.ServicerContext[object, object],
        event: str,
        *,
        door: FrontDoor,
        audit: AuditLog,
        clock: Clock,
        credential: str = "",
    ) -> None:
        self._context = context
        self._event = event
        self._door = door
        self._audit = audit
        self._clock = clock
        self._credential = credential[:_MAX_RECORDED_NAME]
        self._attested: Attested | None = None

    async def attest(self) -> Attested:
        """Who is calling, as of now. Raises DeniedError or AttestationError."""
        caller = self._door.caller(self._context.peer())
        self._attested = await caller.identify(self._clock.now().mono)
        return self._attested

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

    def patience_s(self) -> float:
        """How long the caller may wait for the vault, in seconds: 5, or until shortly before its own deadline."""
        left_s = self._context.time_remaining()
        if left_s is None:
            return _LONGEST_WAIT_S
        return max(0.0, min(_LONGEST_WAIT_S, left_s - _ANSWER_AHEAD_S))

    def record(self, served: Served | None = None) -> None:
        """Writes the record of an answer. Raises AuditError: then nothing may leave."""
        if served is None:
            self._append()
        else:
            self._append(
                credential=served.key.credential,
                audience=served.key.audience,
                version=served.current.number,
                fingerprint=served.current.fingerprint,
                stale=served.stale,
            )

    def _append(self, *, outcome: str = "ok", credential: str | None = None, **facts: str | int | bool) -> None:
        attested = self._attested
        workload = attested.workload if attested is not None else None
        self._audit.append(
            Record(
                event=self._event,
                outcome=outcome,
                workload=workload.name if workload is not None else "",
                spiffe_id=str(workload.spiffe_id) if workload is not None else "",
                peer=self._peer(),
                credential=self._credential if credential is None else credential,
                **facts,  # type: ignore[arg-type]  # names and types are those of `record` above
            )
        )

    def _peer(self) -> Peer | None:
        if self._attested is not None:
            return Peer.of(self._attested.attestation.process)
        try:
            peer = self._door.caller(self._context.peer()).peer
        except DeniedError:
            return None
        return Peer.of(Process(pid=peer.pid, uid=peer.uid, gid=peer.gid))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        if not isinstance(error, TokenwardError):
            _log.error("a %s request failed inside the agent: %s", self._event, type(error).__name__, exc_info=error)
            error = UnavailableError(Reason.INTERNAL, "the agent failed on this request; its log has the cause")
        try:
            self._append(outcome=error.reason)
        except TokenwardError as unrecorded:
            error = unrecorded
        await abort(self._context, error)
