"""The back-off of reconnecting."""

from hypothesis import given
from hypothesis import strategies as st

from tokenward.client.watcher import backoff_s


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_back_off_lies_between_nothing_and_five_seconds(attempt: int, draw: float) -> None:
    assert 0 <= backoff_s(attempt, draw) < 5.0


def test_the_cap_doubles_from_a_tenth_of_a_second() -> None:
    almost = 1 - 1e-9
    assert [round(backoff_s(attempt, almost), 3) for attempt in range(1, 9)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


@given(st.integers(1, 20))
def test_the_jitter_is_full(attempt: int) -> None:
    """Clients that lost one agent together do not come back together."""
    assert backoff_s(attempt, 0.0) == 0.0
    assert backoff_s(attempt, 0.5) * 2 == backoff_s(attempt, 1.0)
