"""`tokenward health`: well is said of an agent's own answer only, and everything else has its reason."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health as servicer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.agents import TOKENWARD
from tokenward import health
from tokenward.client import address
from tokenward.errors import InvalidRequestError, UnavailableError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tw-") as directory:
        yield f"{directory}/s"


@pytest.fixture
async def server(path: str) -> AsyncIterator[grpc.aio.Server]:
    made = grpc.aio.server()
    made.add_insecure_port(f"unix:{path}")
    yield made
    await made.stop(None)


async def asked(path: str, *, live: bool = False) -> str:
    """Why the agent at `path` is not well; nothing when it is."""
    try:
        await asyncio.to_thread(health.verify, path, is_live_enough=live, timeout_s=10.0)
    except UnavailableError as error:
        return error.public
    return ""


class TestAgainstGrpc:
    """The frames made by hand, as gRPC's own server takes them."""

    async def test_an_agent_is_well_when_it_says_that_it_serves(self, path: str, server: grpc.aio.Server) -> None:
        service = servicer.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        await server.start()
        await service.set("", SERVING)
        assert (await asked(path), await asked(f"unix:{path}"), await asked(path, live=True)) == ("", "", "")

    async def test_one_that_is_not_ready_is_alive(self, path: str, server: grpc.aio.Server) -> None:
        """Killing an agent because its vault is away would lose what it still serves."""
        service = servicer.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        await server.start()
        await service.set("", NOT_SERVING)
        assert "not ready" in await asked(path)
        assert await asked(path, live=True) == ""

    async def test_a_server_without_the_service_is_not_well(self, path: str, server: grpc.aio.Server) -> None:
        await server.start()
        assert "does not say that it serves" in await asked(path)


class Listener:
    """Accepts one connection in a thread and lets `behave` have it."""

    def __init__(self, path: str, behave: Callable[[socket.socket], None]) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen()
        self._behave = behave
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        connection, _ = self._listening.accept()
        with connection:
            self._behave(connection)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listening.close()


def until_closed(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def says(data: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            until_closed(connection)
        except OSError:
            pass  # it had enough

    return behave


def frame(kind: int, flags: int, content: bytes = b"", *, length: int | None = None) -> bytes:
    count = len(content) if length is None else length
    return count.to_bytes(3, "big") + bytes((kind, flags)) + (1).to_bytes(4, "big") + content


class TestOthers:
    """Nothing but a whole answer counts, for readiness and for life alike."""

    @pytest.mark.parametrize("live", [False, True])
    def test_a_socket_that_only_accepts_is_a_stuck_agent(self, path: str, live: bool) -> None:
        with (
            Listener(path, until_closed),
            pytest.raises(UnavailableError, match=r"did not answer within 0\.2 s"),
        ):
            health.verify(path, is_live_enough=live, timeout_s=0.2)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (b"", "closed the connection"),
            (b"HTTP/1.1 501 Not Implemented\r\n\r\n", "is no agent"),
            (frame(4, 0) + frame(0, 0, b"\0\0\0\0\2\x08\x01"), "closed the connection"),
            (frame(4, 0) + frame(3, 0, bytes(4)), "ended the call"),
            (frame(7, 0, bytes(8)), "ended the call"),
            (frame(0, 0, bytes(1 << 15)) * 4, "is no agent"),
            (frame(0, 0, length=1 << 23), "is no agent"),
        ],
        ids=["nothing", "HTTP/1.1", "half an answer", "reset", "goaway", "without an end", "too long"],
    )
    @pytest.mark.parametrize("live", [False, True])
    def test_what_is_not_an_answer(self, path: str, answer: bytes, reason: str, live: bool) -> None:
        with Listener(path, says(answer)), pytest.raises(UnavailableError, match=reason):
            health.verify(path, is_live_enough=live, timeout_s=10.0)

    def test_an_answer_in_the_agents_frames(self, path: str) -> None:
        answer = frame(4, 0) + frame(6, 0, bytes(8)) + frame(1, 4, b"\x88") + frame(0, 0, b"\0\0\0\0\2\x08\x01")
        with Listener(path, says(answer + frame(1, 5, b"\x88"))):
            health.verify(path, timeout_s=10.0)

    def test_no_socket(self, path: str) -> None:
        with pytest.raises(UnavailableError, match="No such file"):
            health.verify(path)

    @pytest.mark.parametrize("wrong", ["", "unix:", "tcp://127.0.0.1:1", "a\0b"])
    def test_what_cannot_be_a_path(self, wrong: str) -> None:
        with pytest.raises(InvalidRequestError, match="must be a path"):
            health.verify(wrong)


def test_the_socket_is_chosen_as_clients_choose_it(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    assert (health.SYSTEM_SOCKET, health.VARIABLE) == (address.SYSTEM_SOCKET, address.VARIABLE)
    monkeypatch.setenv(health.VARIABLE, path)
    with pytest.raises(UnavailableError, match=path):
        health.verify()
    with pytest.raises(UnavailableError, match="/elsewhere"):
        health.verify("/elsewhere")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [TOKENWARD, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env={**os.environ, **environment}
    )


class TestCommand:
    @pytest.mark.parametrize("arguments", [["health", "--socket", "PATH"], ["--socket", "PATH", "health", "--live"]])
    def test_no_agent_is_exit_code_one_with_the_reason(self, path: str, arguments: list[str]) -> None:
        said = run(*(path if each == "PATH" else each for each in arguments))
        assert (said.returncode, said.stdout) == (1, "")
        assert path in said.stderr

    async def test_a_ready_agent_is_exit_code_zero(self, path: str, server: grpc.aio.Server) -> None:
        service = servicer.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        await server.start()
        await service.set("", SERVING)
        said = await asyncio.to_thread(run, "health", TOKENWARD_SOCKET=path)
        assert (said.returncode, said.stdout, said.stderr) == (0, "", "")

    def test_a_probe_loads_nothing_heavy(self, path: str) -> None:
        """It runs within the agent's memory limit."""
        program = "import json, sys, tokenward.cli, tokenward.health; print(json.dumps(list(sys.modules)))"
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert not {"grpc", "google.protobuf", "asyncio", "msgspec", "cryptography"} & set(json.loads(said.stdout))
