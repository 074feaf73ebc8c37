"""Token buckets: never more than the burst and what was earned, for any pattern of asking; and never less."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokenward.core.rates import Rates

pauses = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 30)), min_size=1, max_size=30)
rates_per_s = st.floats(0.01, 1000)
bursts = st.integers(1, 50)


@given(pauses, rates_per_s, bursts)
def test_in_no_stretch_of_time_more_than_the_burst_and_what_was_earned(
    asked: list[tuple[float, int]], rate: float, burst: int
) -> None:
    rates: Rates[str] = Rates()
    now, grants = 0.0, list[float]()
    for pause_s, times in asked:
        now += pause_s
        grants += [now for _ in range(times) if rates.take("a", now, rate=rate, burst=burst) == 0]
    for first, since in enumerate(grants):
        for last in range(first, len(grants)):
            assert last - first + 1 <= burst + (grants[last] - since) * rate * (1 + 1e-6) + 1e-6


@given(pauses, rates_per_s, bursts)
def test_who_waits_as_it_is_told_is_granted_and_no_sooner(
    asked: list[tuple[float, int]], rate: float, burst: int
) -> None:
    rates: Rates[str] = Rates()
    now = 0.0
    for pause_s, times in asked:
        now += pause_s
        for _ in range(times):
            wait_s = rates.take("a", now, rate=rate, burst=burst)
            if wait_s > 1e-6:
                assert rates.wait_s("a", now + wait_s * 0.999, rate=rate, burst=burst) > 0
                now += wait_s
                assert rates.take("a", now, rate=rate, burst=burst) < 1e-6


@given(st.floats(0, 1e9), rates_per_s, st.integers(2, 200))
def test_who_keeps_to_its_rate_is_never_refused(began: float, rate: float, times: int) -> None:
    rates: Rates[str] = Rates()
    assert all(rates.take("a", began + at * 1.000001 / rate, rate=rate, burst=1) < 1e-5 for at in range(times))


@given(st.lists(st.integers(0, 100), max_size=300), st.integers(1, 10))
def test_no_more_keys_than_said_are_remembered(keys: list[int], most: int) -> None:
    rates: Rates[int] = Rates(most=most)
    for at, key in enumerate(keys):
        rates.take(key, at / 100, rate=1.0, burst=2.0)
        assert len(rates) <= most
