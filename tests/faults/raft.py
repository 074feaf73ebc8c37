"""OpenBao servers that keep their data: one node that can be killed and started again, or three that elect a leader.

Owns: the servers' configuration and their life. Raft storage in a directory that the caller gives; the seal's key is a
file in it, which is good enough for a test. Each node listens on a Unix socket of its own, and on loopback TCP in the
clear for the other nodes and for agents that are to see several addresses.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.admin import Admin
from tokenward.core.secret import Secret
from tokenward.vault.embedded import EmbeddedVault

# performance_multiplier 1: elections in 2 s instead of 8 to 22.
_NODE = """\
storage "raft" {{
  path = {data}
  node_id = {name}
  performance_multiplier = 1
{joins}}}
listener "unix" {{
  address = {socket}
}}
listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster_port}"
  tls_disable = true
}}
api_addr = "http://127.0.0.1:{port}"
cluster_addr = "https://127.0.0.1:{cluster_port}"
log_level = "error"
seal "static" {{
  current_key_id = "faults"
  current_key = {seal_key}
}}
"""
_JOIN = '  retry_join {{ leader_api_addr = "{address}" }}\n'
_ADMIN = """\
initialize "admin" {{
  request "token" {{
    operation = "update"
    path = "auth/token/create"
    data = {{
      id = {{ eval_source = "file" eval_type = "string" path = "/proc/self/fd/{token_fd}" }}
      policies = ["root"]
      no_parent = true
      ttl = "24h"
    }}
  }}
}}
"""
_UP = frozenset({200, 429, 472, 473})


class Node(EmbeddedVault):
    """One server. The first of a cluster makes the administrator's token; the others join those at `joins`."""

    def __init__(
        self,
        *,
        directory: Path,
        name: str = "one",
        data: Path | None = None,
        seal_key: Path | None = None,
        joins: tuple[str, ...] = (),
    ) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.name = name
        self.data = data or directory / "data"
        self.data.mkdir(mode=0o700, exist_ok=True)
        self.port, cluster_port = _free_ports(2)
        self.tcp_address = f"http://127.0.0.1:{self.port}"
        self.socket_path = str(directory / "bao.sock")
        key = seal_key or directory / "seal.key"
        if not key.exists():
            key.write_bytes(secrets.token_bytes(32))
        super().__init__(directory=str(directory), ready_timeout_s=40.0)
        text = _NODE.format(
            data=json.dumps(str(self.data)),
            name=json.dumps(name),
            joins="".join(_JOIN.format(address=address) for address in joins),
            socket=json.dumps(self.socket_path),
            port=self.port,
            cluster_port=cluster_port,
            seal_key=json.dumps(f"file://{key}"),
        )
        self._text = text
        self._founds = not joins

    def begin(self) -> None:
        """Starts it without waiting for it."""
        self._spawn()

    @property
    def has_ended(self) -> bool:
        """Whether it died by itself."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """As a crash: SIGKILL, and nobody cleans up after it."""
        os.kill(self.pid, signal.SIGKILL)
        self.stop()

    @property
    def state(self) -> int:
        """What its health check says: 200 active, 429 standby, 503 sealed; 0 when it does not answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1.0)
        try:
            connection.request("GET", "/v1/sys/health")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def _config(self, seal_fd: int, token_fd: int) -> str:
        return self._text + (_ADMIN.format(token_fd=token_fd) if self._founds else "")

    def _wait_until_ready(self) -> None:
        give_up_mono = time.monotonic() + self._ready_timeout_s
        wanted = {200} if self._founds else _UP
        while self.state not in wanted:
            process = self._process
            if process is None or process.poll() is not None:
                raise self._failed("ended while starting")
            if time.monotonic() > give_up_mono:
                raise self._failed("was not ready in time")
            time.sleep(0.02)


class Cluster:
    """Three nodes that vote."""

    def __init__(self, nodes: list[Node], admin_token: Secret) -> None:
        self.nodes = nodes
        self.admin_token = admin_token

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(node.tcp_address for node in self.nodes)

    def leader(self) -> Node:
        """The active node."""
        return next(node for node in self.nodes if node.state == 200)


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """Three nodes that have elected a leader, all of them voters."""
    with contextlib.ExitStack() as running:
        seal_key = directory / "seal.key"
        seal_key.write_bytes(secrets.token_bytes(32))
        first = running.enter_context(Node(directory=directory / "one", seal_key=seal_key))
        admin = Admin(f"unix://{first.socket_path}", first.admin_token)
        # New nodes vote after 10 s of good behaviour unless told otherwise.
        admin.call(
            "POST",
            "sys/storage/raft/autopilot/configuration",
            {"server_stabilization_time": "1s", "cleanup_dead_servers": False},
        )
        others = [
            Node(directory=directory / name, name=name, seal_key=seal_key, joins=(first.tcp_address,))
            for name in ("two", "three")
        ]
        for node in others:
            running.callback(node.stop)
            node.begin()
        _wait_for_voters(admin, 3)
        yield Cluster([first, *others], first.admin_token)


def _wait_for_voters(admin: Admin, count: int, within_s: float = 60.0) -> None:
    give_up_mono = time.monotonic() + within_s
    while True:
        answer: Any = admin.call("GET", "sys/storage/raft/configuration")
        servers = answer.get("config", {}).get("servers", [])
        if sum(bool(server.get("voter")) for server in servers) == count:
            return
        assert time.monotonic() < give_up_mono, f"not {count} voters: {servers}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
