"""Watchers: one slot per credential, newest wins; and who has moved on to a version."""

from __future__ import annotations

import asyncio

import pytest

from tokenward.core.model import Key
from tokenward.errors import Reason, VaultUnavailableError
from tokenward.watchers import Watchers

KEY, OTHER = Key("app", "one"), Key("app", "two")
ONE, TWO, THREE = (VaultUnavailableError(Reason.VAULT_ERROR, text) for text in ("1", "2", "3"))


async def test_a_slow_watcher_gets_the_newest_state_of_each_key_and_nothing_in_between() -> None:
    watchers = Watchers()
    with watchers.watch([KEY, OTHER], "me") as watcher:
        for state in (ONE, TWO, THREE):
            watchers.publish(KEY, state)
        watchers.publish(OTHER, ONE)
        assert await watcher.changes() == {KEY: THREE, OTHER: ONE}


async def test_a_watcher_hears_only_of_its_keys_and_only_while_it_watches() -> None:
    watchers = Watchers()
    with watchers.watch([KEY], "me") as watcher:
        watchers.publish(OTHER, ONE)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await watcher.changes()
        assert set(watchers.watched) == {KEY}
    watchers.publish(KEY, ONE)
    assert set(watchers.watched) == set()


async def test_a_cancelled_wait_loses_nothing() -> None:
    watchers = Watchers()
    with watchers.watch([KEY], "me") as watcher:
        waiting = asyncio.create_task(watcher.changes())
        await asyncio.sleep(0)
        watchers.publish(KEY, ONE)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await watcher.changes() == {KEY: ONE}


def test_everybody_has_moved_on_when_each_who_watches_has_said_so() -> None:
    watchers = Watchers()
    with watchers.watch([KEY], "one"), watchers.watch([KEY], "one"), watchers.watch([KEY], "other"):
        assert not watchers.acknowledge("one", KEY, 2)
        assert not watchers.acknowledge("stranger", KEY, 2)
        assert watchers.acknowledge("other", KEY, 2)
        assert not watchers.acknowledge("other", KEY, 3), "the others still use version 2"


def test_somebody_who_began_to_watch_in_between_is_waited_for() -> None:
    watchers = Watchers()
    with watchers.watch([KEY], "one"):
        assert watchers.acknowledge("one", KEY, 2)
        with watchers.watch([KEY], "late"):
            assert not watchers.acknowledge("one", KEY, 2)


def test_nobody_can_acknowledge_what_nobody_watches() -> None:
    assert not Watchers().acknowledge("one", KEY, 2)


def test_a_version_lent_to_somebody_who_does_not_watch_waits_for_the_end_of_the_overlap() -> None:
    watchers = Watchers()
    with watchers.watch([KEY], "one"):
        watchers.lend("one", KEY, 1)
        assert watchers.acknowledge("one", KEY, 2), "it watches, so it says when it has moved on"
        watchers.lend("passer-by", KEY, 2)
        assert not watchers.acknowledge("one", KEY, 3)
        assert watchers.acknowledge("one", KEY, 4)
