"""Operations: what is written down, and what the agent that comes after makes up for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.issuers import FakeIssuers
from tests.making import kv_grant, workload
from tests.unit.test_broker import settle
from tokenward.auditlog import AuditLog
from tokenward.broker import Broker
from tokenward.core.blocks import Block, Blocks, Scope
from tokenward.core.model import Instant
from tokenward.core.store import Store
from tokenward.errors import InvalidRequestError, Reason, RevokedError, TokenwardError, VaultUnavailableError
from tokenward.operations import Operations
from tokenward.revoker import Revoker
from tokenward.statefile import LeftOver, StateFile
from tokenward.vault.exchange import Exchange
from tokenward.watchers import Watchers

APP = workload(grants={"api": kv_grant()})
DOWN = VaultUnavailableError(Reason.VAULT_UNREACHABLE, "the vault is down")
LEFT = LeftOver(accessor="acc-1", workload="app", credential="api", ends=None)
SCOPE = Scope(workload="app", credential="api")


@dataclass
class FakeExchange:
    """Revokes by accessor; `failing_with` are the outcomes of the next calls."""

    revoked: list[str] = field(default_factory=list)
    failing_with: list[TokenwardError] = field(default_factory=list)

    async def revoke_accessor(self, accessor: str, *, now: Instant) -> None:
        del now
        if self.failing_with:
            raise self.failing_with.pop(0)
        self.revoked.append(accessor)


class Desk:
    """Operations over a broker with fake issuers and real files."""

    def __init__(self, directory: Path) -> None:
        self.state = StateFile(str(directory / "state.json"))
        self.clock = FakeClock()
        self.issuers = FakeIssuers()
        self.exchange = FakeExchange()
        self.audit_file = directory / "audit.jsonl"
        self.audit = AuditLog(path=str(self.audit_file), clock=self.clock)
        self.audit.open()
        self.revoker = Revoker(revoke=self.issuers.revoke, audit=self.audit, clock=self.clock, draw=lambda: 0.0)
        found, left_over = self.state.load()
        blocks = Blocks(found)
        self.broker = Broker(
            workloads={"app": APP},
            store=Store(margin_s=6),
            issuers=self.issuers,
            revoker=self.revoker,
            watchers=Watchers(),
            audit=self.audit,
            clock=self.clock,
            blocks=blocks,
        )
        self.operations = Operations(
            broker=self.broker,
            revoker=self.revoker,
            blocks=blocks,
            state=self.state,
            left_over=left_over,
            exchange=cast("Exchange", self.exchange),
            audit=self.audit,
            clock=self.clock,
        )

    async def get(self) -> None:
        await self.broker.get(APP, APP.grants["api"], "", timeout_s=1)

    def events(self) -> list[tuple[str, str]]:
        records = [json.loads(line)["record"] for line in self.audit_file.read_text().splitlines()]
        return [(record["event"], record.get("outcome", "ok")) for record in records]


Make = Callable[[], Desk]


@pytest.fixture
def desk(tmp_path: Path) -> Make:
    """Makes one agent's desk after the other, on the same files."""
    made: list[Desk] = []

    def make() -> Desk:
        if made:
            made[-1].audit.close()
        made.append(Desk(tmp_path))
        return made[-1]

    return make


async def test_a_revocation_is_written_down_until_the_vault_has_done_it(desk: Make) -> None:
    now = desk()
    await now.get()
    now.issuers.revocation_failing_with = DOWN
    assert now.operations.revoke(SCOPE, reason="leaked", by="uid 0").ended == 1
    await settle()
    blocks, left_over = now.state.load()
    assert [block.scope for block in blocks] == [SCOPE]
    assert [each.accessor for each in left_over] == ["secret-1"]
    now.issuers.revocation_failing_with = None
    await now.revoker.settled()
    await settle()
    assert now.state.load()[1] == ()


async def test_the_agent_after_knows_what_was_revoked(desk: Make) -> None:
    desk().operations.revoke(SCOPE, reason="leaked", by="uid 0")
    after = desk()
    with pytest.raises(RevokedError, match="leaked"):
        await after.get()
    assert after.operations.lift(SCOPE, reason="rotated", by="uid 7")
    await after.get()
    await desk().get()


async def test_the_agent_after_revokes_what_was_left_by_its_accessor(desk: Make) -> None:
    desk().state.save([], [LEFT])
    after = desk()
    after.exchange.failing_with = [DOWN]
    await after.operations.finish()
    assert after.exchange.revoked == ["acc-1"]
    assert after.state.load() == ((), ())
    assert after.events()[-1] == ("revoke", "ok")


async def test_what_cannot_be_revoked_is_said_with_what_to_do_and_not_tried_for_ever(
    desk: Make, caplog: pytest.LogCaptureFixture
) -> None:
    desk().state.save([], [LEFT])
    after = desk()
    after.exchange.failing_with = [TokenwardError(Reason.LOGIN_FAILED, "the agent has no login of its own")]
    await after.operations.finish()
    assert "bao token revoke -accessor acc-1" in caplog.text
    assert after.state.load() == ((), ())
    assert after.events()[-1] == ("revoke", "LOGIN_FAILED")


async def test_what_has_ended_by_itself_needs_no_revocation(desk: Make) -> None:
    first = desk()
    first.state.save([], [LeftOver(accessor="old", ends=first.clock.now().wall - 1)])
    after = desk()
    await after.operations.finish()
    assert after.exchange.revoked == []
    assert after.state.load() == ((), ())


async def test_what_cannot_be_written_down_is_done_all_the_same_and_the_operator_is_told(
    desk: Make, tmp_path: Path
) -> None:
    now = desk()
    await now.get()
    (tmp_path / "state.json.new").mkdir()
    done = now.operations.revoke(SCOPE, reason="leaked", by="uid 0")
    assert done.ended == 1
    assert "cannot be written" in done.problem
    with pytest.raises(RevokedError):
        await now.get()
    with pytest.raises(TokenwardError, match="cannot be written"):
        now.operations.lift(SCOPE, reason="rotated", by="uid 0")
    with pytest.raises(RevokedError):
        await now.get()


def test_lifting_what_is_not_revoked_changes_nothing(desk: Make) -> None:
    now = desk()
    assert not now.operations.lift(SCOPE, reason="?", by="uid 0")
    assert now.events() == []


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "x" * 201])
async def test_nothing_is_done_without_a_reason_that_fits_on_a_line(desk: Make, reason: str) -> None:
    now = desk()
    await now.get()
    with pytest.raises(InvalidRequestError):
        now.operations.revoke(SCOPE, reason=reason, by="uid 0")
    with pytest.raises(InvalidRequestError):
        now.operations.lift(SCOPE, reason=reason, by="uid 0")
    with pytest.raises(InvalidRequestError):
        await now.operations.rotate("app", "api", reason=reason, by="uid 0")
    assert not tuple(now.operations.blocks)
    await now.get()


async def test_a_rotation_brings_the_next_version_and_names_who_wanted_it(desk: Make) -> None:
    now = desk()
    await now.get()
    (served,) = await now.operations.rotate("app", "api", reason="leaver", by="uid 7")
    assert served.current.number == 2
    assert "uid 7: leaver" in now.audit_file.read_text()
    with pytest.raises(InvalidRequestError, match="nothing is held"):
        await now.operations.rotate("app", "other", reason="leaver", by="uid 7")


def test_a_block_of_the_state_holds_from_the_start(desk: Make) -> None:
    block = Block(scope=Scope(), reason="drill", by="uid 0", since=1.0)
    desk().state.save([block], [])
    assert desk().operations.blocks == (block,)
