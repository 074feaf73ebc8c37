"""What callers see of real events: a vault that hangs, dies, is sealed, cannot write its audit log or its data, a
database that is restarted, an agent that is killed. Each has a vault of its own; the invariants are `rig`'s."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.callers import Callers, Phase
from tests.faults.raft import Node
from tests.faults.rig import (
    WITH_DB,
    Rig,
    in_phase,
    measured,
    verify,
    verify_no_secret_in,
    verify_nothing_left,
)
from tests.faults.servers import RestartablePostgres, SealableVault, full, small_disk, stopped
from tests.openbao import Bao
from tests.postgres import Postgres
from tokenward.vault.embedded import EmbeddedVault


@pytest.fixture
def vault_directory(directory: Path) -> Path:
    made = directory / "vault"
    made.mkdir(mode=0o700)
    return made


@contextlib.contextmanager
def rig_on(directory: Path, vault: EmbeddedVault) -> Iterator[Rig]:
    """A rig on a vault that runs."""
    with Rig(directory=directory, vault_address=vault.address, admin_token=vault.admin_token).ready() as made:
        yield made


@contextlib.contextmanager
def killed(node: Node) -> Iterator[None]:
    """The vault is dead, by SIGKILL, while the block runs."""
    node.kill()
    try:
        yield
    finally:
        node.start()


@contextlib.contextmanager
def without_room(node: Node, disk: Path) -> Iterator[None]:
    """The vault's disk is full while the block runs. Its storage is mapped into memory, so that a write may kill it:
    it is started again then, as its service manager would."""
    with full(disk):
        yield
    if node.has_ended:
        node.stop()
        node.start()


@contextlib.contextmanager
def sealed(vault: SealableVault) -> Iterator[None]:
    vault.seal()
    try:
        yield
    finally:
        vault.unseal()


def test_a_vault_that_hangs(directory: Path, vault_directory: Path) -> None:
    with Bao(directory=vault_directory) as vault, rig_on(directory, vault) as rig:
        verify(measured(rig, "vault SIGSTOP, SIGCONT", stopped(vault.pid)))
        verify_nothing_left(rig)


def test_a_vault_that_is_killed_and_started_again(directory: Path, vault_directory: Path) -> None:
    with Node(directory=vault_directory) as vault, rig_on(directory, vault) as rig:
        verify(measured(rig, "vault kill -9, restarted", killed(vault)))
        verify_nothing_left(rig)


def test_a_vault_that_is_sealed_and_unsealed(directory: Path, vault_directory: Path) -> None:
    with SealableVault(directory=vault_directory) as vault, rig_on(directory, vault) as rig:
        verify(measured(rig, "vault sealed, unsealed", sealed(vault)))
        verify_nothing_left(rig)


def test_a_vault_that_cannot_write_its_audit_log(directory: Path, vault_directory: Path) -> None:
    with (
        small_disk(directory / "disk", "8m") as disk,
        EmbeddedVault(directory=str(vault_directory), audit_file=str(disk / "audit.log")) as vault,
        rig_on(directory, vault) as rig,
    ):
        report = measured(rig, "vault's audit disk full", full(disk))
        verify(report)
        assert 500 in {call.status for call in rig.proxy.calls(*report.fault_mono)}, "the fault was real"
        verify_nothing_left(rig)


def test_a_vault_that_cannot_write_its_data(directory: Path, vault_directory: Path) -> None:
    with (
        small_disk(directory / "disk", "96m") as disk,
        Node(directory=vault_directory, data=disk / "data") as vault,
        rig_on(directory, vault) as rig,
    ):
        report = measured(rig, "vault's data disk full (raft)", without_room(vault, disk))
        verify(report)
        assert {call.status for call in rig.proxy.calls(*report.fault_mono)} - {200, 204}, "the fault was real"
        verify_nothing_left(rig)


def test_a_database_that_is_restarted(directory: Path, vault_directory: Path, postgres: Postgres) -> None:
    """The vault can make and end no login meanwhile; those that are there stay valid."""
    del postgres  # skips where none can run
    with (
        RestartablePostgres() as database,
        Bao(directory=vault_directory) as vault,
        Rig(directory=directory, vault_address=vault.address, admin_token=vault.admin_token, setup=WITH_DB).ready(
            database
        ) as rig,
    ):
        verify(measured(rig, "PostgreSQL restarted", database.stopped()), credentials=len(WITH_DB.names))
        verify_nothing_left(rig)
        assert database.execute("SELECT 1 FROM pg_roles WHERE rolname LIKE 'v-%'") == []


def test_an_agent_that_is_killed_and_started_again(directory: Path, vault_directory: Path) -> None:
    """Callers that ask wait for the next agent, handles go on with what they have; and what the first agent held at the
    vault ends by its TTL."""
    with Bao(directory=vault_directory) as vault, rig_on(directory, vault) as rig:
        with Callers(rig.socket, rig.setup.names) as callers, rig.agent() as first:
            callers.wait_until_warm()
            callers.go_on(2.0)
            assert rig.tokens(), "something is held"
            with in_phase(callers, Phase.DURING), rig.agent_after_killing(first) as second:
                second.wait_for_log("serving on")
                first_s, last_s = callers.time_to_fresh(within_s=rig.setup.max_ttl_s)
                callers.go_on(2.0)
                callers.close()
                assert second.stop() == 0
                log = first.log() + second.log()
        tally = callers.tally
        met = f"{len(tally.refused)} refused, {len(tally.expired)} expired, {sum(tally.errors.values())} other errors"
        print(f"\n{'agent kill -9, restarted':34} {met}; fresh after {first_s} s, all after {last_s} s of serving")
        assert (tally.crashes, tally.expired, tally.refused, dict(tally.errors)) == ([], [], [], {})
        verify_no_secret_in(log + (directory / "audit.jsonl").read_text(), rig.secrets() | tally.secrets)
        verify_nothing_left(rig)
