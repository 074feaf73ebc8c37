"""Load from h2load, the same tool for both sides, and what its log of every request comes to."""

from __future__ import annotations

import shutil
import statistics
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.servers import BenchError

_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Target:
    """One request, to be sent many times to the server at `socket`."""

    socket: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    http1: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What one run came to: answers per second and milliseconds per answer."""

    per_s: float
    p50_ms: float
    p99_ms: float


def is_installed() -> bool:
    """Whether there is an h2load to run."""
    return shutil.which("h2load") is not None


def grpc_target(socket: str, method: str, message: bytes) -> Target:
    """A unary gRPC call."""
    frame = struct.pack(">BI", 0, len(message)) + message
    return Target(socket, method, {"content-type": "application/grpc", "te": "trailers"}, frame)


def run(target: Target, *, requests: int, connections: int, streams: int = 1, scratch: Path) -> Load:
    """Sends `requests` requests, `connections` times `streams` of them in flight. Raises BenchError if any failed."""
    log, body = scratch / "h2load.log", scratch / "h2load.body"
    log.unlink(missing_ok=True)
    command = ["h2load", "-n", str(requests), "-c", str(connections), "-m", str(streams), "--log-file", str(log)]
    command += ["-B", f"unix:{target.socket}", *(["--h1"] if target.http1 else [])]
    for name, value in target.headers.items():
        command += ["-H", f"{name}: {value}"]
    if target.body is not None:
        body.write_bytes(target.body)
        command += ["-d", str(body)]
    done = subprocess.run(
        [*command, f"http://localhost{target.path}"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    rows = [[int(column) for column in line.split("\t")[:3]] for line in log.read_text().splitlines()]
    if done.returncode != 0 or len(rows) != requests or any(status != 200 for _, status, _ in rows):
        raise BenchError(f"h2load: {len(rows)} of {requests} answered: {done.stdout[-800:]}{done.stderr[-800:]}")
    took_s = (max(start + took for start, _, took in rows) - min(start for start, _, _ in rows)) / 1e6
    cuts = statistics.quantiles((took / 1000 for _, _, took in rows), n=100)
    return Load(requests / took_s, cuts[49], cuts[98])


def median(loads: Sequence[Load]) -> Load:
    """The medians of several runs."""
    return Load(
        statistics.median(load.per_s for load in loads),
        statistics.median(load.p50_ms for load in loads),
        statistics.median(load.p99_ms for load in loads),
    )
