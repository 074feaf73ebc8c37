"""Token buckets by key: what is granted, what is waited for, and what is forgotten."""

from __future__ import annotations

import math

from tokenward.core.rates import Rates


def granted(rates: Rates[str], key: str, at_mono: float, times: int, *, rate: float = 2.0, burst: float = 4.0) -> int:
    """How many of `times` tries at one moment are granted."""
    return sum(rates.take(key, at_mono, rate=rate, burst=burst) == 0 for _ in range(times))


def test_a_burst_at_once_and_then_as_many_as_are_earned() -> None:
    rates: Rates[str] = Rates()
    assert granted(rates, "a", 100.0, 10) == 4
    assert granted(rates, "a", 100.4, 10) == 0
    assert granted(rates, "a", 100.5, 10) == 1
    assert granted(rates, "a", 102.5, 10) == 4
    assert granted(rates, "a", 1000.0, 10) == 4, "and never more than a burst"


def test_who_waits_as_long_as_it_was_told_is_granted() -> None:
    rates: Rates[str] = Rates()
    granted(rates, "a", 0.0, 4, rate=0.3)
    wait_s = rates.take("a", 0.0, rate=0.3, burst=4.0)
    assert math.isclose(wait_s, 1 / 0.3)
    assert rates.wait_s("a", wait_s - 0.01, rate=0.3, burst=4.0) > 0
    assert rates.take("a", wait_s, rate=0.3, burst=4.0) == 0


def test_what_was_refused_costs_nothing() -> None:
    rates: Rates[str] = Rates()
    assert granted(rates, "a", 0.0, 1000) == 4
    assert granted(rates, "a", 0.5, 1) == 1


def test_keys_know_nothing_of_each_other() -> None:
    rates: Rates[str] = Rates()
    assert granted(rates, "a", 0.0, 10) == 4
    assert granted(rates, "b", 0.0, 10) == 4


def test_a_debt_is_earned_back_first() -> None:
    rates: Rates[str] = Rates()
    rates.spend("a", 0.0, rate=2.0, cost=10.0)
    assert rates.wait_s("a", 0.0, rate=2.0, burst=4.0) == 3.5
    assert granted(rates, "a", 3.5, 10) == 1


def test_an_infinite_rate_refuses_nobody() -> None:
    rates: Rates[str] = Rates()
    assert granted(rates, "a", 0.0, 1000, rate=math.inf, burst=1.0) == 1000


def test_so_many_keys_are_remembered_and_the_one_that_was_quiet_longest_begins_anew() -> None:
    rates: Rates[str] = Rates(most=2)
    for key in ("a", "b"):
        granted(rates, key, 0.0, 4)
    assert granted(rates, "a", 0.5, 1) == 1
    granted(rates, "c", 0.5, 4)
    assert len(rates) == 2
    assert granted(rates, "a", 0.5, 4) == 0
    assert granted(rates, "b", 0.5, 10) == 4
