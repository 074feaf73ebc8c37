"""What callers see while the way to the vault is bad: one agent for each fault, one vault for all of them.

For each fault the invariants of `rig.verify` hold. What the agents left at the vault is looked at once, at the end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.faults.callers import Phase
from tests.faults.proxy import Blackhole, Corrupt, Delay, Drip, Fault, Reset, saying
from tests.faults.rig import WITH_DB, Report, Rig, measured, verify, verify_nothing_left
from tests.openbao import Bao
from tests.postgres import Postgres

SLOWER_THAN_PATIENCE_S = 0.8
"""More than `vault.timeout`, less than twice that."""
DEAD_LEADER = "http://127.0.0.1:1/v1/tests/data/api"
FAULTS: dict[str, Fault] = {
    "late but in time": Delay(0.3),
    "too late": Delay(SLOWER_THAN_PATIENCE_S),
    "drip": Drip(20, 0.1),
    "reset in the body": Reset(after=10),
    "black hole": Blackhole(),
    "corrupt body": Corrupt(),
    "500 (audit device)": saying(500, "internal error"),
    "503 sealed": saying(503, "Vault is sealed"),
    "307 to a dead leader": saying(307, headers={"Location": DEAD_LEADER}),
    "473 standby": saying(473),
}


@pytest.fixture(scope="module")
def rig(module_directory: Path, postgres: Postgres) -> Iterator[Rig]:
    vault_directory = module_directory / "vault"
    vault_directory.mkdir(mode=0o700)
    with Bao(directory=vault_directory) as bao:
        made = Rig(
            directory=module_directory, vault_address=bao.address, admin_token=bao.admin_token, setup=WITH_DB, tcp=True
        )
        with made.ready(postgres):
            yield made


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return []


def looked_at(rig: Rig, reports: list[Report], name: str, fault: AbstractContextManager[None]) -> Report:
    report = measured(rig, name, fault)
    reports.append(report)
    asked = rig.proxy.calls(*report.fault_mono)
    assert all(call.fault for call in asked if call.path.startswith("tests/")), "the fault was met"
    verify(report, credentials=len(WITH_DB.names))
    verify_warm_callers_are_not_slowed(report)
    return report


def verify_warm_callers_are_not_slowed(report: Report) -> None:
    """The vault's slowness never is the caller's: whoever waited for it would wait for 300 ms at least. On a machine
    that is busy itself, five times what it was before the fault is no sign of that either."""
    quiet_ms = report.tally.latency_ms(Phase.BEFORE)
    assert report.tally.latency_ms(Phase.DURING) < max(250, 5 * quiet_ms), report.line()


@pytest.mark.parametrize("name", FAULTS)
def test_callers_do_not_notice(rig: Rig, reports: list[Report], name: str) -> None:
    looked_at(rig, reports, name, rig.proxy.faulty(FAULTS[name]))


def test_callers_do_not_notice_a_vault_that_nobody_can_connect_to(rig: Rig, reports: list[Report]) -> None:
    looked_at(rig, reports, "connection refused", rig.proxy.refused())


def test_a_vault_that_asks_for_patience_is_given_it(rig: Rig, reports: list[Report]) -> None:
    """429 with Retry-After: no path is asked for again before its time, and callers do not notice."""
    wait_s = 2
    limited = saying(429, "request path: rate limit quota exceeded", headers={"Retry-After": str(wait_s)})
    report = looked_at(rig, reports, "429, Retry-After 2 s", rig.proxy.faulty(limited))
    told: dict[str, list[float]] = {}
    for call in rig.proxy.calls(*report.fault_mono, prefix="tests/"):
        told.setdefault(call.path, []).append(call.mono)
    assert told, "the secret was asked for"
    pauses = [later - earlier for times in told.values() for earlier, later in itertools.pairwise(times)]
    assert all(pause_s >= 0.95 * wait_s for pause_s in pauses), pauses


def test_a_redirect_is_not_followed(rig: Rig, reports: list[Report]) -> None:
    """The token would go with it: here to the same proxy, which would see the call."""
    elsewhere = saying(307, headers={"Location": f"{rig.proxy.tcp_address}/v1/elsewhere"})
    began = time.monotonic()
    looked_at(rig, reports, "307 to somebody else", rig.proxy.faulty(elsewhere, prefix="tests/"))
    assert rig.proxy.calls(began, prefix="elsewhere") == []


def test_at_the_end_nothing_is_left_at_the_vault(rig: Rig, reports: list[Report]) -> None:
    """Of no fault above: neither a token nor a database login."""
    assert reports, "run the whole module"
    verify_nothing_left(rig, reports)
