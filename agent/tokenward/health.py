"""`tokenward health`: asks a running agent how it is, as a probe does that runs every few seconds in its container.

Owns one call of `grpc.health.v1.Health/Check` on the workload socket, in HTTP/2 by hand: gRPC's own library would cost
each probe 25 MB of the container's memory limit and a tenth of a second of its processor. Leaves to `cli` what is
printed. Invariant: "well" is only ever said of an answer that came from the agent's gRPC server, as a whole; a socket
that merely accepts is an agent whose loop may be stuck. Imports nothing of the agent but its errors.

Follows RFC 9113 (frames) and RFC 7541 (literal header fields, of which none is ever decoded here).
"""

from __future__ import annotations

import os
import socket
import time
from enum import IntEnum

from tokenward.errors import InvalidRequestError, Reason, UnavailableError

SYSTEM_SOCKET = "/run/tokenward/workload.sock"
"""As in `client.address`, which cannot be imported without gRPC; a test compares them."""
VARIABLE = "TOKENWARD_SOCKET"

_MAX_ANSWER_BYTES = 1 << 16
_STREAM = 1
_END_STREAM, _ACK = 0x1, 0x1
_FRAME_HEAD = 9
_MESSAGE_HEAD = 5
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""`status`, the one field of a HealthCheckResponse."""


class _Kind(IntEnum):
    """Frame types, RFC 9113 section 6."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7


def verify(explicit: str | None = None, *, is_live_enough: bool = False, timeout_s: float = 3.0) -> None:
    """Returns when the agent at `explicit`, at `TOKENWARD_SOCKET` or at the system's socket serves.

    With `is_live_enough` any answer of its gRPC server will do: one that waits for its vault is alive, and starting it
    again would only lose what it holds. Raises UnavailableError with the reason otherwise, InvalidRequestError for a
    path that cannot be one.
    """
    path = _path(explicit)
    until_mono = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        try:
            _set_time(connection, until_mono)
            connection.connect(path)
            connection.sendall(_request())
            answer = _answer(connection, until_mono)
        except TimeoutError as error:
            raise _unwell(f"the agent at {path} did not answer within {timeout_s:g} s: see its log") from error
        except OSError as error:
            raise _unwell(f"no agent answers at {path}: {error.strerror or error}") from error
    if is_live_enough or answer == _SERVING:
        return
    if answer == _NOT_SERVING:
        raise _unwell("the agent is not ready: its log says what it waits for")
    raise _unwell("the agent answers, and does not say that it serves")


def _path(explicit: str | None) -> str:
    named = explicit if explicit is not None else os.environ.get(VARIABLE) or SYSTEM_SOCKET
    path = named.removeprefix("unix:")
    if not path or "\0" in path or "://" in path:
        raise InvalidRequestError(f"the socket must be a path, such as {SYSTEM_SOCKET}, not {named!r}")
    return path


def _unwell(text: str) -> UnavailableError:
    return UnavailableError(Reason.AGENT_UNREACHABLE, text)


def _set_time(connection: socket.socket, until_mono: float) -> None:
    """Leaves `connection` what is left of the time. Raises TimeoutError when nothing is."""
    left_s = until_mono - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    connection.settimeout(left_s)


# -- HTTP/2 -----------------------------------------------------------------------------------------------------------


def _request() -> bytes:
    """A whole connection: preface, our settings, and the one call with its empty message, which asks for the agent."""
    head = b"".join(
        (
            b"\x83",  # :method POST
            b"\x86",  # :scheme http
            _literal(b"\x04", b"/grpc.health.v1.Health/Check"),  # :path
            _literal(b"\x01", b"localhost"),  # :authority
            _literal(b"\x0f\x10", b"application/grpc"),  # content-type
            _literal(b"\x00\x02te", b"trailers"),
        )
    )
    return b"".join(
        (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            _frame(_Kind.SETTINGS, 0, 0),
            _frame(_Kind.HEADERS, 0x4, _STREAM, head),  # END_HEADERS
            _frame(_Kind.DATA, _END_STREAM, _STREAM, bytes(_MESSAGE_HEAD)),
        )
    )


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing; its value is shorter than 127 bytes and not compressed."""
    return name + bytes((len(value),)) + value


def _frame(kind: _Kind, flags: int, stream: int, content: bytes = b"") -> bytes:
    return len(content).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + content


def _answer(connection: socket.socket, until_mono: float) -> bytes:
    """The message of the answer, once the answer is over; empty where it has none. Raises OSError."""
    data, received = b"", 0
    while received <= _MAX_ANSWER_BYTES:
        head = _exactly(connection, _FRAME_HEAD, until_mono)
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        if length > _MAX_ANSWER_BYTES:
            break
        content = _exactly(connection, length, until_mono)
        received += _FRAME_HEAD + length
        if kind == _Kind.SETTINGS and not flags & _ACK:
            connection.sendall(_frame(_Kind.SETTINGS, _ACK, 0))
        elif kind == _Kind.PING and not flags & _ACK:
            connection.sendall(_frame(_Kind.PING, _ACK, 0, content))
        elif kind in {_Kind.RST_STREAM, _Kind.GOAWAY}:
            raise ConnectionResetError("it ended the call")
        elif kind == _Kind.DATA:
            data += content
        if kind in {_Kind.DATA, _Kind.HEADERS} and flags & _END_STREAM:
            return data[_MESSAGE_HEAD:]
    raise ConnectionAbortedError("what answers there is no agent")


def _exactly(connection: socket.socket, count: int, until_mono: float) -> bytes:
    data = b""
    while len(data) < count:
        _set_time(connection, until_mono)
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionResetError("it closed the connection")
        data += more
    return data
