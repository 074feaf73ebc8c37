"""HTTP/2 by hand, as an attacker writes it: frames, header blocks without compression, and a reader of what comes back.

Knows no rule of the protocol that it would keep to by itself: what to send in which order is for the attack to say.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
INITIAL_WINDOW_SIZE: Final = 4

GET: Final = "/tokenward.v1.CredentialService/GetCredential"
WATCH: Final = "/tokenward.v1.CredentialService/WatchCredentials"
WHO: Final = "/tokenward.v1.IdentityService/GetIdentity"

Field = tuple[str, str]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame, its length as it is."""
    return struct.pack("!I", len(payload))[1:] + bytes((kind, flags)) + struct.pack("!I", stream) + payload


def settings(**values: int) -> bytes:
    """A SETTINGS frame; keys are `s` and the setting's number, as in `s4=0`."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack("!HI", int(key[1:]), value) for key, value in values.items()))


def integer(number: int, prefix_bits: int, pattern: int = 0) -> bytes:
    """An integer as HPACK writes it (RFC 7541, section 5.1)."""
    most = (1 << prefix_bits) - 1
    if number < most:
        return bytes((pattern | number,))
    coded = bytearray((pattern | most,))
    number -= most
    while number >= 128:
        coded.append(number % 128 + 128)
        number //= 128
    return bytes((*coded, number))


def literal(name: str, value: str, *, indexed: bool = False) -> bytes:
    """One header field in full, to be put into the dynamic table or not."""
    first = b"\x40" if indexed else b"\x00"
    return first + b"".join(integer(len(text), 7) + text.encode() for text in (name, value))


def block(path: str, *more: Field, authority: str = "localhost") -> bytes:
    """The header block of a gRPC request."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", authority),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    )
    return b"".join(literal(name, value) for name, value in fields)


def name_message(name: str) -> bytes:
    """A message whose field 1 is `name`: what is asked for, or watched."""
    return b"\x0a" + bytes((len(name),)) + name.encode() if name else b""


def message(payload: bytes, *, compressed: bool = False) -> bytes:
    """`payload` as gRPC sends it."""
    return struct.pack("!?I", compressed, len(payload)) + payload


def request(stream: int, path: str, name: str = "", *more: Field, authority: str = "localhost") -> bytes:
    """A whole request in two frames."""
    head = frame(HEADERS, END_HEADERS, stream, block(path, *more, authority=authority))
    return head + frame(DATA, END_STREAM, stream, message(name_message(name)))


OPENING: Final = PREFACE + settings()


@dataclass(slots=True)
class Heard:
    """What the agent sent so far: frames by kind, and every byte of its answers."""

    frames: dict[int, int] = field(default_factory=dict)
    bodies: bytearray = field(default_factory=bytearray)
    """Payloads of DATA and HEADERS frames, the texts of an answer that is no HTTP/2 too."""
    ended: set[int] = field(default_factory=set)
    settings: int = 0
    """SETTINGS that ask for an acknowledgement."""
    _rest: bytes = b""

    def take(self, data: bytes) -> None:
        """Reads on; what is no frame yet is kept."""
        self._rest += data
        for kind, flags, stream, payload in self._whole():
            self.frames[kind] = self.frames.get(kind, 0) + 1
            self.settings += kind == SETTINGS and not flags & ACK
            if kind in {DATA, HEADERS}:
                self.bodies += payload
            if (kind in {DATA, HEADERS} and flags & END_STREAM) or kind == RST_STREAM:
                self.ended.add(stream)

    def _whole(self) -> Iterator[tuple[int, int, int, bytes]]:
        at = 0
        while len(self._rest) >= at + 9:
            length = int.from_bytes(self._rest[at : at + 3], "big")
            if len(self._rest) < at + 9 + length:
                break
            kind, flags, stream = struct.unpack("!BBI", self._rest[at + 3 : at + 9])
            yield kind, flags, stream, self._rest[at + 9 : at + 9 + length]
            at += 9 + length
        self._rest = self._rest[at:]


def connect(path: str, first: bytes = b"", *, bound: str = "") -> socket.socket:
    """A connection to `path` on which `first` was sent, from the abstract name `bound` if there is one."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(15)
    if bound:
        sock.bind(f"\0{bound}")
    sock.connect(path)
    if first:
        sock.sendall(first)
    return sock


class Speaker:
    """One connection on which one asks and is answered, in turn; closed with the block."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._heard = Heard()
        self._stream = 1

    def ask(self, path: str, name: str = "") -> bytes:
        """What comes back for one request; nothing when the connection is closed."""
        stream = self._stream
        self._stream += 2
        return self.answer(request(stream, path, name), stream)

    def answer(self, asked: bytes, stream: int) -> bytes:
        """Sends `asked`; everything that comes until `stream` or the connection has ended, headers and messages.

        Nothing is decoded: the agent's trailers are plain enough to find a status text in them.
        """
        heard = self._heard
        heard.bodies.clear()
        try:
            self.sock.sendall(asked)
            while stream not in heard.ended and (data := self.sock.recv(65536)):
                heard.take(data)
                self.sock.sendall(frame(SETTINGS, ACK, 0) * heard.settings)
                heard.settings = 0
        except ConnectionError:
            pass
        return bytes(heard.bodies)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def speaking(path: str, *, bound: str = "") -> Speaker:
    """A new connection to `path` that has sent the preface."""
    return Speaker(connect(path, OPENING, bound=bound))
