"""vault.breaker, for every order of calls, answers and health checks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tokenward.vault.breaker import CAP_S, FAILURES_TO_OPEN, Admission, Breaker

draws = st.floats(0, 1, exclude_max=True)
which = st.integers(0, 1 << 30)


class Calls(RuleBasedStateMachine):
    """Many callers of one address, whose calls end in any order and at any time."""

    @initialize()
    def begin(self) -> None:
        self.breaker = Breaker()
        self.now_mono = 0.0
        self.under_way: list[tuple[Admission, bool]] = []
        self.probes = 0

    def _ended(self, number: int) -> Admission | None:
        """One call that is under way, no longer so; the breaker is told by the rule."""
        if not self.under_way:
            return None
        admission, is_probe = self.under_way.pop(number % len(self.under_way))
        self.probes -= is_probe
        return admission

    def _closed(self) -> None:
        """Calls that were probes are ordinary ones from now on."""
        self.under_way = [(admission, False) for admission, _ in self.under_way]
        self.probes = 0

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now_mono += seconds

    @rule()
    def a_caller_comes(self) -> None:
        is_probe, wait_s = not self.breaker.is_closed, self.breaker.wait_s(self.now_mono)
        admission = self.breaker.admit(self.now_mono)
        assert (admission is not None) == (wait_s == 0)
        if admission is not None:
            self.under_way.append((admission, is_probe))
            self.probes += is_probe

    @rule(number=which)
    def a_call_succeeds(self, number: int) -> None:
        if self._ended(number) is not None:
            self.breaker.succeeded()
            assert self.breaker.is_closed
            self._closed()

    @rule(number=which, draw=draws)
    def a_call_fails(self, number: int, draw: float) -> None:
        admission = self._ended(number)
        if admission is not None:
            self.breaker.failed(admission, now_mono=self.now_mono, draw=draw)

    @rule(number=which)
    def a_call_ends_without_a_verdict(self, number: int) -> None:
        admission = self._ended(number)
        if admission is not None:
            self.breaker.released(admission)

    @rule()
    def health_is_good(self) -> None:
        self.breaker.healthy()
        assert self.breaker.is_closed
        self._closed()

    @invariant()
    def one_probe_at_a_time(self) -> None:
        assert self.probes <= 1

    @invariant()
    def it_is_never_shut_for_longer_than_the_cap(self) -> None:
        assert 0 <= self.breaker.wait_s(self.now_mono) <= CAP_S
        if not self.probes:
            later = self.now_mono + CAP_S
            assert self.breaker.wait_s(later) == 0


TestCalls = Calls.TestCase


@given(st.lists(draws, min_size=1, max_size=30))
def test_however_often_the_probe_fails_the_time_is_positive_and_under_its_cap(jitter: list[float]) -> None:
    breaker, now_mono = Breaker(), 0.0
    for draw in [*jitter[:1] * (FAILURES_TO_OPEN - 1), *jitter]:
        now_mono += breaker.wait_s(now_mono) + 1e-6
        admission = breaker.admit(now_mono)
        assert admission is not None
        breaker.failed(admission, now_mono=now_mono, draw=draw)
    assert 0 < breaker.wait_s(now_mono) <= CAP_S
