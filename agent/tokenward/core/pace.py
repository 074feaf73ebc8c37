"""A budget of calls per second, so that a backlog is worked off instead of thrown at the vault. Pure."""

from __future__ import annotations

_BURST_S = 1.0


class Pace:
    """A token bucket that is charged for what was really done.

    `rate` is in calls per second; a second's worth of them may be made at once.

    Whoever starts something is charged one call for it at once, and the calls that were counted meanwhile, by whomever
    they were made: refreshes make room for callers, never the other way round. A burst of callers delays them by two
    seconds at most; what cannot wait is for whoever asks to decide.
    """

    __slots__ = ("_at_mono", "_calls", "_level", "_started", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        """May be changed at any time."""
        self._level = self._burst
        self._at_mono: float | None = None
        self._calls = 0
        self._started = 0

    @property
    def _burst(self) -> float:
        return max(1.0, self.rate * _BURST_S)

    def room(self, now_mono: float, calls: int) -> int:
        """How many may be started at `now_mono`; `calls` counts all that were made so far."""
        if self._at_mono is not None:
            earned = (now_mono - self._at_mono) * self.rate
            spent = max(calls - self._calls, self._started)
            self._level = max(-self._burst, min(self._burst, self._level - spent + earned))
        self._at_mono, self._calls, self._started = now_mono, calls, 0
        return max(0, int(self._level))

    def start(self, count: int) -> None:
        """`count` were started since `room` was asked."""
        self._started += count

    def wait_s(self) -> float:
        """Seconds from the last `room` until there is room for one."""
        return max(0.0, 1.0 - (self._level - self._started)) / self.rate
