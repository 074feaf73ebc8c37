"""The broker: one flight for any number of callers, and what becomes of its outcome."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.issuers import FakeIssuers
from tests.making import instant, kv_grant, workload
from tokenward.auditlog import AuditLog
from tokenward.broker import Broker
from tokenward.core.audit import verify
from tokenward.core.blocks import Block, Scope
from tokenward.core.model import Key, Policy, Served
from tokenward.core.store import Store
from tokenward.errors import (
    AuditError,
    NotFoundError,
    Reason,
    RevokedError,
    TokenwardError,
    UnavailableError,
    VaultDeniedError,
    VaultUnavailableError,
)
from tokenward.refresher import Refresher
from tokenward.revoker import Revoker
from tokenward.watchers import Watchers

KEY = Key("app", "api")
GRANT = kv_grant(policy=Policy(overlap_s=10))
APP = workload(grants={"api": GRANT})
DOWN = VaultUnavailableError(Reason.VAULT_UNREACHABLE, "the vault is down")


class Bench:
    """A broker with a refresher, a fake vault, a fake clock and a real audit file."""

    def __init__(self, audit_file: Path) -> None:
        self.audit_file = audit_file
        self.clock = FakeClock()
        self.issuers = FakeIssuers()
        self.watchers = Watchers()
        self.store = Store(margin_s=6)
        self.audit = AuditLog(path=str(audit_file), clock=self.clock)
        self.audit.open()
        self.revoker = Revoker(revoke=self.issuers.revoke, audit=self.audit, clock=self.clock, draw=lambda: 0.5)
        self.broker = Broker(
            workloads={"app": APP},
            store=self.store,
            issuers=self.issuers,
            revoker=self.revoker,
            watchers=self.watchers,
            audit=self.audit,
            clock=self.clock,
            draw=lambda: 0.5,
        )
        self.refresher = Refresher(store=self.store, broker=self.broker, watchers=self.watchers, clock=self.clock)

    async def get(self, timeout_s: float = 5.0) -> Served:
        return await self.broker.get(APP, GRANT, "", timeout_s=timeout_s)

    async def refresh_at(self, mono: float) -> None:
        """Lets the refresher do what is due at `mono`, and waits until that is done."""
        self.clock.advance(mono - self.clock.now().mono)
        self.refresher.step()
        await settle()

    def events(self) -> list[tuple[str, str]]:
        records = [json.loads(line)["record"] for line in self.audit_file.read_text().splitlines()]
        return [(record["event"], record.get("outcome", "ok")) for record in records]


async def settle() -> None:
    """Runs everything that can run without time passing."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "audit.jsonl")
    yield made
    made.issuers.release()
    await made.broker.close()
    made.audit.close()


def password(served: Served) -> str:
    return served.current.issued.values["password"].reveal()


async def test_a_thousand_callers_of_a_cold_key_share_one_call(bench: Bench) -> None:
    bench.issuers.hold()
    callers = [asyncio.create_task(bench.get()) for _ in range(1000)]
    await bench.issuers.entered.wait()
    bench.issuers.release()
    answers = await asyncio.gather(*callers)
    assert bench.issuers.made == 1
    assert {password(answer) for answer in answers} == {"secret-1"}


async def test_a_caller_that_gives_up_harms_nobody(bench: Bench) -> None:
    bench.issuers.hold()
    first = asyncio.create_task(bench.get())
    await bench.issuers.entered.wait()
    others = [asyncio.create_task(bench.get()) for _ in range(3)]
    await settle()
    first.cancel()
    others[0].cancel()
    await settle()
    bench.issuers.release()
    assert password(await others[1]) == password(await others[2]) == "secret-1"
    assert bench.issuers.made == 1


async def test_an_error_is_shared_and_not_asked_for_again_at_once(bench: Bench) -> None:
    bench.issuers.failing_with = DOWN
    outcomes = await asyncio.gather(*(bench.get() for _ in range(10)), return_exceptions=True)
    assert {getattr(outcome, "reason", None) for outcome in outcomes} == {Reason.VAULT_UNREACHABLE}
    with pytest.raises(VaultUnavailableError) as caught:
        await bench.get()
    assert bench.issuers.made == 1
    assert caught.value.retry_after_s == 0.25


async def test_the_next_caller_after_the_back_off_tries_again(bench: Bench) -> None:
    bench.issuers.failing_with = DOWN
    with pytest.raises(VaultUnavailableError):
        await bench.get()
    bench.issuers.failing_with = None
    bench.clock.advance(0.3)
    assert password(await bench.get()) == "secret-2"


async def test_a_caller_does_not_wait_longer_than_it_can(bench: Bench) -> None:
    bench.issuers.hold()
    with pytest.raises(VaultUnavailableError, match="in time"):
        await bench.get(timeout_s=0)
    bench.issuers.release()
    await settle()
    assert password(await bench.get(timeout_s=0)) == "secret-1", "the flight went on for whoever asks next"


async def test_a_live_value_is_answered_while_the_vault_hangs(bench: Bench) -> None:
    await bench.get()
    bench.issuers.hold()
    await bench.refresh_at(70)
    assert password(await bench.get(timeout_s=0)) == "secret-1"


async def test_a_refresh_brings_the_next_version_and_then_revokes_the_old_one(bench: Bench) -> None:
    await bench.get()
    await bench.refresh_at(70)
    served = await bench.get()
    assert (password(served), served.current.number) == ("secret-2", 2)
    assert served.previous is not None
    assert bench.issuers.live == {"secret-1", "secret-2"}, "new before old goes"
    await bench.refresh_at(80)
    assert bench.issuers.live == {"secret-2"}
    assert (await bench.get()).previous is None


async def test_a_lease_is_renewed_while_the_vault_allows_and_then_replaced(bench: Bench) -> None:
    bench.issuers.renewals_left = 1
    await bench.get()
    await bench.refresh_at(70)
    served = await bench.get()
    assert (password(served), served.current.number) == ("secret-1", 1)
    await bench.refresh_at(140)
    assert password(await bench.get()) == "secret-2"


async def test_a_failed_refresh_keeps_the_value_until_its_end_and_not_longer(bench: Bench) -> None:
    await bench.get()
    bench.issuers.failing_with = DOWN
    await bench.refresh_at(70)
    served = await bench.get()
    assert served.stale
    assert password(served) == "secret-1"
    bench.clock.advance(30)
    with pytest.raises(VaultUnavailableError):
        await bench.get()


async def test_a_value_that_nobody_uses_is_let_go_and_revoked(bench: Bench) -> None:
    bench.issuers.renewals_left = 9
    await bench.get()
    await bench.refresh_at(70)
    await bench.refresh_at(150)
    await settle()
    assert not bench.issuers.live
    assert len(bench.store) == 0


async def test_watchers_are_told_of_new_values_of_failures_and_of_the_end_of_an_overlap(bench: Bench) -> None:
    await bench.get()
    with bench.watchers.watch([KEY], None) as watcher:
        await bench.refresh_at(70)
        told = (await watcher.changes())[KEY]
        assert isinstance(told, Served)
        assert told.current.number == 2
        assert told.previous is not None
        await bench.refresh_at(80)
        told = (await watcher.changes())[KEY]
        assert isinstance(told, Served)
        assert told.previous is None
        bench.issuers.failing_with = DOWN
        await bench.refresh_at(140)
        told = (await watcher.changes())[KEY]
        assert isinstance(told, Served)
        assert told.stale
        bench.clock.advance(60)
        await bench.refresh_at(200)
        assert (await watcher.changes())[KEY] is DOWN


async def test_a_watched_failure_is_tried_again_until_it_works(bench: Bench) -> None:
    bench.issuers.failing_with = DOWN
    with bench.watchers.watch([KEY], None) as watcher:
        with pytest.raises(VaultUnavailableError):
            await bench.get()
        bench.issuers.failing_with = None
        await bench.refresh_at(1)
        told = (await watcher.changes())[KEY]
        assert isinstance(told, Served)


async def test_everything_at_the_vault_is_in_the_audit_log(bench: Bench) -> None:
    bench.issuers.renewals_left = 1
    await bench.get()
    await bench.refresh_at(70)
    await bench.get()
    await bench.refresh_at(140)
    await bench.refresh_at(150)
    bench.issuers.failing_with = DOWN
    await bench.get()
    await bench.refresh_at(210)
    assert bench.events() == [
        ("issue", "ok"),
        ("renew", "ok"),
        ("issue", "ok"),
        ("revoke", "ok"),
        ("issue", "VAULT_UNREACHABLE"),
    ]
    assert verify(bench.audit_file.read_bytes().splitlines()).seq == 5


async def test_without_a_record_nothing_is_kept_and_what_was_made_is_revoked(bench: Bench) -> None:
    os.close(bench.audit._fd)
    bench.audit._fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(AuditError):
        await bench.get()
    await settle()
    assert not bench.issuers.live
    assert bench.store.live(KEY, bench.clock.now()) is None


async def test_a_revocation_that_the_vault_refuses_is_recorded_and_not_repeated(bench: Bench) -> None:
    await bench.get()
    bench.issuers.revocation_failing_with = VaultDeniedError(Reason.VAULT_DENIED, "no")
    bench.broker.lapse(KEY)
    await settle()
    assert bench.events()[-1] == ("revoke", "VAULT_DENIED")


async def test_closing_revokes_every_lease_also_of_a_key_that_is_being_refreshed(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "audit.jsonl")
    await bench.get()
    bench.issuers.hold()
    await bench.refresh_at(70)
    await bench.broker.close()
    bench.audit.close()
    assert not bench.issuers.live


async def test_a_bug_in_an_issuer_reaches_the_caller_and_leaves_the_key_usable(bench: Bench) -> None:
    class BrokenError(Exception): ...

    async def broken(*_: object) -> None:
        raise BrokenError

    working, bench.issuers.issue = bench.issuers.issue, broken  # type: ignore[method-assign, assignment]  # the bug
    with pytest.raises(BrokenError):
        await bench.get()
    bench.issuers.issue = working  # type: ignore[method-assign]  # and its end
    assert password(await bench.get()) == "secret-1"


async def test_the_old_value_goes_soon_after_everybody_who_watches_has_moved_on(bench: Bench) -> None:
    await bench.get()
    with bench.watchers.watch([KEY], "one"), bench.watchers.watch([KEY], "other"):
        await bench.refresh_at(70)
        assert not bench.watchers.acknowledge("one", KEY, 2)
        assert bench.watchers.acknowledge("other", KEY, 2)
        bench.broker.moved_on(KEY, 2)
        assert (await bench.get()).previous is not None, "somebody may be using what it read just before"
        await bench.refresh_at(71)
        assert (await bench.get()).previous is None
    assert bench.issuers.live == {"secret-2"}


async def test_a_late_acknowledgement_never_prolongs_an_overlap(bench: Bench) -> None:
    await bench.get()
    await bench.refresh_at(70)
    bench.clock.advance(9.5)
    bench.broker.moved_on(KEY, 2)
    assert (await bench.get()).retire == instant(80)
    await bench.refresh_at(80)
    assert bench.issuers.live == {"secret-2"}


async def test_an_acknowledgement_of_another_version_changes_nothing(bench: Bench) -> None:
    await bench.get()
    await bench.refresh_at(70)
    for version in (0, 1, 3):
        bench.broker.moved_on(KEY, version)
    await bench.refresh_at(72)
    assert bench.issuers.live == {"secret-1", "secret-2"}


async def test_a_refused_value_is_replaced_at_once_even_if_it_could_be_renewed(bench: Bench) -> None:
    bench.issuers.renewals_left = 9
    await bench.get()
    served = await bench.broker.look_again(APP, GRANT, "", 1, timeout_s=1)
    assert (password(served), served.current.number) == ("secret-2", 2)


async def test_many_reports_cause_one_look(bench: Bench) -> None:
    await bench.get()
    answers = [await bench.broker.look_again(APP, GRANT, "", 1, timeout_s=1) for _ in range(5)]
    answers += [await bench.broker.look_again(APP, GRANT, "", 2, timeout_s=1) for _ in range(5)]
    assert {answer.current.number for answer in answers} == {2}
    assert bench.issuers.made == 2
    bench.clock.advance(10)
    assert (await bench.broker.look_again(APP, GRANT, "", 2, timeout_s=1)).current.number == 3


async def test_a_report_while_the_vault_is_down_leaves_the_value_that_is_there(bench: Bench) -> None:
    await bench.get()
    bench.issuers.failing_with = DOWN
    served = await bench.broker.look_again(APP, GRANT, "", 1, timeout_s=1)
    assert (password(served), served.stale) == ("secret-1", True)


# -- ended before their time ------------------------------------------------------------------------------------------


def block(workload: str = "", credential: str = "") -> Block:
    return Block(scope=Scope(workload=workload, credential=credential), reason="leaked", by="uid 0", since=0.0)


@pytest.mark.parametrize("scope", [("app", "api"), ("app", ""), ("", "")])
async def test_what_an_operator_revoked_is_gone_for_all_until_it_is_lifted(
    bench: Bench, scope: tuple[str, str]
) -> None:
    await bench.get()
    bench.issuers.kept.add("app")
    with bench.watchers.watch([KEY], None) as watcher:
        assert bench.broker.revoke(block(*scope)) == 1
        told = (await watcher.changes())[KEY]
        assert isinstance(told, RevokedError)
        assert "leaked" in told.public
        await settle()
        assert not bench.issuers.live
        assert bool(bench.issuers.kept) == bool(scope[1]), "the token of the workload goes with the workload"
        with pytest.raises(RevokedError):
            await bench.get()
        assert bench.broker.lift(Scope(workload=scope[0], credential=scope[1]))
        with pytest.raises(UnavailableError):
            await watcher.changes()
    served = await bench.get()
    assert (password(served), served.current.number) == ("secret-2", 2)


async def test_a_revocation_of_something_else_touches_nothing(bench: Bench) -> None:
    await bench.get()
    assert bench.broker.revoke(block("app", "other")) == bench.broker.revoke(block("another")) == 0
    assert not bench.broker.lift(Scope(workload="app"))
    assert password(await bench.get()) == "secret-1"


async def test_what_is_under_way_when_it_is_revoked_reaches_nobody_and_is_revoked_when_it_comes(bench: Bench) -> None:
    bench.issuers.hold()
    waiting = asyncio.create_task(bench.get())
    await bench.issuers.entered.wait()
    bench.broker.revoke(block("app"))
    bench.issuers.release()
    with pytest.raises(RevokedError):
        await waiting
    await settle()
    assert not bench.issuers.live
    assert len(bench.store) == 0


async def test_after_a_lift_the_value_under_way_from_before_is_not_mixed_up_with_the_new_one(bench: Bench) -> None:
    bench.issuers.hold()
    before = asyncio.create_task(bench.get())
    await bench.issuers.entered.wait()
    bench.broker.revoke(block("app"))
    bench.broker.lift(Scope(workload="app"))
    after = asyncio.create_task(bench.get())
    await settle()
    bench.issuers.release()
    assert password(await after) == "secret-2"
    with pytest.raises(RevokedError):
        await before
    await settle()
    assert bench.issuers.live == {"secret-2"}


async def test_a_revocation_goes_on_until_the_vault_has_done_it(bench: Bench) -> None:
    await bench.get()
    bench.issuers.revocation_failing_with = DOWN
    bench.broker.revoke(block("app", "api"))
    await settle()
    assert [key for key, _ in bench.revoker.pending] == [KEY]
    bench.issuers.revocation_failing_with = None
    await bench.revoker.settled()
    assert not bench.issuers.live
    assert bench.events()[-1] == ("revoke", "ok")


async def test_a_lease_that_was_revoked_at_the_vault_is_replaced_and_not_served_meanwhile(bench: Bench) -> None:
    await bench.get()
    bench.issuers.live.clear()
    bench.issuers.hold()
    await bench.refresh_at(70)
    waiting = asyncio.create_task(bench.get())
    await settle()
    assert not waiting.done()
    bench.issuers.release()
    served = await waiting
    assert (password(served), served.current.number, served.previous) == ("secret-2", 2, None)


async def test_a_lease_that_was_revoked_at_the_vault_ends_when_there_is_no_other(bench: Bench) -> None:
    await bench.get()
    bench.issuers.live.clear()
    bench.issuers.failing_with = VaultDeniedError(Reason.LOGIN_FAILED, "no such role")
    with bench.watchers.watch([KEY], None) as watcher:
        await bench.refresh_at(70)
        assert (await watcher.changes())[KEY] is bench.issuers.failing_with
    with pytest.raises(VaultDeniedError):
        await bench.get()


async def test_a_secret_that_was_deleted_ends_with_its_reason_and_comes_back_when_it_is_written(bench: Bench) -> None:
    await bench.get()
    bench.issuers.deleted_with = NotFoundError(Reason.SECRET_NOT_FOUND, "deleted")
    with bench.watchers.watch([KEY], None) as watcher:
        await bench.refresh_at(70)
        assert (await watcher.changes())[KEY] is bench.issuers.deleted_with
        with pytest.raises(NotFoundError):
            await bench.get()
        bench.issuers.deleted_with = None
        await bench.refresh_at(71)
        told = (await watcher.changes())[KEY]
        assert isinstance(told, Served)
        assert told.current.number == 2


async def test_a_new_value_that_is_not_valid_is_revoked_and_the_old_one_stays(bench: Bench) -> None:
    await bench.get()
    bench.issuers.invalid_with = TokenwardError(Reason.VAULT_ERROR, "the far end refused it")
    await bench.refresh_at(70)
    served = await bench.get()
    assert (password(served), served.stale) == ("secret-1", True)
    assert bench.issuers.live == {"secret-1"}
    assert bench.events()[-2:] == [("validate", "VAULT_ERROR"), ("revoke", "ok")]
    bench.issuers.invalid_with = None
    await bench.refresh_at(71)
    assert password(await bench.get()) == "secret-3", "it was tried again"


# -- another configuration --------------------------------------------------------------------------------------------


async def test_what_is_the_same_in_the_new_configuration_keeps_its_value(bench: Bench) -> None:
    await bench.get()
    again = workload(grants={"api": GRANT, "more": kv_grant("more")})
    with bench.watchers.watch([KEY], None) as watcher:
        found = bench.broker.reconfigure({"app": again})
        with pytest.raises(UnavailableError):
            await watcher.changes()
    assert found.workloads == {"app"}
    assert not found.ended
    served = await bench.broker.get(again, again.grants["api"], "", timeout_s=1)
    assert password(served) == "secret-1"


async def test_an_equal_configuration_disturbs_nobody(bench: Bench) -> None:
    await bench.get()
    again = workload(grants={"api": kv_grant(policy=Policy(overlap_s=10))})
    with bench.watchers.watch([KEY], None) as watcher:
        assert bench.broker.reconfigure({"app": again}).workloads == set()
        bench.watchers.publish(KEY, DOWN)
        assert await watcher.changes() == {KEY: DOWN}


@pytest.mark.parametrize("after", ["no workload", "no grant", "another grant", "another proof"])
async def test_what_is_gone_or_another_in_the_new_configuration_ends_and_is_revoked(bench: Bench, after: str) -> None:
    await bench.get()
    others = {
        "no workload": {},
        "no grant": {"app": workload(grants={})},
        "another grant": {"app": workload(grants={"api": kv_grant(policy=Policy(overlap_s=11))})},
        "another proof": {"app": workload("app", "unix:uid:7", grants={"api": GRANT})},
    }
    bench.broker.reconfigure(others[after])
    await settle()
    assert not bench.issuers.live
    assert len(bench.store) == 0


async def test_who_was_attested_for_the_configuration_before_is_asked_to_come_again(bench: Bench) -> None:
    bench.broker.reconfigure({"app": workload(grants={"api": GRANT})})
    with pytest.raises(UnavailableError) as caught:
        await bench.get()
    assert caught.value.reason is Reason.CONFIGURATION_CHANGED
    assert bench.issuers.made == 0


async def test_when_the_last_process_has_gone_its_values_go_and_the_next_one_begins_anew(bench: Bench) -> None:
    await bench.get()
    bench.broker.let_go("another")
    assert bench.issuers.live
    bench.broker.let_go("app")
    await settle()
    assert not bench.issuers.live
    assert (await bench.get()).current.number == 2


async def test_halting_keeps_what_is_held_and_ends_what_is_under_way(bench: Bench) -> None:
    await bench.get()
    bench.issuers.hold()
    await bench.refresh_at(70)
    await bench.broker.halt()
    held = bench.store.live(KEY, bench.clock.now())
    assert held is not None
    assert bench.issuers.live == {"secret-1"}


# -- the budget -------------------------------------------------------------------------------------------------------


async def test_refreshes_keep_to_the_budget_and_what_waits_is_done_later(bench: Bench) -> None:
    grants = {f"c{number}": kv_grant(f"c{number}") for number in range(10)}
    app = workload(grants=grants)
    bench.broker.reconfigure({"app": app})
    for grant in grants.values():
        await bench.broker.get(app, grant, "", timeout_s=1)
    refresher = Refresher(
        store=bench.store,
        broker=bench.broker,
        watchers=bench.watchers,
        clock=bench.clock,
        rate=4.0,
        calls=lambda: bench.issuers.made,
    )
    bench.clock.advance(70)
    done = []
    for _ in range(3):
        refresher.step()
        await settle()
        done.append(bench.issuers.made)
        bench.clock.advance(1)
    assert done == [14, 18, 20]


async def test_a_value_that_is_about_to_end_does_not_wait_for_the_budget(bench: Bench) -> None:
    await bench.get()
    calls = 0
    refresher = Refresher(
        store=bench.store,
        broker=bench.broker,
        watchers=bench.watchers,
        clock=bench.clock,
        rate=1.0,
        calls=lambda: calls,
    )
    refresher.step()
    made = []
    for at in (51, 70, 90, 95):
        bench.clock.advance(at - bench.clock.now().mono)
        calls += 1000  # callers' own
        refresher.step()
        await settle()
        made.append(bench.issuers.made)
    assert made == [1, 1, 1, 2]
