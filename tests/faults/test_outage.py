"""Many credentials, a vault that is dead for most of a value's life, and callers in loops all the while: no error, and
no stampede when it is back. TOKENWARD_FAULTS=full is the size that the design names.

Without it, a fifth of the credentials and a third of the life; the seconds between the vault's return and the first
value's end are those of the full size, some 6, since how soon an agent looks at its vault again does not shrink.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.callers import Callers
from tests.faults.proxy import FaultProxy
from tests.faults.raft import Node
from tests.faults.rig import Rig, Setup, measured, text_of, verify

REFRESH_AT = 0.2
_KV = """
[workloads.connector.credentials.{name}]
kind = "kv"
path = "tests/{name}"
poll = "{poll}"
"""


@dataclass(frozen=True, slots=True)
class Size:
    credentials: int
    callers: int
    ttl_s: float
    away_s: float
    watched_s: float
    refresh_rate: str

    @property
    def poll_s(self) -> float:
        return self.ttl_s * REFRESH_AT


SIZES = {"full": Size(200, 50, 60.0, 40.0, 30.0, "30/s"), "": Size(40, 50, 20.0, 9.0, 6.0, "30/s")}


@pytest.fixture
def size() -> Size:
    return SIZES[os.environ.get("TOKENWARD_FAULTS", "")]


@contextlib.contextmanager
def away(proxy: FaultProxy, vault: Node) -> Iterator[None]:
    """Killed, and nobody listens in its place."""
    with proxy.refused():
        vault.kill()
        try:
            yield
        finally:
            vault.start()


def test_an_outage_of_most_of_a_values_life(directory: Path, size: Size) -> None:
    names = tuple(f"api-{number}" for number in range(size.credentials))
    setup = Setup(
        names=names,
        credentials="".join(_KV.format(name=name, poll=text_of(size.poll_s)) for name in names),
        more=f'[leases]\nrefresh_rate = "{size.refresh_rate}"',
        refresh_at=REFRESH_AT,
        max_ttl_s=size.ttl_s,
    )
    with (
        Node(directory=directory / "vault") as vault,
        Rig(
            directory=directory, vault_address=vault.address, admin_token=vault.admin_token, setup=setup
        ).ready() as rig,
    ):
        for name in names:
            rig.put(name, f"the-value-of-{name}")
        report = measured(
            rig,
            f"{size.credentials} credentials, away {size.away_s:g} s",
            away(rig.proxy, vault),
            callers=Callers(rig.socket, names, count=size.callers, pace_s=0.1),
            before_s=2 * size.poll_s,
            fault_s=size.away_s,
            after_s=size.watched_s,
        )
    verify(report, credentials=0)
    assert report.after.peak <= 2 * report.before.peak, report.line()
