"""core.pace: whatever is asked when, nothing goes beyond the budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenward.core.pace import Pace

steps = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 20)), min_size=1, max_size=50)


@given(st.floats(0.1, 100), steps)
def test_what_is_started_keeps_to_the_rate_and_one_burst(rate: float, asked: list[tuple[float, int]]) -> None:
    pace = Pace(rate)
    now = total = 0.0
    for pause_s, wanted in asked:
        now += pause_s
        started = min(wanted, pace.room(now, int(total)))
        pace.start(started)
        total += started
        assert total <= max(1.0, rate) + rate * now + 1e-6


@given(st.floats(0.1, 100), steps)
def test_the_calls_of_others_count_and_there_is_room_again_when_it_was_said(
    rate: float, others: list[tuple[float, int]]
) -> None:
    pace = Pace(rate)
    now, calls = 0.0, 0
    for pause_s, made in others:
        now += pause_s
        calls += made
        if pace.room(now, calls) == 0:
            wait_s = pace.wait_s()
            assert pace.room(now + wait_s * 0.99, calls) == 0
            now += wait_s * 1.01
            assert pace.room(now, calls) >= 1


def test_a_burst_of_others_delays_by_two_seconds_at_most() -> None:
    pace = Pace(10)
    pace.room(0, 0)
    assert pace.room(1, 1_000_000) == 0
    assert pace.wait_s() == pytest.approx(1.1)
    assert pace.room(3, 1_000_000) == 10


def test_a_step_that_starts_nothing_costs_nothing() -> None:
    pace = Pace(10)
    assert [pace.room(0, 0) for _ in range(5)] == [10] * 5
    assert pace.wait_s() == 0


def test_more_calls_per_start_than_one_are_paid_afterwards() -> None:
    pace = Pace(10)
    assert pace.room(0, 0) == 10
    pace.start(10)
    assert pace.room(1, 30) == 0
    assert pace.wait_s() == pytest.approx(1.1)
