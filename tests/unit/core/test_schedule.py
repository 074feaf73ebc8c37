"""core.schedule: when a value is refreshed, how long a failure waits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.making import instant, issued
from tokenward.core.model import Policy
from tokenward.core.schedule import backoff_s, capped, due, is_worth_renewing

POLICY = Policy(refresh_at=0.67, max_ttl_s=3600)


@pytest.mark.parametrize(("draw", "share"), [(0.0, 0.603), (0.5, 0.67), (1.0, 0.737)])
def test_a_refresh_is_due_at_two_thirds_of_the_life_give_or_take_a_tenth(draw: float, share: float) -> None:
    when = due(issued(lifetime_s=1000, at=50), POLICY, draw=draw, margin_s=6)
    assert when.mono == pytest.approx(50 + share * 1000)
    assert when.wall - when.mono == pytest.approx(instant(0).wall)


@pytest.mark.parametrize(("draw", "after"), [(0.0, 335), (0.5, 502.5), (1.0, 670)])
def test_the_first_refresh_comes_at_any_time_from_half_of_that_on(draw: float, after: float) -> None:
    """Agents that were started together part here, and never meet again."""
    assert due(issued(lifetime_s=1000), POLICY, draw=draw, margin_s=6, first=True).mono == pytest.approx(after)


def test_a_refresh_leaves_room_for_the_attempts() -> None:
    assert due(issued(lifetime_s=20), POLICY, draw=1.0, margin_s=6).mono == 14


def test_a_life_too_short_for_the_margin_is_used_by_half() -> None:
    assert due(issued(lifetime_s=8), POLICY, draw=0.5, margin_s=6).mono == 4


def test_a_polled_value_is_due_after_its_interval_and_never_after_its_end() -> None:
    polled = replace(issued(lifetime_s=3600), refresh_s=30.0)
    assert due(polled, POLICY, draw=0.5, margin_s=6).mono == pytest.approx(30)
    assert due(replace(polled, refresh_s=9999.0), POLICY, draw=0.5, margin_s=6).mono == 3600


def test_a_renewed_value_is_due_after_its_renewal() -> None:
    renewed = replace(issued(lifetime_s=100), renewed=instant(60), expires=instant(160))
    assert due(renewed, POLICY, draw=0.5, margin_s=6).mono == pytest.approx(60 + 67)


def test_no_value_lives_longer_than_its_policy_allows() -> None:
    long = issued(lifetime_s=9000, at=10)
    assert capped(long, POLICY).expires == instant(3610)
    assert capped(issued(lifetime_s=100), POLICY).expires == instant(100)


def test_the_cap_counts_from_the_first_issue_however_often_it_was_renewed() -> None:
    renewed = replace(issued(lifetime_s=100), renewed=instant(3590), expires=instant(3690))
    assert capped(renewed, POLICY).expires == instant(3600)


def test_a_renewal_that_buys_less_than_half_a_life_is_not_worth_it() -> None:
    before = issued(lifetime_s=20)
    now = instant(14)
    assert is_worth_renewing(before, replace(before, expires=instant(24)), now)
    assert not is_worth_renewing(before, replace(before, expires=instant(23)), now)


def test_renewals_end_when_they_buy_little_and_do_not_come_ever_faster() -> None:
    """A life of 20 s that can be prolonged to 60, refreshed early: each renewal near the end buys less."""
    held, renewals = issued(lifetime_s=20), 0
    while True:
        now = due(held, Policy(refresh_at=0.3), draw=0.5, margin_s=6)
        renewed = replace(held, renewed=now, new_s=held.full_life_s, expires=instant(min(now.mono + 20, 60)))
        if not is_worth_renewing(held, renewed, now):
            break
        held, renewals = renewed, renewals + 1
    assert renewals < 12
    assert held.expires.mono - now.mono > 5, "and leave time to obtain a new one"


def test_backoff_doubles_to_a_cap_and_never_hammers() -> None:
    assert [backoff_s(failures, draw=1.0) for failures in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 30.0]
    assert backoff_s(1, draw=0.0) == pytest.approx(0.05)
