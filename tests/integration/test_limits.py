"""What one user's callers can take, shown on the real services behind a real front door; only the vault is a fake.

Time decides nothing here: a limit that is to be met is one that is met at once, and what is to be closed is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import pytest
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.fakes.agent import wait_for
from tests.fakes.issuers import FakeIssuers
from tests.making import kv_grant, workload
from tests.threads import InThread
from tokenward.attest.attestor import Attestor
from tokenward.auditlog import AuditLog
from tokenward.broker import Broker
from tokenward.client import Client
from tokenward.clock import SystemClock
from tokenward.config import Limits
from tokenward.core.model import Policy
from tokenward.core.store import Store
from tokenward.errors import Reason, UnavailableError
from tokenward.presence import Presence
from tokenward.revoker import Revoker
from tokenward.serve.credentials import CredentialService, IdentityService
from tokenward.serve.first_bytes import PREFACE
from tokenward.serve.front_door import FrontDoor
from tokenward.serve.limits import Guarded, Room, Turnstile, door_limits, server_options
from tokenward.serve.listener import bind
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc
from tokenward.watchers import Watchers

T = TypeVar("T")
NEVER = 1 / 3600
"""A rate at which only the first one passes."""
OTHER_UID = 4242
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user can only be started by root")


class House(InThread):
    """An agent in a thread of this process, for us and for uid 4242: each has the credentials `api`, `cold`, `paced`.

    `paced` may be asked for at the rate `NEVER`.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(uvloop.new_event_loop)
        self.limits = limits

    @property
    def path(self) -> str:
        return f"{self.directory}/workload.sock"

    async def main(self) -> None:
        clock, self.issuers, watchers, store = (
            SystemClock(),
            FakeIssuers(lifetime_s=3600),
            Watchers(),
            Store(margin_s=6),
        )
        paced = kv_grant("paced", policy=Policy(rate=NEVER))
        grants = {"api": kv_grant(), "cold": kv_grant("cold"), "paced": paced}
        workloads = {
            "app": workload("app", f"unix:uid:{os.geteuid()}", grants=grants),
            "other": workload("other", f"unix:uid:{OTHER_UID}", grants=grants),
        }
        audit = AuditLog(path=f"{self.directory}/audit.jsonl", clock=clock)
        audit.open()
        revoker = Revoker(revoke=self.issuers.revoke, audit=audit, clock=clock)
        broker = Broker(
            workloads=workloads,
            store=store,
            issuers=self.issuers,
            revoker=revoker,
            watchers=watchers,
            audit=audit,
            clock=clock,
        )
        presence = Presence(linger_s=3600, on_gone=broker.let_go)
        room = Room.of(self.limits, places=100)
        inner, listener = f"{self.directory}/inner.sock", bind(self.path)
        self.door = FrontDoor(
            listener=listener.socket,
            inner_path=inner,
            attestor=Attestor(workloads=workloads.values()),
            limits=door_limits(self.limits, room),
        )
        self.turnstile = Turnstile(room=room, rate=self.limits.request_rate)
        server = grpc.aio.server(options=server_options(self.limits))
        credentials = CredentialService(
            door=self.door,
            broker=broker,
            watchers=watchers,
            presence=presence,
            turnstile=self.turnstile,
            audit=audit,
            clock=clock,
        )
        rpc.add_CredentialServiceServicer_to_server(credentials, server)
        identity = IdentityService(door=self.door, turnstile=self.turnstile, audit=audit, clock=clock)
        rpc.add_IdentityServiceServicer_to_server(identity, server)
        guarded = Guarded(server, door=self.door, turnstile=self.turnstile, clock=clock)
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), guarded)  # type: ignore[attr-defined]
        server.add_insecure_port(f"unix:{inner}")
        await server.start()
        serving = asyncio.create_task(self.door.serve())
        await self.serve()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await server.stop(0)
        presence.close()
        await broker.close()
        listener.close()
        audit.close()
        assert (self.turnstile.requests, self.turnstile.streams) == (0, 0), "whoever came in has left"

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"unix:{self.path}", options=[("grpc.use_local_subchannel_pool", 1)])

    def connect(self, first: bytes = b"") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(self.path)
        sock.sendall(first)
        return sock

    def records(self) -> list[dict[str, Any]]:
        lines = Path(f"{self.directory}/audit.jsonl").read_text().splitlines()
        return [json.loads(line)["record"] for line in lines]


@contextlib.contextmanager
def house(**limits: Any) -> Iterator[House]:
    with House(Limits(**limits)) as made:
        yield made


def get(channel: grpc.Channel, name: str = "api") -> pb.Credential:
    return rpc.CredentialServiceStub(channel).GetCredential(pb.GetCredentialRequest(name=name), timeout=20).credential


def watch(channel: grpc.Channel) -> Any:
    return rpc.CredentialServiceStub(channel).WatchCredentials(pb.WatchCredentialsRequest(names=["api"]))


def refused(call: Callable[[], object]) -> grpc.StatusCode:
    """The status of `call`, which must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


LIMITED = grpc.StatusCode.RESOURCE_EXHAUSTED

_PEACEFUL = """
    import grpc._channel, grpc._observability
    from tokenward.v1 import credentials_pb2 as pb
    from tokenward.v1 import credentials_pb2_grpc as rpc
    os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})
    errors = []
    with grpc.insecure_channel("unix:" + sys.argv[1]) as channel:
        stub = rpc.CredentialServiceStub(channel)
        stream = stub.WatchCredentials(pb.WatchCredentialsRequest(names=["api"]))
        next(stream)
        for _ in range(int(sys.argv[2])):
            try: stub.GetCredential(pb.GetCredentialRequest(name="api"), timeout=20, wait_for_ready=True)
            except grpc.RpcError as error: errors.append(error.details())
        errors += [] if stream.is_active() else ["its watch ended"]
    print(json.dumps(errors), flush=True)
"""


def another_user(house: House, gets: int = 100) -> list[str]:
    """What went wrong for a well-behaved process of another user: one watch, and one get after the other."""
    program = textwrap.dedent(_PEACEFUL.format(uid=OTHER_UID))
    done = subprocess.run(
        [sys.executable, "-c", f"import json, os, sys\n{program}", house.path, str(gets)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return cast("list[str]", json.loads(done.stdout))


# -- HTTP/2 by hand ---------------------------------------------------------------------------------------------------

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 2, 3, 4, 6, 7
OPENING = PREFACE + b"\0\0\0\4\0\0\0\0\0"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def request(stream: int, method: str) -> bytes:
    """A request with an empty message; nothing of its head depends on one before."""
    head = {":method": "POST", ":scheme": "http", ":path": f"/{method}", ":authority": "localhost"}
    fields = {**head, "te": "trailers", "content-type": "application/grpc"}
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    return frame(HEADERS, 4, stream, block) + frame(DATA, 1, stream, bytes(5))


def frames_of(sock: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Kind, stream and payload of each frame, until the far end closes."""
    with sock.makefile("rb") as file, contextlib.suppress(ConnectionResetError):
        while len(head := file.read(9)) == 9:
            yield head[3], struct.unpack(">I", head[5:])[0], file.read(int.from_bytes(head[:3], "big"))


WATCH = "tokenward.v1.CredentialService/WatchCredentials"

# -- requests ---------------------------------------------------------------------------------------------------------


@needs_root
def test_beyond_its_rate_a_user_is_told_when_to_come_back_and_others_are_served() -> None:
    with house(request_rate=NEVER) as agent, Client(agent.path) as client:
        client.get("api")
        with pytest.raises(UnavailableError) as caught:
            client.get("api")
        assert caught.value.reason is Reason.RATE_LIMITED
        assert caught.value.retry_after_s is not None
        assert 3000 < caught.value.retry_after_s <= 3600
        with agent.channel() as channel:
            assert refused(lambda: get(channel)) is LIMITED, "on another connection as well"
        assert another_user(agent, gets=0) == []


def test_refusals_by_rate_do_not_fill_the_audit_log_and_none_is_forgotten() -> None:
    many = 100
    with house(requests_per_uid=1) as agent, agent.channel() as channel:
        agent.loop.call_soon_threadsafe(agent.issuers.hold)
        stub = rpc.CredentialServiceStub(channel)
        waiting = stub.GetCredential.future(pb.GetCredentialRequest(name="cold"), timeout=20)
        wait_for(lambda: agent.turnstile.requests == 1)
        assert {refused(lambda: get(channel)) for _ in range(many)} == {LIMITED}
        agent.loop.call_soon_threadsafe(agent.issuers.release)
        waiting.result()
        gets = [record for record in agent.records() if record["event"] == "get"]
        written = [record for record in gets if record.get("outcome") == Reason.RATE_LIMITED]
        assert 1 <= len(written) < many / 2
        assert written[0]["peer"]["uid"] == os.geteuid()
        assert gets[-1] not in written, "the one that was served"
        counted = sum(int(record.get("detail", "0").partition(" ")[0]) for record in gets)
        assert counted + len(written) == many


@needs_root
def test_a_policys_rate_is_of_one_workload_and_one_credential() -> None:
    with house() as agent, agent.channel() as channel:
        assert get(channel, "paced").version == 1
        assert refused(lambda: get(channel, "paced")) is LIMITED
        with agent.channel() as another:
            assert refused(lambda: get(another, "paced")) is LIMITED, "over all connections"
        assert get(channel).version == 1, "another credential"
        report = pb.ReportRejectedRequest(name="paced", version=1)
        assert refused(lambda: rpc.CredentialServiceStub(channel).ReportRejected(report)) is LIMITED
        every: Any = rpc.CredentialServiceStub(channel).WatchCredentials(pb.WatchCredentialsRequest())
        assert refused(lambda: next(every)) is LIMITED
        for _ in range(3):
            acknowledged = pb.AcknowledgeVersionRequest(name="paced", version=1)
            assert rpc.CredentialServiceStub(channel).AcknowledgeVersion(acknowledged) is not None
        written = [record for record in agent.records() if record.get("outcome") == Reason.RATE_LIMITED]
        assert written[0]["workload"] == "app"
        assert another_user(agent, gets=1) == []


def test_requests_in_progress_have_a_limit() -> None:
    with house(requests_per_uid=2) as agent, agent.channel() as channel:
        agent.loop.call_soon_threadsafe(agent.issuers.hold)
        stub = rpc.CredentialServiceStub(channel)
        waiting = [stub.GetCredential.future(pb.GetCredentialRequest(name="cold"), timeout=20) for _ in range(2)]
        wait_for(lambda: agent.turnstile.requests == 2)
        assert refused(lambda: get(channel)) is LIMITED
        agent.loop.call_soon_threadsafe(agent.issuers.release)
        assert [each.result().credential.version for each in waiting] == [1, 1]
        assert get(channel).version == 1


def test_a_request_that_its_caller_gives_up_leaves_its_place() -> None:
    with house(requests_per_uid=1) as agent, agent.channel() as channel:
        agent.loop.call_soon_threadsafe(agent.issuers.hold)
        stub = rpc.CredentialServiceStub(channel)
        given_up: Any = stub.GetCredential.future(pb.GetCredentialRequest(name="cold"))
        wait_for(lambda: agent.turnstile.requests == 1)
        given_up.cancel()
        wait_for(lambda: agent.turnstile.requests == 0)
        agent.loop.call_soon_threadsafe(agent.issuers.release)
        assert get(channel).version == 1


def test_health_is_behind_the_same_turnstile() -> None:
    with house(request_rate=NEVER) as agent, agent.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status
        assert refused(lambda: stub.Check(health_pb2.HealthCheckRequest())) is LIMITED


# -- streams ----------------------------------------------------------------------------------------------------------


@needs_root
def test_watches_of_one_user_have_a_limit() -> None:
    with house(streams_per_uid=2) as agent, agent.channel() as channel:
        open_ones = [watch(channel) for _ in range(2)]
        for stream in open_ones:
            next(stream)
        assert refused(lambda: next(watch(channel))) is LIMITED
        checks = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert refused(lambda: next(checks)) is LIMITED, "a stream is a stream"
        assert get(channel).version == 1, "streams take no place of requests"
        assert another_user(agent, gets=1) == []
        open_ones[0].cancel()
        wait_for(lambda: agent.turnstile.streams == 1)
        assert next(watch(channel)).states


def test_one_connection_has_a_hundred_requests_open_and_the_next_ones_are_refused() -> None:
    with house(connections=300) as agent, agent.connect(OPENING) as sock:
        sock.sendall(b"".join(request(1 + 2 * at, WATCH) for at in range(120)))
        over = Counter(stream for kind, stream, payload in _until_refused(sock, 20))
        assert len(over) == 20
        assert agent.turnstile.streams <= 100


def _until_refused(sock: socket.socket, count: int) -> Iterator[tuple[int, int, bytes]]:
    seen = 0
    for kind, stream, payload in frames_of(sock):
        if kind == SETTINGS and payload:
            told = dict(struct.iter_unpack(">HI", payload))
            assert told[3] == 100, "SETTINGS_MAX_CONCURRENT_STREAMS"
        if kind == RST_STREAM:
            seen += 1
            yield kind, stream, payload
            if seen == count:
                return


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_message_that_is_too_large_is_refused_before_anybody_reads_it() -> None:
    with house() as agent, agent.channel() as channel:
        assert refused(lambda: get(channel, "x" * (64 << 10))) is LIMITED
        assert refused(lambda: get(channel, "x" * (60 << 10))) is grpc.StatusCode.PERMISSION_DENIED
        assert len([record for record in agent.records() if record["event"] == "get"]) == 1


def test_metadata_that_is_too_large_is_refused_before_anybody_reads_it() -> None:
    with house() as agent, agent.channel() as channel:
        stub = rpc.CredentialServiceStub(channel)

        def with_metadata(size: int) -> pb.GetCredentialResponse:
            return stub.GetCredential(pb.GetCredentialRequest(name="api"), metadata=(("x", "y" * size),))

        assert with_metadata(6 << 10).credential.version == 1
        assert refused(lambda: with_metadata(8 << 10)) is LIMITED
        assert refused(lambda: with_metadata(100 << 10)) is LIMITED
        assert len([record for record in agent.records() if record["event"] == "get"]) == 1


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_connection_that_is_not_used_ends_and_a_quiet_watch_does_not() -> None:
    with house(idle_s=0.5) as agent, agent.channel() as channel:
        stream = watch(channel)
        next(stream)
        with agent.connect(OPENING) as unused:
            kinds = [kind for kind, _, _ in frames_of(unused)]
            assert GOAWAY in kinds
        with agent.channel() as once:
            get(once)
            wait_for(lambda: agent.door.connections == 1)
        assert stream.is_active(), "it has been quiet for longer than both"
        assert get(channel).version == 1


def test_a_connection_that_says_nothing_after_the_preface_ends() -> None:
    with house(preface_s=0.3) as agent, agent.connect(PREFACE) as sock:
        assert list(frames_of(sock)) is not None
        wait_for(lambda: agent.door.connections == 0)


def test_a_flood_of_pings_ends_its_connection() -> None:
    with house() as agent, agent.connect(OPENING) as sock:
        with contextlib.suppress(BrokenPipeError):
            for _ in range(1000):
                sock.sendall(frame(PING, 0, 0, bytes(8)))
        assert b"too_many_pings" in b"".join(payload for kind, _, payload in frames_of(sock) if kind == GOAWAY)


# -- connections ------------------------------------------------------------------------------------------------------


@needs_root
def test_beyond_its_rate_of_connections_a_user_is_closed_at_once_and_others_come_in() -> None:
    with house(accept_rate=NEVER, connections_per_uid=3, preface_s=600.0) as agent:
        for _ in range(3):
            with agent.connect(b"\0") as sock:
                assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(20)
                sock.connect(agent.path)
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(100) == b""
        wait_for(lambda: agent.door.connections == 0)
        assert another_user(agent, gets=1) == []


@needs_root
def test_who_sends_faster_than_its_rate_is_read_later_and_others_at_once() -> None:
    with house(request_rate=1.0) as agent, agent.channel() as channel:
        stream = watch(channel)
        next(stream)
        with agent.connect(OPENING) as sock:
            sock.settimeout(0.5)
            until, sent = time.monotonic() + 2, 0
            with contextlib.suppress(TimeoutError):
                while time.monotonic() < until:
                    sent += sock.send(frame(PRIORITY, 0, 1, bytes(5)) * 1000)
            assert sent < 1 << 20, "the kernel's buffers are full, since nobody reads as fast"
            assert another_user(agent, gets=1) == []
        wait_for(lambda: agent.door.connections == 1)
        assert stream.is_active()


@needs_root
def test_one_user_at_all_its_limits_is_nothing_to_another() -> None:
    """Which makes 100 requests, more than one user's rate, and gets an answer to each."""
    limits: dict[str, Any] = {"request_rate": 60.0, "accept_rate": 5.0, "connections": 20, "streams_per_uid": 5}
    with house(**limits) as agent, contextlib.ExitStack() as ending:
        over = threading.Event()
        codes: Counter[grpc.StatusCode | None] = Counter()

        def flood() -> None:
            with agent.channel() as channel:
                streams = [watch(channel) for _ in range(10)]
                while not over.is_set():
                    try:
                        get(channel)
                    except grpc.RpcError as error:
                        codes[error.code()] += 1
                for stream in streams:
                    stream.cancel()

        flooders = [threading.Thread(target=flood) for _ in range(12)]
        for flooder in flooders:
            flooder.start()
        for flooder in flooders:
            ending.callback(flooder.join, 30)
        ending.callback(over.set)
        wait_for(lambda: codes[LIMITED] > 20, timeout_s=20)
        assert another_user(agent) == []
