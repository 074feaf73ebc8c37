"""The addresses by themselves: what a call with little time left may say of one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.vault import FakeVault, serving
from tokenward.errors import VaultUnavailableError
from tokenward.vault.addresses import Addresses, Outgoing
from tokenward.vault.connections import TlsFiles
from tokenward.vault.transport import Transport

TIMEOUT_S = 1.0
READ = Outgoing(
    method="GET",
    path="sys/seal-status",
    query={},
    headers={"X-Vault-Token": "s3cret"},
    body=b'{"k": "s3cret"}',
    repeatable=True,
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[FakeVault]:
    with serving(FakeVault(frozen=True), socket_path=str(tmp_path / "vault.sock")) as made:
        yield made


@pytest.fixture
def addresses(node: FakeVault) -> Iterator[Addresses]:
    transport = Transport(address=node.address, tls=TlsFiles(), max_reply_bytes=10_000, connections=2)
    made = Addresses([transport], timeout_s=TIMEOUT_S, now=lambda: 0.0, draw=lambda: 0.5)
    yield made
    made.close()


def ask(addresses: Addresses, *, left_s: float) -> None:
    with pytest.raises(VaultUnavailableError):
        addresses.ask(READ, deadline=time.monotonic() + left_s)


def test_silence_in_the_little_time_that_a_call_had_left_is_not_held_against_an_address(addresses: Addresses) -> None:
    """Otherwise a queue in front of a slow vault would shut it off."""
    for _ in range(5):
        ask(addresses, left_s=0.1)
    addresses.verify_askable()
    assert addresses.calls == 5


def test_silence_for_a_fair_time_is(addresses: Addresses) -> None:
    for _ in range(3):
        ask(addresses, left_s=0.6 * TIMEOUT_S)
    with pytest.raises(VaultUnavailableError, match="did not answer in time"):
        addresses.verify_askable()


def test_a_call_whose_time_is_over_asks_nobody(addresses: Addresses) -> None:
    with pytest.raises(VaultUnavailableError, match="no time left"):
        addresses.ask(READ, deadline=time.monotonic())
    assert addresses.calls == 0


def test_what_goes_out_does_not_show_who_asks_or_with_what() -> None:
    assert "s3cret" not in repr(READ)
