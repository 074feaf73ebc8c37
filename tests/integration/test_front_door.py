"""The front door before a real grpc.aio server, with real clients: processes, sockets, channels.

The agent's part runs in a thread with its own event loop, asyncio's and uvloop's in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import grpc
import pytest
import uvloop

from tests.threads import InThread
from tokenward.attest.attestor import Attestor
from tokenward.errors import DeniedError, Reason
from tokenward.serve.first_bytes import PREFACE
from tokenward.serve.front_door import DoorLimits, FrontDoor
from tokenward.serve.listener import bind

EMPTY_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
BIG = 8 << 20
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", BIG),
    ("grpc.max_send_message_length", BIG),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]
NEVER_S = 600.0
"""For a limit of time that must not be what ends a connection."""
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
T = TypeVar("T")


def eventually(condition: Callable[[], T], within_s: float = 10.0) -> T:
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
    return found


class Service(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """What a test asks of the server behind the door."""

    def __init__(self) -> None:
        self.door: FrontDoor | None = None
        self.ended = threading.Event()
        """Set when a call of Forever was cancelled."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        match details.method:
            case "/test/Who":
                return grpc.unary_unary_rpc_method_handler(cast("Any", self.who))
            case "/test/Echo":
                return grpc.unary_unary_rpc_method_handler(cast("Any", self.echo))
            case "/test/Count":
                return grpc.unary_stream_rpc_method_handler(cast("Any", self.count))
            case "/test/Total":
                return grpc.stream_unary_rpc_method_handler(cast("Any", self.total))
            case "/test/Forever":
                return grpc.unary_stream_rpc_method_handler(cast("Any", self.forever))
        return None

    async def who(self, _request: bytes, context: Any) -> bytes:
        assert self.door is not None
        try:
            peer = self.door.caller(context.peer()).peer
        except DeniedError as error:
            return json.dumps({"name": context.peer(), "denied": error.reason}).encode()
        return json.dumps({"name": context.peer(), "pid": peer.pid, "uid": peer.uid}).encode()

    async def echo(self, request: bytes, _context: Any) -> bytes:
        return request

    async def count(self, request: bytes, context: Any) -> None:
        for number in range(int(request)):
            await context.write(str(number).encode())

    async def total(self, requests: Any, _context: Any) -> bytes:
        return str(sum([len(request) async for request in requests])).encode()

    async def forever(self, _request: bytes, context: Any) -> None:
        await context.write(b"begun")
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()


class House(InThread):
    """A front door and what stands behind it: grpcio's server, or a bare listening socket for the test to play it."""

    def __init__(self, loop_name: str, *, limits: DoorLimits | None = None, bare: bool = False) -> None:
        super().__init__(LOOPS[loop_name])
        self._limits = limits or DoorLimits.within(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._bare = bare
        self.service = Service()

    @property
    def public(self) -> str:
        return f"{self.directory}/public.sock"

    @property
    def inner(self) -> str:
        return f"{self.directory}/inner.sock"

    async def main(self) -> None:
        broken: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: broken.append(context))
        server = grpc.aio.server(options=OPTIONS)
        if self._bare:
            self.bare = socket.socket(socket.AF_UNIX)
            self.bare.bind(self.inner)
            self.bare.listen(5)
        else:
            server.add_generic_rpc_handlers((self.service,))
            server.add_insecure_port(f"unix:{self.inner}")
            await server.start()
        self.server = server
        listener = bind(self.public)
        attestor = Attestor(workloads=())
        self.door = FrontDoor(listener=listener.socket, inner_path=self.inner, attestor=attestor, limits=self._limits)
        self.service.door = self.door
        serving = asyncio.create_task(self.door.serve())
        await asyncio.sleep(0)
        await self.serve()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        assert self.door.connections == 0
        listener.close()
        await server.stop(0)
        if self._bare:
            self.bare.close()
        assert not broken, broken

    def channel(self, path: str | None = None) -> Any:  # the stubs know no call without serializers
        return grpc.insecure_channel(f"unix:{path or self.public}", options=OPTIONS)

    def connect(self, first: bytes = b"") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(self.public)
        if first:
            sock.sendall(first)
        return sock

    def who(self, path: str | None = None, *, patiently: bool = False) -> dict[str, Any]:
        """What the server knows of a new connection of ours."""
        with self.channel(path) as channel:
            answer = channel.unary_unary("/test/Who")(b"", timeout=20, wait_for_ready=patiently)
        return cast("dict[str, Any]", json.loads(answer))


@pytest.fixture(params=sorted(LOOPS))
def loop_name(request: pytest.FixtureRequest) -> str:
    return cast("str", request.param)


@pytest.fixture
def house(loop_name: str) -> Iterator[House]:
    with House(loop_name) as made:
        yield made


def python(program: str, *arguments: str, user: int | None = None) -> subprocess.Popen[str]:
    """A child that runs `program`, as another user once its imports are done: that one may not read the interpreter."""
    become = f"os.setgroups([]); os.setresgid({user}, {user}, {user}); os.setresuid({user}, {user}, {user})"
    imports = "import collections, itertools, os, socket, sys"
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "\n".join((imports, "" if user is None else become, textwrap.dedent(program))),
            *arguments,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate(timeout=10)


# -- the hop ----------------------------------------------------------------------------------------------------------


def test_the_server_learns_which_process_connected(house: House) -> None:
    seen = house.who()
    assert (seen["pid"], seen["uid"]) == (os.getpid(), os.getuid())
    assert seen["name"].startswith("unix-abstract:tokenward-")
    assert len(seen["name"]) == len("unix-abstract:tokenward-") + 32


def test_every_connection_has_its_own_name_and_takes_it_along(house: House) -> None:
    names = {house.who()["name"] for _ in range(5)}
    assert len(names) == 5
    eventually(lambda: house.door.connections == 0)
    for name in names:
        with pytest.raises(DeniedError) as caught:
            house.door.caller(name)
        assert caught.value.reason is Reason.UNKNOWN_PEER


def test_who_reaches_the_inner_socket_itself_is_nobody(house: House) -> None:
    assert house.who(house.inner) == {"name": "unix:", "denied": Reason.UNKNOWN_PEER}


def test_an_invented_name_at_the_inner_socket_is_nobody(house: House) -> None:
    relay = socket.socket(socket.AF_UNIX)
    relay.bind("\0tokenward-" + "0" * 32)
    relay.connect(house.inner)
    path = f"{os.path.dirname(house.inner)}/relay.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def pass_on() -> None:
            client, _ = listening.accept()
            with client, relay:
                threading.Thread(target=copy, args=(client, relay)).start()
                copy(relay, client)

        passing = threading.Thread(target=pass_on)
        passing.start()
        seen = house.who(path)
        passing.join(10)
    assert seen == {"name": "unix-abstract:tokenward-" + "0" * 32, "denied": Reason.UNKNOWN_PEER}


def copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def test_streams_both_ways(house: House) -> None:
    with house.channel() as channel:
        counted = list(channel.unary_stream("/test/Count")(b"500", timeout=20))
        assert counted == [str(number).encode() for number in range(500)]
        requests = iter([b"x" * 1000] * 500)
        assert channel.stream_unary("/test/Total")(requests, timeout=20) == b"500000"


def test_four_megabytes_there_and_back(house: House) -> None:
    message = os.urandom(4 << 20)
    with house.channel() as channel:
        assert channel.unary_unary("/test/Echo")(message, timeout=30) == message


def test_a_thousand_connections_at_once_are_all_served(loop_name: str) -> None:
    """The traps: SETTINGS before the halves are joined, and EAGAIN from grpcio's full backlog."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(1000, (descriptors - 400) // 6)
    limits = DoorLimits(max_connections=many, max_connections_per_uid=many)
    with House(loop_name, limits=limits) as house, contextlib.ExitStack() as channels:
        made = [channels.enter_context(house.channel()) for _ in range(many)]
        calls = [
            channel.unary_unary("/test/Echo").future(str(at).encode(), timeout=60) for at, channel in enumerate(made)
        ]
        assert [call.result() for call in calls] == [str(at).encode() for at in range(many)]
        assert house.door.connections == many


def test_a_full_backlog_is_waited_for(loop_name: str) -> None:
    with House(loop_name, bare=True) as house:
        fillers = []
        while True:
            filler = socket.socket(socket.AF_UNIX)
            filler.settimeout(0)
            fillers.append(filler)
            if filler.connect_ex(house.inner):
                break
        with house.connect(PREFACE + EMPTY_SETTINGS) as client:
            eventually(lambda: house.door.connections == 1)
            for filler in fillers[:-1]:
                house.bare.accept()[0].close()
                filler.close()
            fillers[-1].close()
            inner, _ = house.bare.accept()
            with inner:
                inner.settimeout(10)
                assert inner.recv(100) == PREFACE + EMPTY_SETTINGS
                inner.sendall(b"hello")
                assert client.recv(100) == b"hello"


def test_a_backlog_that_stays_full_ends_the_connection(loop_name: str) -> None:
    limits = DoorLimits(first_bytes_s=0.3)
    with House(loop_name, limits=limits, bare=True) as house, contextlib.ExitStack() as fillers:
        while True:
            filler = fillers.enter_context(socket.socket(socket.AF_UNIX))
            filler.settimeout(0)
            if filler.connect_ex(house.inner):
                break
        with house.connect(PREFACE) as client:
            assert client.recv(1) == b""


def test_without_a_server_behind_it_the_connection_ends(house: House) -> None:
    os.unlink(house.inner)
    with house.connect(PREFACE + EMPTY_SETTINGS) as client:
        assert client.recv(1) == b""


def joined(house: House) -> tuple[socket.socket, socket.socket]:
    """A client, and the server's end of its hop."""
    client = house.connect(PREFACE)
    inner, _ = house.bare.accept()
    inner.settimeout(10)
    assert inner.recv(len(PREFACE), socket.MSG_WAITALL) == PREFACE
    return client, inner


def test_a_half_close_goes_through_and_the_other_way_stays_open(loop_name: str) -> None:
    with House(loop_name, bare=True) as house:
        client, inner = joined(house)
        with client, inner:
            client.sendall(b"last words")
            client.shutdown(socket.SHUT_WR)
            assert inner.recv(100) == b"last words"
            assert inner.recv(1) == b""
            inner.sendall(b"heard")
            assert client.recv(100) == b"heard"
            inner.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
            eventually(lambda: house.door.connections == 0)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_slow_reader_slows_the_writer_down_and_the_door_holds_next_to_nothing(loop_name: str, direction: str) -> None:
    """64 MiB are on their way; without back-pressure the door would hold them."""
    with House(loop_name, bare=True) as house:
        client, inner = joined(house)
        writer, reader = (client, inner) if direction == "up" else (inner, client)
        with client, inner:
            writer.settimeout(0.3)
            chunk = os.urandom(1 << 16)
            sent, total = hashlib.sha256(), 0
            while total < 64 << 20:
                try:
                    count = writer.send(chunk)
                except TimeoutError:
                    break
                sent.update(chunk[:count])
                total += count
            assert 0 < total < 2 << 20, "two socket buffers and one of ours"
            writer.shutdown(socket.SHUT_WR)
            got = hashlib.sha256()
            while data := reader.recv(1 << 16):
                got.update(data)
            assert got.digest() == sent.digest()


# -- the end of a process ---------------------------------------------------------------------------------------------


def test_killing_the_client_ends_its_stream_at_the_server(house: House) -> None:
    child = python(
        """
        import grpc
        channel = grpc.insecure_channel("unix:" + sys.argv[1])
        for message in channel.unary_stream("/test/Forever")(b""):
            print(message.decode(), flush=True)
        """,
        house.public,
    )
    assert line_of(child) == "begun"
    child.send_signal(signal.SIGKILL)
    end(child)
    assert house.service.ended.wait(5)
    eventually(lambda: house.door.connections == 0)


@pytest.mark.parametrize("first", [b"", PREFACE + EMPTY_SETTINGS], ids=["waiting", "joined"])
def test_the_connection_ends_with_its_process_although_another_one_holds_the_socket(house: House, first: bytes) -> None:
    child = python(
        """
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(sys.argv[1])
        sock.sendall(bytes.fromhex(sys.argv[2]))
        ready, go = os.pipe()
        if os.fork() == 0:
            print("inherited", flush=True)
            os.write(go, b"!")
            try:
                while sock.recv(1000): pass
            except OSError: pass
            print("closed", flush=True)
            os._exit(0)
        os.read(ready, 1)
        sys.stdin.readline()
        """,
        house.public,
        first.hex(),
    )
    assert line_of(child) == "inherited"
    eventually(lambda: house.door.connections == 1)
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    assert line_of(child) == "closed"
    child.communicate(timeout=10)
    eventually(lambda: house.door.connections == 0)


# -- what is not gRPC -------------------------------------------------------------------------------------------------


def http_client(path: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(10)
    connection.sock.connect(path)
    return connection


@pytest.mark.parametrize("body", [None, b"x" * 200_000], ids=["get", "post"])
def test_http_gets_an_answer_that_says_what_is_spoken_here(house: House, body: bytes | None) -> None:
    """The body is never read by the door's HTTP, and still its sender reads the answer and no reset."""
    connection = http_client(house.public)
    connection.request("POST" if body else "GET", "/credentials/demo", body=body)
    answer = connection.getresponse()
    assert answer.status == 501
    text = answer.read().decode()
    assert "gRPC" in text
    assert "tokenward.v1.CredentialService" in text
    assert text.count("\n") == 1
    connection.close()
    eventually(lambda: house.door.connections == 0)


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01" + os.urandom(5000), b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000, b"431"),
        (b"HEAD / HTTP/1.1\r\n\r\n", b"501"),
    ],
    ids=["tls", "not-quite-http2", "endless-head", "head"],
)
def test_every_other_beginning_gets_its_answer_and_a_clean_end(house: House, first: bytes, status: bytes) -> None:
    with house.connect(first) as client:
        answer = b""
        while data := client.recv(10_000):
            answer += data
    assert answer.startswith(b"HTTP/1.1 " + status)


def test_a_request_in_pieces_is_read_to_the_end_of_its_head(house: House) -> None:
    with house.connect() as client:
        for piece in (b"GE", b"T /x HTT", b"P/1.1\r\nHost: a\r", b"\n\r", b"\n"):
            client.sendall(piece)
            house.run(asyncio.sleep(0.01))
        assert client.recv(10_000).startswith(b"HTTP/1.1 501 ")


def test_half_a_beginning_and_no_more_gets_a_400(house: House) -> None:
    with house.connect(PREFACE[:10]) as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(10_000).startswith(b"HTTP/1.1 400 ")


def test_a_preface_in_pieces_is_grpc(house: House) -> None:
    with house.connect() as client:
        for at in range(len(PREFACE)):
            client.sendall(PREFACE[at : at + 1])
            house.run(asyncio.sleep(0))
        client.sendall(EMPTY_SETTINGS)
        frame = client.recv(9, socket.MSG_WAITALL)
        assert frame[3] == 4, "the server's SETTINGS"


@pytest.mark.parametrize("first", [b"", PREFACE[:14], b"GET / HTTP/1.1\r\n"], ids=["nothing", "preface", "http"])
def test_who_does_not_say_what_it_speaks_is_closed_in_time(loop_name: str, first: bytes) -> None:
    with House(loop_name, limits=DoorLimits(first_bytes_s=0.3)) as house, house.connect(first) as client:
        began = time.monotonic()
        assert client.recv(1) == b""
        assert 0.2 < time.monotonic() - began < 5


def test_a_refused_client_that_never_leaves_is_closed_in_time(loop_name: str) -> None:
    with House(loop_name, limits=DoorLimits(first_bytes_s=0.3)) as house, house.connect(b"\0") as client:
        assert client.recv(10_000)
        eventually(lambda: house.door.connections == 0)


# -- limits -----------------------------------------------------------------------------------------------------------

HOLD = """
    held, path, first = [], sys.argv[1], bytes.fromhex(sys.argv[3])
    for _ in range(int(sys.argv[2])):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        try: sock.sendall(first)
        except OSError: pass
        held.append(sock)
    print(len(held), flush=True)
    sys.stdin.readline()
"""
FLOOD = """
    path, held = sys.argv[1], collections.deque()
    print("begun", flush=True)
    for first in itertools.cycle([b"", b"PRI * HT", b"\\0garbage", b"GET /", b"GET / HTTP/1.1\\r\\n\\r\\n"]):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            sock.sendall(first)
        except OSError:
            pass
        held.append(sock)
        if len(held) > 500: held.popleft().close()
"""


def test_ten_thousand_idle_connections_do_not_stop_a_caller_of_the_same_user(loop_name: str) -> None:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(10_000, descriptors - 100)
    limits = dataclasses.replace(DoorLimits.within(descriptors), first_bytes_s=NEVER_S)
    with House(loop_name, limits=limits) as house:
        child = python(HOLD, house.public, str(many), PREFACE[:14].hex())
        assert line_of(child) == str(many)
        for _ in range(10):  # patiently: the kernel's backlog may still be full of the last ones
            assert house.who(patiently=True)["pid"] == os.getpid()
        assert house.door.connections <= limits.max_connections_per_uid
        end(child)
        eventually(lambda: house.door.connections == 0)


def test_a_flood_of_garbage_does_not_stop_a_caller_of_the_same_user(loop_name: str) -> None:
    """As fast as two processes can: the kernel's backlog is full, so a non-blocking connect has to be tried again.

    Once it is in, nothing that the others send may end it.
    """
    limits = DoorLimits(max_connections=120, max_connections_per_uid=60)
    with House(loop_name, limits=limits) as house:
        children = [python(FLOOD, house.public) for _ in range(2)]
        assert [line_of(child) for child in children] == ["begun", "begun"]
        for _ in range(5):
            assert house.who(patiently=True)["pid"] == os.getpid()
        assert house.door.connections <= limits.max_connections_per_uid
        for child in children:
            end(child)


@pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user can only be started by root")
def test_whole_prefaces_of_one_user_leave_room_for_others(loop_name: str) -> None:
    """These cannot be told from callers, so only their own user's share is gone."""
    limits = DoorLimits(max_connections=40, max_connections_per_uid=20, first_bytes_s=NEVER_S)
    with House(loop_name, limits=limits) as house:
        child = python(HOLD, house.public, "300", (PREFACE + EMPTY_SETTINGS).hex(), user=4242)
        assert line_of(child) == "300"
        eventually(lambda: house.door.connections == 20)
        assert house.who()["uid"] == 0
        end(child)


@pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user can only be started by root")
def test_when_all_places_are_taken_a_users_own_waiting_connection_goes_first(loop_name: str) -> None:
    limits = DoorLimits(max_connections=10, max_connections_per_uid=8, first_bytes_s=NEVER_S)
    with House(loop_name, limits=limits) as house, contextlib.ExitStack() as clients:
        child = python(HOLD, house.public, "7", "", user=4242)
        assert line_of(child) == "7"
        ours = [clients.enter_context(house.connect()) for _ in range(3)]
        eventually(lambda: house.door.connections == 10)
        clients.enter_context(house.connect())
        assert ours[0].recv(1) == b"", "our own oldest, not the older ones of the other user"
        end(child)


@pytest.mark.parametrize("limits", [(20, 1000), (1000, 20)], ids=["in-all", "per-uid"])
def test_the_newest_silent_connections_stay_and_the_oldest_make_room(loop_name: str, limits: tuple[int, int]) -> None:
    door_limits = DoorLimits(max_connections=limits[0], max_connections_per_uid=limits[1], first_bytes_s=NEVER_S)
    with House(loop_name, limits=door_limits) as house, contextlib.ExitStack() as clients:
        made = [clients.enter_context(house.connect()) for _ in range(30)]
        for sent_away in made[:10]:
            assert sent_away.recv(1) == b""
        assert house.door.connections == 20
        for kept in made[10:]:
            kept.sendall(b"\0")
            assert kept.recv(10_000).startswith(b"HTTP/1.1 400 ")


def test_who_has_said_what_it_speaks_is_never_sent_away(loop_name: str) -> None:
    limits = DoorLimits(max_connections=2, max_connections_per_uid=2, first_bytes_s=NEVER_S)
    with House(loop_name, limits=limits) as house, house.channel() as first, house.channel() as second:
        before = [channel.unary_unary("/test/Who")(b"", timeout=10) for channel in (first, second)]
        with house.connect() as third, contextlib.suppress(ConnectionResetError):
            assert third.recv(1) == b"", "there is no place, and nobody who could make one"
        after = [channel.unary_unary("/test/Who")(b"", timeout=10) for channel in (first, second)]
        assert after == before, "still the same connections, by name"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_out_of_descriptors_the_door_pauses_and_recovers(loop_name: str) -> None:
    limits = DoorLimits(max_connections=1000, max_connections_per_uid=1000, first_bytes_s=NEVER_S)
    with House(loop_name, limits=limits) as house:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        child = python("sys.stdin.readline()" + textwrap.dedent(HOLD), house.public, "100", "")
        assert child.stdin is not None
        descriptors = list(map(int, os.listdir("/proc/self/fd")))
        left = max(descriptors) + 20
        left += (left - len(descriptors) + 1) % 2  # an even number: accept fails, and not the pidfd after it
        resource.setrlimit(resource.RLIMIT_NOFILE, (left, before[1]))
        try:
            child.stdin.write("\n")
            child.stdin.flush()
            assert line_of(child) == "100"
            busy = time.process_time()
            house.run(asyncio.sleep(0.5))
            assert time.process_time() - busy < 0.25, "it spins"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert house.who()["pid"] == os.getpid()
        end(child)


def test_limits_follow_the_number_of_descriptors() -> None:
    for descriptors in (-1, 1024, 20_000, 1 << 20):
        limits = DoorLimits.within(descriptors)
        assert limits.max_connections_per_uid < limits.max_connections
        assert descriptors < 0 or limits.max_connections * 4 < descriptors
    assert DoorLimits.within(1024) == DoorLimits()
    assert DoorLimits.within(10).max_connections > 0


# -- descriptors, and the end -----------------------------------------------------------------------------------------


def test_no_descriptor_is_left_over_from_any_kind_of_connection(loop_name: str) -> None:
    with House(loop_name, limits=DoorLimits(first_bytes_s=0.2)) as house:
        house.who()
        eventually(lambda: house.door.connections == 0)
        house.run(asyncio.sleep(0.1))
        before = open_descriptors()
        for _ in range(30):
            for first in (b"", b"\0", PREFACE[:9], b"GET / HTTP/1.1\r\n\r\n", PREFACE, PREFACE + b"garbage" * 10):
                house.connect(first).close()
            with house.connect(PREFACE + EMPTY_SETTINGS) as client:
                client.recv(1)
            house.who()
        silent = [house.connect() for _ in range(30)]  # closed by the clock
        children = [python(HOLD, house.public, "20", (PREFACE + EMPTY_SETTINGS).hex()) for _ in range(2)]
        for child in children:
            line_of(child)
            end(child)
        for sock in silent:
            assert sock.recv(1) == b""
            sock.close()
        eventually(lambda: house.door.connections == 0)
        eventually(lambda: open_descriptors() <= before)


async def both(first: Awaitable[object], second: Awaitable[object]) -> None:
    await asyncio.gather(first, second)


def test_a_drain_with_the_server_ends_calls_properly(house: House) -> None:
    with house.channel() as channel:
        stream = channel.unary_stream("/test/Forever")(b"", timeout=20)
        assert next(stream) == b"begun"
        waiting = house.connect()
        began = time.monotonic()
        house.run(both(house.server.stop(0.2), house.door.drain(10)))
        assert time.monotonic() - began < 5, "it ended with the server, not with the deadline"
        assert house.door.connections == 0
        assert waiting.recv(1) == b""
        waiting.close()
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_a_drain_closes_what_is_left_at_its_deadline_and_nobody_comes_in_any_more(house: House) -> None:
    with house.channel() as channel:
        stream = channel.unary_stream("/test/Forever")(b"", timeout=20)
        assert next(stream) == b"begun"
        house.run(house.door.drain(0.2))
        assert house.door.connections == 0
        with pytest.raises(grpc.RpcError):
            next(stream)
        with house.connect(PREFACE) as late:
            late.settimeout(0.3)
            with pytest.raises(TimeoutError):
                late.recv(1)


def test_many_callers_at_once_each_get_their_own_answers(house: House) -> None:
    def talk(at: int) -> bool:
        with house.channel() as channel:
            echo = channel.unary_unary("/test/Echo")
            return all(echo(f"{at}:{n}".encode(), timeout=30) == f"{at}:{n}".encode() for n in range(20))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(talk, range(48)))
