"""The clock stepped, in process: no value ends early or is served late because somebody set the time.

What the vault counts (a lease) ends by the clock that never steps; what says itself when it ends (a JWT) ends by the
wall clock too, since that is what the far end compares with.
"""

from __future__ import annotations

import pytest

from tests.making import instant as agreeing
from tests.making import issued, kv_grant
from tokenward.core.model import Instant, Key
from tokenward.core.store import Failed, Fetch, Hit, Store

KEY = Key("app", "api")
GRANT = kv_grant()
LIFETIME_S = 100.0
HOUR_S = 3600.0


class SteppedClock:
    """Two clocks that agree until somebody sets the wall clock."""

    def __init__(self) -> None:
        self._mono = self._step_s = 0.0

    def now(self) -> Instant:
        both = agreeing(self._mono)
        return Instant(both.wall + self._step_s, both.mono)

    def advance(self, seconds: float) -> None:
        self._mono += seconds

    def step(self, seconds: float) -> None:
        self._step_s += seconds


def holding(clock: SteppedClock, *, wall_bound: bool) -> Store:
    """A store with one value that was obtained now."""
    store = Store(margin_s=6)
    assert isinstance(store.decide(KEY, GRANT, clock.now()), Fetch)
    value = issued(lifetime_s=LIFETIME_S, wall_bound=wall_bound)
    store.put(KEY, value, fingerprint="", draw=0.5, now=clock.now())
    return store


def is_served(store: Store, clock: SteppedClock) -> bool:
    decision = store.decide(KEY, GRANT, clock.now())
    assert not isinstance(decision, Failed)
    return isinstance(decision, Hit)


@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S, 24 * 365 * HOUR_S])
def test_a_lease_does_not_care(step_s: float) -> None:
    clock = SteppedClock()
    store = holding(clock, wall_bound=False)
    clock.step(step_s)
    assert is_served(store, clock)
    clock.advance(LIFETIME_S - 1)
    assert is_served(store, clock)
    clock.advance(1)
    assert not is_served(store, clock)


def test_what_says_itself_when_it_ends_is_gone_when_the_clock_is_set_past_that() -> None:
    clock = SteppedClock()
    store = holding(clock, wall_bound=True)
    clock.step(LIFETIME_S)
    assert not is_served(store, clock), "the far end would refuse it"


def test_a_clock_that_is_set_back_gives_no_value_a_longer_life() -> None:
    clock = SteppedClock()
    store = holding(clock, wall_bound=True)
    clock.step(-HOUR_S)
    assert is_served(store, clock)
    clock.advance(LIFETIME_S)
    assert not is_served(store, clock)


@pytest.mark.parametrize("wall_bound", [True, False])
@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S])
def test_the_refresh_comes_before_the_end_all_the_same(step_s: float, *, wall_bound: bool) -> None:
    clock = SteppedClock()
    store = holding(clock, wall_bound=wall_bound)
    clock.step(step_s)
    due_mono = store.next_due_mono()
    assert due_mono is not None
    assert due_mono <= LIFETIME_S
    clock.advance(due_mono)
    tasks = [task.key for task in store.due(clock.now(), {KEY})]
    assert KEY in tasks
