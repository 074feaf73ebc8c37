"""One address's circuit breaker: every transition of its table."""

from __future__ import annotations

import pytest

from tokenward.vault.breaker import CAP_S, FAILURES_TO_OPEN, FIRST_S, Admission, Breaker

LONGEST = 0.999


def admitted(breaker: Breaker, now_mono: float) -> Admission:
    admission = breaker.admit(now_mono)
    assert admission is not None
    return admission


def fail(breaker: Breaker, now_mono: float, *, times: int = 1, draw: float = LONGEST) -> None:
    for _ in range(times):
        breaker.failed(admitted(breaker, now_mono), now_mono=now_mono, draw=draw)


def opened(now_mono: float = 0.0, *, draw: float = LONGEST) -> Breaker:
    breaker = Breaker()
    fail(breaker, now_mono, times=FAILURES_TO_OPEN, draw=draw)
    return breaker


def test_it_opens_at_the_third_failure_in_a_row() -> None:
    breaker = Breaker()
    fail(breaker, 0.0, times=2)
    assert (breaker.is_closed, breaker.wait_s(0.0)) == (True, 0.0)
    fail(breaker, 0.0)
    assert not breaker.is_closed
    assert breaker.wait_s(0.0) == FIRST_S * LONGEST
    assert breaker.admit(0.5) is None


def test_a_success_in_between_begins_the_row_anew() -> None:
    breaker = Breaker()
    fail(breaker, 0.0, times=2)
    breaker.succeeded()
    fail(breaker, 0.0, times=2)
    assert breaker.is_closed


def test_once_its_time_is_over_one_probe_is_let_through_and_no_more() -> None:
    breaker = opened()
    assert breaker.wait_s(1.0) == 0.0
    admitted(breaker, 1.0)
    assert breaker.admit(100.0) is None
    assert breaker.wait_s(100.0) > 0
    assert not breaker.is_closed


def test_a_probe_that_succeeds_closes_it_and_the_back_off_begins_anew() -> None:
    breaker = opened()
    fail(breaker, 1.0)
    admitted(breaker, 10.0)
    breaker.succeeded()
    assert breaker.is_closed
    fail(breaker, 10.0, times=FAILURES_TO_OPEN)
    assert breaker.wait_s(10.0) == pytest.approx(FIRST_S * LONGEST)


def test_each_probe_that_fails_doubles_the_time_up_to_the_cap() -> None:
    breaker, now_mono, waits = opened(), 0.0, []
    for _ in range(6):
        waits.append(breaker.wait_s(now_mono))
        now_mono += waits[-1] + 0.01
        fail(breaker, now_mono)
    assert waits == pytest.approx([LONGEST * ceiling for ceiling in (1, 2, 4, 8, CAP_S, CAP_S)])


def test_the_time_has_full_jitter_but_never_none() -> None:
    assert opened(draw=0.5).wait_s(0.0) == FIRST_S * 0.5
    assert opened(draw=0.0).wait_s(0.0) == FIRST_S * 0.1


def test_a_probe_that_ends_without_a_verdict_leaves_its_place_to_the_next_caller() -> None:
    breaker = opened()
    breaker.released(admitted(breaker, 1.0))
    assert not breaker.is_closed
    admitted(breaker, 1.0)


def test_calls_that_were_on_their_way_when_it_opened_do_not_lengthen_its_time() -> None:
    breaker = Breaker()
    calls = [admitted(breaker, 0.0) for _ in range(8)]
    for call in calls:
        breaker.failed(call, now_mono=0.0, draw=LONGEST)
    assert breaker.wait_s(0.0) == FIRST_S * LONGEST


def test_a_call_from_before_neither_ends_nor_frees_the_probe() -> None:
    breaker = Breaker()
    old = admitted(breaker, 0.0)
    fail(breaker, 0.0, times=FAILURES_TO_OPEN)
    probe = admitted(breaker, 1.0)
    breaker.failed(old, now_mono=1.0, draw=LONGEST)
    breaker.released(old)
    assert breaker.admit(1.0) is None
    breaker.failed(probe, now_mono=1.0, draw=LONGEST)
    assert breaker.wait_s(1.0) == pytest.approx(2 * FIRST_S * LONGEST)


def test_a_late_success_of_a_call_from_before_closes_it_too() -> None:
    breaker = Breaker()
    admitted(breaker, 0.0)
    fail(breaker, 0.0, times=FAILURES_TO_OPEN)
    breaker.succeeded()
    assert breaker.is_closed


def test_a_good_health_answer_closes_it_on_trial() -> None:
    """An address whose health answers while calls hang is found out by one call, not by three, and for longer."""
    breaker = opened()
    breaker.healthy()
    assert breaker.is_closed
    fail(breaker, 0.1)
    assert breaker.wait_s(0.1) == pytest.approx(2 * FIRST_S * LONGEST)


def test_a_success_ends_the_trial() -> None:
    breaker = opened()
    breaker.healthy()
    breaker.succeeded()
    fail(breaker, 0.1, times=2)
    assert breaker.is_closed


def test_a_good_health_answer_forgives_nothing_while_it_is_closed_and_accuses_of_nothing() -> None:
    breaker = Breaker()
    breaker.healthy()
    fail(breaker, 0.0, times=2)
    assert breaker.is_closed
    breaker.healthy()
    fail(breaker, 0.0)
    assert not breaker.is_closed


def test_a_probe_from_before_a_good_health_answer_is_an_old_call() -> None:
    breaker = opened()
    probe = admitted(breaker, 1.0)
    breaker.healthy()
    breaker.failed(probe, now_mono=1.0, draw=LONGEST)
    assert breaker.is_closed
