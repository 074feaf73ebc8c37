"""A clock that moves when it is told to."""

from __future__ import annotations

from tests.making import instant
from tokenward.core.model import Instant


class FakeClock:
    """Starts at zero of the monotonic clock; `advance` moves both clocks."""

    def __init__(self) -> None:
        self._mono = 0.0

    def now(self) -> Instant:
        return instant(self._mono)

    def advance(self, seconds: float) -> None:
        self._mono += seconds
