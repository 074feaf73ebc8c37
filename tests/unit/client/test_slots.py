"""What is remembered of one credential."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from tokenward.client.credentials import Change, Credential, Values
from tokenward.client.slots import Slot
from tokenward.errors import DeniedError, Reason


def version(number: int, *, ttl_s: float | None = 60, stale: bool = False) -> Change:
    expires = datetime.now(UTC) + timedelta(seconds=ttl_s) if ttl_s is not None else None
    made = Credential(
        name="db",
        kind="leased",
        version=number,
        values=Values({"password": f"db-{number}"}),
        expires_at=expires,
        stale=stale,
    )
    return Change(name="db", credential=made)


def test_nothing_is_live_before_the_agent_spoke() -> None:
    slot = Slot("db")
    assert slot.live is None
    assert not slot.told.done()
    assert not slot.is_live(0)


def test_a_value_is_live_until_it_ends() -> None:
    slot = Slot("db")
    slot.take(version(1))
    assert slot.told.done()
    assert slot.live is not None
    assert slot.live[0]["password"] == "db-1"
    assert slot.is_live(time.time())
    assert not slot.is_live(time.time() + 61)


def test_a_value_without_an_end_stays_live() -> None:
    slot = Slot("db")
    slot.take(version(1, ttl_s=None))
    assert slot.is_live(1e18)


def test_an_error_drops_the_value_at_once() -> None:
    slot = Slot("db")
    slot.take(version(1))
    assert slot.take(Change(name="db", error=DeniedError(Reason.IDENTITY_CHANGED, "no more")))
    assert slot.live is None
    assert slot.change.credential is None


def test_the_same_state_again_is_no_news() -> None:
    slot = Slot("db")
    first = version(1)
    assert slot.take(first)
    assert not slot.take(Change(name="db", credential=first.credential))
    assert slot.take(version(1, stale=True))
    assert slot.take(version(2))


def test_a_forked_child_keeps_the_value_but_its_first_reader_must_wake_it() -> None:
    slot = Slot("db")
    slot.take(version(1))
    slot.sleep()
    assert slot.live is None
    assert slot.told.done()
    slot.wake()
    assert slot.live is not None


def test_a_callback_that_fails_does_not_keep_the_others_from_being_called(caplog: pytest.LogCaptureFixture) -> None:
    slot = Slot("db")
    seen: list[Change] = []

    def fails(change: Change) -> None:
        raise ValueError("the application's mistake")

    slot.callbacks += [fails, seen.append]
    change = version(1)
    slot.call_back(change)
    assert seen == [change]
    assert "callback" in caplog.text
    assert "db-1" not in caplog.text
