"""Moves bytes between the two sockets of a hop, as fast as the slower side takes them.

Owns one epoll instance for all sockets of the front door, hung into the event loop as a single descriptor, and the
copying in both directions. Opens and closes no socket; when a hop has ended, its owner closes both.
Invariant: of each direction at most one buffer's worth is held; while it is, nothing more is read from the source.

Why not the loop's own transports: nothing here ever has to wait, so there is no task per connection to cancel, no
moment in which bytes arrive at a half that is not joined yet, and a descriptor is closed exactly when we say so. And
why not the loop's add_reader for each socket: uvloop drops the watch without a word when the socket has an error, and
then refuses that descriptor number for good.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from socket import SHUT_WR, socket

_EVENTS_PER_WAKE = 128
"""Bounds how long one wake-up keeps the loop from everything else."""
_BUFFER_BYTES = 64 * 1024
_REQUEST_BYTES = 1024
"""Read of a client at once, a dozen requests or two: who pipelines more cannot push others aside."""
_READABLE = EPOLLIN | EPOLLERR | EPOLLHUP  # reading is how one learns of an error or a hang-up
_WRITABLE = EPOLLOUT | EPOLLERR | EPOLLHUP
_BOTH_FLOW = (EPOLLIN, EPOLLIN)

Handler = Callable[[int], None]
"""Takes the epoll events that came; must bear one that is no longer true."""


class Readiness:
    """Tells which of many descriptors are ready, in `asyncio` and in uvloop alike."""

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        """For whoever is being handled: what is in it is worthless to the next one."""
        self._loop = loop
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        loop.add_reader(self._epoll.fileno(), self._dispatch)

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler` whenever one of `events`, an error or a hang-up is there."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Watch `fd` no more; does nothing where it was not watched."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Watch nothing any more."""
        self._handlers.clear()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _dispatch(self) -> None:
        handlers = self._handlers
        for fd, events in self._epoll.poll(0, _EVENTS_PER_WAKE):
            handler = handlers.get(fd)
            if handler is not None:  # one before it may have closed the descriptor
                handler(events)


class _Way:
    """One direction: `held` is what the sink has not taken yet, `ended` is set when nothing more will pass, `pulled`
    counts the bytes."""

    __slots__ = ("ended", "held", "pulled", "sink", "source")

    def __init__(self, *, source: socket, sink: socket, held: bytes = b"") -> None:
        self.source = source
        self.sink = sink
        self.held = held
        self.ended = False
        self.pulled = 0

    def pull(self, buffer: memoryview) -> bool:
        """Pass on what the source has; True at its end. Raises OSError where it was torn down, which ends both ways."""
        try:
            count = self.source.recv_into(buffer)
        except BlockingIOError:
            return False
        if count:
            self.pulled += count
            self._give(buffer[:count])
            return False
        self.ended = True
        self.sink.shutdown(SHUT_WR)
        return True

    def push(self) -> None:
        """Give the sink what is held."""
        self._give(self.held)

    def _give(self, data: bytes | memoryview) -> None:
        try:
            count = self.sink.send(data)
        except BlockingIOError:
            count = 0
        except OSError:
            # Nobody reads this way any more; the other way may still have last words (a GOAWAY and its trailers).
            self.ended, self.held = True, b""
            return
        self.held = bytes(data[count:]) if count < len(data) else b""


class Hop:
    """Two connected sockets joined: what one sends the other gets, half-closes too. Both are non-blocking."""

    __slots__ = ("_buffer", "_down", "_handlers", "_is_paused", "_readiness", "_sockets", "_up", "_watched")

    def __init__(self, *, readiness: Readiness, client: socket, inner: socket, first: bytes) -> None:
        self._readiness = readiness
        self._buffer = readiness.buffer
        self._sockets = (client, inner)
        self._up = _Way(source=client, sink=inner, held=first)
        self._down = _Way(source=inner, sink=client)
        self._handlers: tuple[Handler, Handler] | None = None
        self._watched = (0, 0)
        """Events of the client's socket and of the inner one."""
        self._is_paused = False

    @property
    def pulled(self) -> int:
        """Bytes that the client has sent so far, beyond the first ones."""
        return self._up.pulled

    def pause(self, paused: bool) -> None:  # noqa: FBT001 -- it is all that this says
        """Read nothing of the client until it is told to go on. What is for the client still passes, and that it hung
        up is told: whoever pauses it ends it then."""
        self._is_paused = paused
        self._watch()

    def start(self, on_client: Handler, on_inner: Handler) -> None:
        """Pass `first` on and watch both sockets: their handlers call `client_ready` and `inner_ready`."""
        self._handlers = (on_client, on_inner)
        self._up.push()
        self._watch()

    def client_ready(self, events: int) -> bool:
        """Move what can be moved; True when nothing will pass any more. Raises OSError where a side was torn down."""
        return self._move(events, self._up, self._down, self._buffer[:_REQUEST_BYTES])

    def inner_ready(self, events: int) -> bool:
        """The same for the other side."""
        return self._move(events, self._down, self._up, self._buffer)

    def _move(self, events: int, leaving: _Way, coming: _Way, buffer: memoryview) -> bool:
        if coming.held and events & _WRITABLE:
            coming.push()
        if not leaving.held and not leaving.ended and events & _READABLE:
            read_out = leaving.pull(buffer)
            if read_out and events & EPOLLHUP:
                # Read to its end and hung up: this side closed both ways, so what is for it has no taker.
                coming.ended = True
        if self._watched == _BOTH_FLOW and not leaving.held and not leaving.ended and not coming.ended:
            return False  # as it was: the way that nearly all bytes take
        self._watch()
        return leaving.ended and coming.ended

    def _watch(self) -> None:
        """Watch for what can be used. Nothing wanted means not watched at all: a hang-up would be told for ever."""
        wanted = (_wanted(self._up, self._down), _wanted(self._down, self._up))
        if self._is_paused:
            wanted = (wanted[0] & ~EPOLLIN, wanted[1])
        if wanted == self._watched:
            return
        assert self._handlers is not None
        self._watched = wanted
        for sock, events, handler in zip(self._sockets, wanted, self._handlers, strict=True):
            if events or (self._is_paused and sock is self._sockets[0]):
                self._readiness.watch(sock.fileno(), events, handler)
            else:
                self._readiness.forget(sock.fileno())


def _wanted(leaving: _Way, coming: _Way) -> int:
    """The epoll events of interest on the socket where `leaving` starts and `coming` ends."""
    return (0 if leaving.held or leaving.ended else EPOLLIN) | (EPOLLOUT if coming.held else 0)
