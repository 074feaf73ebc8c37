"""A cluster of three whose leader is killed: the longest time without a new issue, as the agent's callers see it, next
to what a bare client sees that asks one address.

Every attempt is for something that nobody has, so nothing is answered from memory: a login (`vault_token`), which only
a leader can do, and a JWT, a KV secret, which a standby can.
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.raft import Cluster, Node, cluster
from tests.faults.rig import Rig, Setup
from tokenward.client import Client
from tokenward.errors import TokenwardError

COLD = 400
PACE_S = 0.05
BEFORE_S = 2.0
WATCHED_S = 12.0
AGENT_GAP_S = 6.0
"""An election takes about 2 s at performance_multiplier 1; an agent may add one timeout and one back-off, not more."""
_TOKEN = '\n[workloads.connector.credentials.token-{number}]\nkind = "vault_token"\n'
_KV = """
[workloads.connector.credentials.kv-{number}]
kind = "kv"
path = "tests/api"
poll = "10m"
"""
_PROOF = """
[workloads.connector.credentials.proof]
kind = "jwt"
path = "transit/keys/jwt"
audiences = [{audiences}]
ttl = "10m"
"""


def cold_setup() -> Setup:
    audiences = ", ".join(f'"far-end-{number}"' for number in range(COLD))
    tables = [_TOKEN.format(number=number) + _KV.format(number=number) for number in range(COLD)]
    return Setup(
        names=(),
        credentials="".join(tables) + _PROOF.format(audiences=audiences),
        refresh_at=0.67,
        max_ttl_s=600.0,
        overlap_s=0.0,
    )


class Attempts:
    """One thread that attempts the same thing every PACE_S, and the longest time between two successes."""

    def __init__(self, name: str, attempt: Callable[[int], bool]) -> None:
        self.name = name
        self._attempt = attempt
        self._over = threading.Event()
        self._successes: list[float] = []
        self._began = self._ended = 0.0
        self.failures = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(10)
        self._ended = time.monotonic()

    @property
    def gap_s(self) -> float:
        """From the beginning to the end; a failure that never ended counts to the end."""
        times = [self._began, *self._successes, self._ended]
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def is_back(self) -> bool:
        """Whether the latest attempts succeeded."""
        return bool(self._successes) and self._ended - self._successes[-1] < 1.0

    def _run(self) -> None:
        for number in range(COLD):
            if self._over.wait(PACE_S):
                return
            if self._attempt(number):
                self._successes.append(time.monotonic())
            else:
                self.failures += 1


def asked_of_agent(client: Client, name: str) -> Callable[[int], bool]:
    """`name` may hold a {number}; without one, the number makes the audience."""

    def attempt(number: int) -> bool:
        audience = "" if "{" in name else f"far-end-{number}"
        try:
            client.get(name.format(number=number), audience=audience, timeout_s=2.0)
        except TokenwardError:
            return False
        return True

    return attempt


def asked_of(node: Node, password: str) -> Callable[[int], bool]:
    """A login at one node by a client that follows no redirect and knows no other address."""

    def attempt(number: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=2.0)
        try:
            connection.request("POST", "/v1/auth/userpass/login/bare", body=json.dumps({"password": password}))
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return attempt


@pytest.fixture
def rig_and_cluster(directory: Path) -> object:
    with cluster(directory) as nodes:
        leader = nodes.leader()
        rig = Rig(
            directory=directory,
            vault_address=leader.address,
            admin_token=nodes.admin_token,
            setup=cold_setup(),
            addresses=nodes.addresses,
        )
        with rig.ready():
            rig.admin.call("POST", "sys/auth/userpass", {"type": "userpass"})
            rig.admin.call("POST", "auth/userpass/users/bare", {"password": "bare-client"})
            yield rig, nodes


def test_the_leader_is_killed(rig_and_cluster: tuple[Rig, Cluster]) -> None:
    rig, nodes = rig_and_cluster
    leader = nodes.leader()
    standby = next(node for node in nodes.nodes if node is not leader)
    with rig.agent() as agent, Client(rig.socket) as client:
        agent.wait_for_log("serving on")
        client.get("token-0")
        ours = [Attempts(f"agent: {name}", asked_of_agent(client, name)) for name in ("token-{number}", "kv-{number}")]
        ours.append(Attempts("agent: jwt", asked_of_agent(client, "proof")))
        bare = [
            Attempts("bare client of the leader: login", asked_of(leader, "bare-client")),
            Attempts("bare client of a standby: login", asked_of(standby, "bare-client")),
        ]
        for each in (*ours, *bare):
            each.start()
        pause = threading.Event()
        pause.wait(BEFORE_S)
        leader.kill()
        pause.wait(WATCHED_S)
        for each in (*ours, *bare):
            each.stop()
        log = agent.log()
        print("\nleader of three killed -9: longest gap in new issues, failures")
        for each in (*ours, *bare):
            print(f"  {each.name:36} {each.gap_s:6.2f} s {each.failures:5}")
        for each in ours:
            assert each.is_back(), f"{each.name} never came back\n{log[-3000:]}"
            assert each.gap_s < AGENT_GAP_S, f"{each.name}\n{log[-3000:]}"
        assert not bare[0].is_back(), "or the leader was not killed"
        for number in range(3):
            client.get(f"kv-{number}")
