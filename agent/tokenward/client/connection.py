"""The one gRPC channel of a client: opened at its first use, closed before a fork, opened anew after it.

Owns the channel, its options, and the border to gRPC: errors leave as ours. Leaves repeating to its callers, which
learn by `CutOffError` that no answer came. Invariant: this module alone holds a channel, so closing it
lets gRPC's core stop (see `forks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from weakref import WeakSet

import grpc
from google.protobuf.message import Message

from tokenward.client import forks
from tokenward.client.errors import details_of, error_from
from tokenward.errors import Reason, TokenwardError
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc

_OPTIONS = (
    ("grpc.default_authority", "localhost"),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # A channel of our own: one that is shared inside the process would outlive our closing it.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

_COME_AGAIN = frozenset({Reason.SHUTTING_DOWN, Reason.CONFIGURATION_CHANGED})
"""The agent, or the next one, answers the same call anew."""

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class CutOffError(Exception):
    """No answer came: the agent cannot be reached or went away, or the process forked. The call may be repeated."""


class ClosedError(RuntimeError):
    """The client is closed: a mistake in the program, which is why it is none of our errors."""


@dataclass(frozen=True, slots=True)
class Stubs:
    """The services of one channel."""

    credentials: rpc.CredentialServiceStub
    identity: rpc.IdentityServiceStub

    @classmethod
    def on(cls, channel: grpc.Channel) -> Self:
        """The services on `channel`."""
        return cls(rpc.CredentialServiceStub(channel), rpc.IdentityServiceStub(channel))


class Stream:
    """One watch in progress. Owned by one reader; `cancel` may come from any thread."""

    __slots__ = ("__weakref__", "_rpc")

    def __init__(self, call: Any) -> None:
        self._rpc = call

    def read(self) -> pb.WatchCredentialsResponse:
        """Waits for the next message. Raises CutOffError or what the agent said."""
        call = self._rpc
        if call is None:
            raise CutOffError
        try:
            message: pb.WatchCredentialsResponse = next(call)
        except StopIteration:
            failure: Exception = CutOffError()
        except grpc.RpcError:
            failure = _failure(call)
        else:
            return message
        raise failure

    def cancel(self) -> None:
        """Ends the stream: `read` raises CutOffError."""
        call, self._rpc = self._rpc, None
        if call is not None:
            call.cancel()


class Connection:
    """The way to the agent at `path`. Thread-safe; makes no connection before it is used."""

    def __init__(self, *, path: str) -> None:
        self.path = path
        self._channel: grpc.Channel | None = None
        self._stubs: Stubs | None = None
        self._calls: set[Any] = set()
        self._streams: WeakSet[Stream] = WeakSet()
        self._closed = False

    def open(self, user: forks.Participant) -> None:
        """Opens the channel now, and has `user` told about forks as well."""
        with forks.gate():
            self._open()
            forks.take_part(user)

    def unary(
        self,
        method: Callable[[Stubs], grpc.UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        *,
        timeout_s: float,
    ) -> Future[Response]:
        """Starts a call that waits for the agent to be there, at most `timeout_s`.

        The future raises CutOffError or what the agent said; cancelling it cancels the call.
        """
        answer: Future[Response] = Future()
        with forks.gate():
            call: Any = method(self._open()).future(request, timeout=timeout_s, wait_for_ready=True)
            self._calls.add(call)
        answer.add_done_callback(lambda future: call.cancel() if future.cancelled() else None)
        call.add_done_callback(lambda done: self._settle(done, answer))
        return answer

    def stream(self, names: Iterable[str]) -> Stream:
        """Starts a watch of `names`; of every grant if there are none. It does not wait for the agent to be there."""
        with forks.gate():
            stubs = self._open()
            stream = Stream(stubs.credentials.WatchCredentials(pb.WatchCredentialsRequest(names=names)))
            self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Ends every call and stream; later ones raise ClosedError."""
        with forks.gate():
            self._closed = True
            self.before_fork()

    def before_fork(self) -> None:
        """Cuts every call off and closes the channel."""
        for call in list(self._calls):
            call.cancel()
        for stream in list(self._streams):
            stream.cancel()
        self._calls.clear()
        self._streams.clear()
        channel, self._channel, self._stubs = self._channel, None, None
        if channel is not None:
            channel.close()

    def after_fork_in_child(self) -> None:
        """Nothing is left to forget: the channel was closed before the fork."""

    def _open(self) -> Stubs:
        if self._closed:
            raise ClosedError("this tokenward client is closed; make a new one")
        if self._stubs is None:
            self._channel = grpc.insecure_channel(f"unix:{self.path}", options=_OPTIONS)
            self._stubs = Stubs.on(self._channel)
            forks.take_part(self)
        return self._stubs

    def _settle(self, call: Any, answer: Future[Response]) -> None:
        self._calls.discard(call)
        if not answer.set_running_or_notify_cancel():
            return
        if call.code() is grpc.StatusCode.OK:
            answer.set_result(call.result())
        else:
            answer.set_exception(_failure(call))


def _failure(call: Any) -> TokenwardError | CutOffError:
    """Why `call` failed, as an error that keeps no reference to it."""
    code, details = call.code(), details_of(call)
    if details is None and code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
        return CutOffError()
    error = error_from(code, call.details() or "", details)
    return CutOffError() if error.reason in _COME_AGAIN else error
