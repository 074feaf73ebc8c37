"""A tokenward agent without a vault: real gRPC on a real socket, with credentials that the test scripts.

It speaks `tokenward.v1` as the agent does (full state first, then changes, newest wins; errors with `google.rpc`
details), remembers who connected and what was asked, and can rotate, fail, refuse, stop and start again.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc

from tokenward.errors import DeniedError, Reason, TokenwardError
from tokenward.serve.status import code_of
from tokenward.serve.status import problem as problem_of
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc
from tokenward.v1 import status_pb2


def wait_for(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Waits until `condition` holds; an AssertionError when it does not within `timeout_s`."""
    end_mono = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_mono, "the condition did not come to hold in time"
        time.sleep(0.002)


class FakeAgent:
    """Use as a context manager; it listens at `path` from `start` to `stop`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.peers: list[int] = []
        """The pid at the other end of each connection, in order, as the kernel says."""
        self.gets: list[pb.GetCredentialRequest] = []
        self.watches: list[tuple[str, ...]] = []
        """The names of each watch that was opened, in order."""
        self.acknowledged: list[tuple[str, int]] = []
        """Name and version of each acknowledgement, in order."""
        self.get_delay_s = 0.0
        self.abandoned = 0
        """How many gets their callers gave up while they were delayed."""
        self._changed = threading.Condition()
        self._states: dict[str, pb.CredentialState] = {}
        self._errors: dict[str, TokenwardError] = {}
        self._refusal: TokenwardError | None = None
        self._raw: tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]] | None = None
        self._server: grpc.Server | None = None
        self._door: _Door | None = None

    # -- the script ---------------------------------------------------------------------------------------------------

    def put(self, name: str, *, version: int = 1, ttl_s: float | None = 3600.0, **more: Any) -> None:
        """Has `name` be a credential from now on; `values` default to one that shows the version."""
        values = more.pop("values", {"password": f"{name}-{version}"})
        made = pb.Credential(name=name, kind=more.pop("kind", "leased"), version=version, values=values, **more)
        now = time.time()
        made.issued_at.FromMicroseconds(int(now * 1e6))
        if ttl_s is not None:
            made.expires_at.FromMicroseconds(int((now + ttl_s) * 1e6))
            made.refresh_at.FromMicroseconds(int((now + ttl_s * 0.67) * 1e6))
        self._set(name, pb.CredentialState(name=name, credential=made))

    def rotate(self, name: str, **more: Any) -> None:
        """The next version of `name`."""
        self.put(name, version=self._states[name].credential.version + 1, **more)

    def fail(self, name: str, error: TokenwardError) -> None:
        """Has `name` be granted, but without a value, because of `error`."""
        self._errors[name] = error
        self._set(name, pb.CredentialState(name=name, problem=problem_of(error)))

    def withdraw(self, name: str) -> None:
        """Has `name` not be granted any more: every watch of it ends with PERMISSION_DENIED."""
        with self._changed:
            del self._states[name]
            self._changed.notify_all()

    def refuse(self, error: TokenwardError | None) -> None:
        """Has every call and every open watch end with `error`, until it is None again."""
        with self._changed:
            self._refusal = error
            self._changed.notify_all()

    def answer_raw(self, code: grpc.StatusCode, text: str, *metadata: tuple[str, bytes]) -> None:
        """Has every call end with exactly this status."""
        self._raw = (code, text, metadata)

    def _set(self, name: str, state: pb.CredentialState) -> None:
        with self._changed:
            self._states[name] = state
            self._changed.notify_all()

    # -- the server ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listens, on a socket file made anew."""
        inner = f"{self.path}.inner"
        self._server = grpc.server(ThreadPoolExecutor(64), options=[("grpc.so_reuseport", 0)])
        rpc.add_CredentialServiceServicer_to_server(_Credentials(self), self._server)
        rpc.add_IdentityServiceServicer_to_server(_Identity(self), self._server)
        self._server.add_insecure_port(f"unix:{inner}")
        self._server.start()
        self._door = _Door(self.path, inner, self.peers)

    def stop(self, *, remove: bool = True) -> None:
        """Ends every connection; leaves the socket file behind, as a killed agent does, unless `remove`."""
        if self._door is not None:
            self._door.close()
            self._door = None
        if self._server is not None:
            self._server.stop(0).wait(5)
            self._server = None
            with self._changed:
                self._changed.notify_all()
        if remove:
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def cut(self) -> None:
        """Ends every open connection, and goes on listening."""
        assert self._door is not None
        self._door.cut()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- for the services ---------------------------------------------------------------------------------------------

    def check(self, context: grpc.ServicerContext, names: Iterable[str] = ()) -> None:
        """Ends the call as the script says, and for a name that is not granted."""
        if self._raw is not None:
            code, text, metadata = self._raw
            context.set_trailing_metadata(metadata)
            context.abort(code, text)
        if self._refusal is not None:
            abort(context, self._refusal)
        for name in names:
            if name not in self._states:
                abort(context, DeniedError(Reason.NOT_GRANTED, "there is no grant for this credential; have one added"))

    def state(self, name: str, context: grpc.ServicerContext) -> pb.CredentialState:
        """The state of `name`, whose failure ends the call."""
        self.check(context, [name])
        state = self._states[name]
        if state.HasField("problem"):
            abort(context, self._errors[name])
        return state

    def follow(self, names: tuple[str, ...], context: grpc.ServicerContext) -> Iterator[list[pb.CredentialState]]:
        """The full state, then what changed, each when it is there, as long as the watch is open."""
        self.watches.append(names)
        told: dict[str, pb.CredentialState] = {}
        while context.is_active():
            with self._changed:
                self.check(context, names)
                wanted = names or tuple(self._states)
                news = [self._states[name] for name in wanted if self._states[name] is not told.get(name)]
                if not news:
                    self._changed.wait(0.1)
            if news:
                told.update((state.name, state) for state in news)
                yield news

    def granted(self) -> list[pb.GrantInfo]:
        """The grants, as `ListGrants` has them."""
        return [
            pb.GrantInfo(name=name, kind=state.credential.kind or "leased", scopes=["read"])
            for name, state in self._states.items()
        ]


class _Credentials(rpc.CredentialServiceServicer):
    def __init__(self, agent: FakeAgent) -> None:
        self._agent = agent

    def GetCredential(self, request: pb.GetCredentialRequest, context: Any) -> pb.GetCredentialResponse:
        self._agent.gets.append(request)
        end_mono = time.monotonic() + self._agent.get_delay_s
        while context.is_active() and time.monotonic() < end_mono:
            time.sleep(0.005)
        self._agent.abandoned += not context.is_active()
        return pb.GetCredentialResponse(credential=self._agent.state(request.name, context).credential)

    def WatchCredentials(
        self, request: pb.WatchCredentialsRequest, context: Any
    ) -> Iterator[pb.WatchCredentialsResponse]:
        for states in self._agent.follow(tuple(request.names), context):
            yield pb.WatchCredentialsResponse(states=states)

    def AcknowledgeVersion(self, request: pb.AcknowledgeVersionRequest, context: Any) -> pb.AcknowledgeVersionResponse:
        self._agent.check(context, [request.name])
        self._agent.acknowledged.append((request.name, request.version))
        return pb.AcknowledgeVersionResponse()

    def ReportRejected(self, request: pb.ReportRejectedRequest, context: Any) -> pb.ReportRejectedResponse:
        self._agent.check(context, [request.name])
        self._agent.rotate(request.name)
        return pb.ReportRejectedResponse(credential=self._agent.state(request.name, context).credential)

    def ListGrants(self, request: pb.ListGrantsRequest, context: Any) -> pb.ListGrantsResponse:
        self._agent.check(context)
        return pb.ListGrantsResponse(grants=self._agent.granted())


class _Identity(rpc.IdentityServiceServicer):
    def __init__(self, agent: FakeAgent) -> None:
        self._agent = agent

    def GetIdentity(self, request: pb.GetIdentityRequest, context: Any) -> pb.GetIdentityResponse:
        self._agent.check(context)
        return pb.GetIdentityResponse(
            spiffe_id="spiffe://acme.example/app", workload="app", selectors=[f"unix:uid:{os.getuid()}"]
        )


def details(reason: str, *, domain: str = "tokenward", retry_after_s: float | None = None) -> bytes:
    """A serialized `google.rpc.Status` with ErrorInfo, and RetryInfo where a delay is given."""
    status = status_pb2.RpcStatus()
    _add(status, "ErrorInfo", status_pb2.ErrorInfo(reason=reason, domain=domain).SerializeToString())
    if retry_after_s is not None:
        info = status_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        _add(status, "RetryInfo", info.SerializeToString())
    return status.SerializeToString()


def abort(context: Any, error: TokenwardError) -> NoReturn:
    """Ends the call with `error`, in the wire form that the agent uses."""
    made = details(error.reason, retry_after_s=error.retry_after_s)
    context.set_trailing_metadata((("grpc-status-details-bin", made),))
    context.abort(code_of(error), error.public)
    raise AssertionError("abort returned")


def _add(status: status_pb2.RpcStatus, name: str, value: bytes) -> None:
    detail = status.details.add()
    detail.type_url = f"type.googleapis.com/google.rpc.{name}"
    detail.value = value


class _Door:
    """Accepts at `path`, asks the kernel who connected, and copies bytes to and from `inner`."""

    def __init__(self, path: str, inner: str, peers: list[int]) -> None:
        self._inner = inner
        self._peers = peers
        with suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(128)
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(5)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                outer, _ = self._listener.accept()
            except OSError:
                return
            pid, _, _ = struct.unpack("3i", outer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            self._peers.append(pid)
            inner = socket.socket(socket.AF_UNIX)
            inner.connect(self._inner)
            self._open += [outer, inner]
            both = threading.Thread(target=self._join, args=(outer, inner), daemon=True)
            both.start()
            self._threads.append(both)

    def _join(self, outer: socket.socket, inner: socket.socket) -> None:
        back = threading.Thread(target=_copy, args=(inner, outer), daemon=True)
        back.start()
        _copy(outer, inner)
        back.join(5)
        for end in (outer, inner):
            self._open.remove(end)
            end.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
