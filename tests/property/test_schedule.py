"""core.schedule, for every life, draw and margin."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.making import instant, issued
from tokenward.core.model import Policy
from tokenward.core.schedule import backoff_s, capped, due

lives = st.floats(0.01, 1e6)
draws = st.floats(0, 1, exclude_max=True)


@given(lives, draws, st.floats(0.11, 0.9), st.floats(0, 60))
def test_a_refresh_is_after_the_beginning_and_before_the_end(
    life_s: float, draw: float, share: float, margin_s: float
) -> None:
    when = due(issued(lifetime_s=life_s, at=7), Policy(refresh_at=share), draw=draw, margin_s=margin_s)
    assert 7 < when.mono < 7 + life_s
    assert when.mono - 7 <= max(life_s - margin_s, life_s / 2) + 1e-6


@given(lives, st.tuples(draws, draws))
def test_a_larger_draw_never_refreshes_earlier(life_s: float, two: tuple[float, float]) -> None:
    early, late = sorted(two)
    value = issued(lifetime_s=life_s)
    assert due(value, Policy(), draw=early, margin_s=6).mono <= due(value, Policy(), draw=late, margin_s=6).mono


@given(lives, st.floats(1, 1e5))
def test_a_cap_only_ever_shortens_and_moves_both_clocks_alike(life_s: float, max_ttl_s: float) -> None:
    value = issued(lifetime_s=life_s, at=3)
    end = capped(value, Policy(max_ttl_s=max_ttl_s)).expires
    assert end.mono <= value.expires.mono
    assert end.mono <= 3 + max_ttl_s + 1e-6
    assert abs((end.wall - end.mono) - instant(0).wall) < 1e-3


@given(st.integers(1, 10_000), draws)
def test_a_back_off_is_never_zero_and_never_over_its_cap(failures: int, draw: float) -> None:
    assert 0 < backoff_s(failures, draw=draw) <= 30
