"""What an operator calls, on a socket of its own: status, rotate, revoke, unblock, reload. Values never pass here.

Whoever may connect may do all of it: the socket's directory and mode decide. Each call's record names the uid that
the kernel told, never what the caller says of itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import grpc

from tokenward.core.blocks import Scope
from tokenward.core.model import Key, Served
from tokenward.errors import InvalidRequestError, TokenwardError
from tokenward.operations import Operations
from tokenward.serve.convert import timestamp
from tokenward.serve.front_door import FrontDoor
from tokenward.serve.status import abort
from tokenward.v1 import admin_pb2 as pb
from tokenward.v1 import admin_pb2_grpc as rpc

_Context = grpc.aio.ServicerContext[object, object]


class AdminService(rpc.AdminServiceServicer):
    """`tokenward.v1.AdminService`. `door` is the admin socket's own; `reload` raises a TokenwardError."""

    def __init__(
        self, *, door: FrontDoor, operations: Operations, environment: str, reload: Callable[[], Awaitable[None]]
    ) -> None:
        self._door = door
        self._operations = operations
        self._environment = environment
        self._reload = reload

    async def GetStatus(self, request: pb.GetStatusRequest, context: _Context) -> pb.GetStatusResponse:
        async with _Answering(context):
            self._by(context)
            return pb.GetStatusResponse(
                environment=self._environment,
                credentials=map(_held, self._operations.held()),
                blocks=[
                    pb.Block(
                        scope=pb.Scope(workload=block.scope.workload, credential=block.scope.credential),
                        reason=block.reason,
                        by=block.by,
                        since=timestamp(block.since),
                    )
                    for block in self._operations.blocks
                ],
                pending_revocations=self._operations.pending_revocations,
            )

    async def Rotate(self, request: pb.RotateRequest, context: _Context) -> pb.RotateResponse:
        async with _Answering(context):
            by = self._by(context)
            served = await self._operations.rotate(request.workload, request.credential, reason=request.reason, by=by)
            return pb.RotateResponse(versions=[each.current.number for each in served])

    async def Revoke(self, request: pb.RevokeRequest, context: _Context) -> pb.RevokeResponse:
        async with _Answering(context):
            done = self._operations.revoke(_scope(request.scope), reason=request.reason, by=self._by(context))
            return pb.RevokeResponse(ended=done.ended, problem=done.problem)

    async def Unblock(self, request: pb.UnblockRequest, context: _Context) -> pb.UnblockResponse:
        async with _Answering(context):
            lifted = self._operations.lift(_scope(request.scope), reason=request.reason, by=self._by(context))
            return pb.UnblockResponse(lifted=lifted)

    async def Reload(self, request: pb.ReloadRequest, context: _Context) -> pb.ReloadResponse:
        async with _Answering(context):
            self._by(context)
            await self._reload()
            return pb.ReloadResponse()

    def _by(self, context: _Context) -> str:
        """Who is calling, for the record. Raises DeniedError for a connection that is not through the admin socket."""
        return f"uid {self._door.caller(context.peer()).peer.uid}"


class _Answering:
    """Around a handler: an error of ours becomes its status."""

    def __init__(self, context: _Context) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TokenwardError):
            await abort(self._context, error)


def _scope(scope: pb.Scope) -> Scope:
    if scope.credential and not scope.workload:
        raise InvalidRequestError("a credential is named together with its workload")
    return Scope(workload=scope.workload, credential=scope.credential)


def _held(found: tuple[Key, Served]) -> pb.HeldCredential:
    key, served = found
    return pb.HeldCredential(
        workload=key.workload,
        credential=key.credential,
        audience=key.audience,
        kind=served.kind,
        version=served.current.number,
        fingerprint=served.current.fingerprint,
        expires_at=timestamp(served.current.issued.expires.wall),
        refresh_at=timestamp(served.current.due.wall),
        stale=served.stale,
    )
