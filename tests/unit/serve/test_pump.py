"""The hop's byte pump, between real socket pairs, on both event loops."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
import uvloop

from tokenward.serve.pump import Hop, Readiness


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    made: asyncio.AbstractEventLoop = request.param()
    yield made
    made.close()


class Joined:
    """client <-> (near, far) <-> inner, with near and far joined by a hop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, first: bytes = b"") -> None:
        self.loop = loop
        self.readiness = Readiness(loop=loop)
        self.client, self.near = socket.socketpair()
        self.inner, self.far = socket.socketpair()
        for sock in (self.client, self.near, self.inner, self.far):
            sock.settimeout(0)
        self.ended = False
        self.told = 0
        self.hop = Hop(readiness=self.readiness, client=self.near, inner=self.far, first=first)
        self.hop.start(self.on_client, self.on_inner)

    def on_client(self, events: int) -> None:
        self.told += 1
        self.ended = self.hop.client_ready(events)

    def on_inner(self, events: int) -> None:
        self.ended = self.hop.inner_ready(events)

    def turn(self, times: int = 50) -> None:
        """Let the loop handle what is ready."""

        async def turns() -> None:
            for _ in range(times):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def close(self) -> None:
        self.readiness.close()
        for sock in (self.client, self.near, self.inner, self.far):
            sock.close()


@pytest.fixture
def joined(loop: asyncio.AbstractEventLoop) -> Iterator[Joined]:
    made = Joined(loop, first=b"first ")
    yield made
    made.close()


def fill(sock: socket.socket, joined: Joined, most: int) -> bytes:
    """Send until nothing is taken any more, or `most` bytes went."""
    sent = bytearray()
    while len(sent) < most:
        chunk = len(sent).to_bytes(4, "big") * 1024
        try:
            sent += chunk[: sock.send(chunk)]
        except BlockingIOError:
            joined.turn()
            try:
                sent += chunk[: sock.send(chunk)]
            except BlockingIOError:
                return bytes(sent)
    return bytes(sent)


def drain(sock: socket.socket, joined: Joined) -> bytes:
    """All that comes until end of file or until nothing comes any more."""
    got = bytearray()
    quiet = 0
    while quiet < 3:
        try:
            data = sock.recv(1 << 20)
        except BlockingIOError:
            quiet += 1
            joined.turn()
            continue
        if not data:
            break
        quiet = 0
        got += data
    return bytes(got)


def test_the_first_bytes_come_before_the_later_ones(joined: Joined) -> None:
    joined.client.send(b"second")
    joined.turn()
    assert joined.inner.recv(100) == b"first second"


def test_bytes_that_were_there_before_the_hop_are_not_lost(loop: asyncio.AbstractEventLoop) -> None:
    """grpcio's SETTINGS frame may be waiting already when the halves are joined."""
    made = Joined(loop)
    made.inner.send(b"settings")
    made.turn()
    assert made.client.recv(100) == b"settings"
    made.close()


def test_a_reader_that_does_not_read_stops_the_writer_and_loses_nothing(joined: Joined) -> None:
    sent = fill(joined.inner, joined, most=64 << 20)
    assert len(sent) < 2 << 20, "two socket buffers and one of ours, not 64 MiB"
    assert drain(joined.client, joined) == sent
    sent = fill(joined.client, joined, most=64 << 20)
    assert len(sent) < 2 << 20
    assert drain(joined.inner, joined) == b"first " + sent


def test_a_half_close_is_passed_on_after_what_was_sent_before_it(joined: Joined) -> None:
    sent = fill(joined.client, joined, most=64 << 20)
    joined.client.shutdown(socket.SHUT_WR)
    assert drain(joined.inner, joined) == b"first " + sent
    assert joined.inner.recv(1) == b""
    assert not joined.ended
    joined.inner.send(b"still here")
    joined.turn()
    assert joined.client.recv(100) == b"still here"
    joined.inner.shutdown(socket.SHUT_WR)
    joined.turn()
    assert joined.client.recv(1) == b""
    assert joined.ended


def test_last_words_arrive_although_the_other_way_is_broken(joined: Joined) -> None:
    """A server that says GOAWAY and closes while the client still sends: the client reads the GOAWAY."""
    fill(joined.client, joined, most=64 << 20)
    joined.inner.send(b"goaway")
    joined.inner.close()
    joined.turn()
    assert joined.client.recv(100) == b"goaway"
    assert joined.client.recv(1) == b""


@pytest.mark.parametrize("leaver", ["client", "inner"])
def test_a_side_that_closes_both_ways_ends_the_hop(joined: Joined, leaver: str) -> None:
    joined.turn()
    joined.inner.recv(100)
    getattr(joined, leaver).close()
    joined.turn()
    assert joined.ended


def test_a_client_that_leaves_with_both_ways_full_takes_nothing_back_of_what_it_sent(joined: Joined) -> None:
    sent = fill(joined.client, joined, most=64 << 20)
    fill(joined.inner, joined, most=64 << 20)
    joined.client.close()
    joined.turn()
    assert drain(joined.inner, joined) == b"first " + sent


def test_a_hang_up_is_not_told_for_ever(joined: Joined) -> None:
    """The client has closed, its bytes wait for a slow server: nothing to do must mean nothing done."""
    sent = fill(joined.client, joined, most=64 << 20)
    joined.client.close()
    joined.turn()
    joined.told = 0
    joined.turn(200)
    assert joined.told == 0
    assert drain(joined.inner, joined) == b"first " + sent
    joined.turn()
    assert joined.ended


def test_a_socket_error_reaches_the_handler_and_the_number_can_be_used_again(loop: asyncio.AbstractEventLoop) -> None:
    """uvloop's own add_reader drops the watch on EPOLLERR and then refuses the descriptor's number."""
    readiness = Readiness(loop=loop)

    async def turns() -> None:
        for _ in range(50):
            await asyncio.sleep(0)

    for _ in range(3):
        near, far = socket.socketpair()
        near.settimeout(0)
        seen: list[int] = []
        readiness.watch(near.fileno(), 1, seen.append)
        near.send(b"never read")
        far.close()
        loop.run_until_complete(turns())
        assert seen
        readiness.forget(near.fileno())
        near.close()
    readiness.close()
