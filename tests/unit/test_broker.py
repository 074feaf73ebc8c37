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
from tokenward.core.model import Key, Policy, Served
from tokenward.core.store import Store
from tokenward.errors import AuditError, Reason, VaultDeniedError, VaultUnavailableError
from tokenward.refresher import Refresher
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
        self.broker = Broker(
            store=self.store,
            issuers=self.issuers,
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
