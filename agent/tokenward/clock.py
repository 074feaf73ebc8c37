"""The agent's clocks, read at the edge and passed down as `Instant`."""

from __future__ import annotations

import time
from typing import Protocol

from tokenward.core.model import Instant


class Clock(Protocol):
    """Where `Instant` comes from."""

    def now(self) -> Instant:
        """Both clocks, read now."""


class SystemClock:
    """The system's clocks. The monotonic one counts suspended time too: a lease at the vault does not sleep with us."""

    def now(self) -> Instant:
        return Instant(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME))
