"""How often something may happen, for each of many: token buckets that are told apart by a key. Pure.

A bucket holds `burst` tokens and earns `rate` of them a second. It is remembered as the one moment at which it is full
again, so that one that is full is the same as one that nobody remembers. `pace` is the other bucket: of one user, who
is charged for calls that somebody else counted.

Invariants: within any t seconds a key is granted at most `burst` + t x `rate`; one that keeps to its rate is never
refused; at most `most` keys are remembered. When there are more, those that were quiet longest begin anew.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_ROUNDING_S = 1e-9
"""So that who waited as long as it was told is not told to wait for the rest of a rounding error."""


class Rates(Generic[K]):
    """Buckets by key. `now_mono` is in seconds on a clock that never steps back; a rate may be infinite."""

    __slots__ = ("_full_at", "_most")

    def __init__(self, *, most: int = 1024) -> None:
        self._most = most
        self._full_at: dict[K, float] = {}
        """When the bucket of a key is full again, the one that was used longest ago first."""

    def __len__(self) -> int:
        return len(self._full_at)

    def wait_s(self, key: K, now_mono: float, *, rate: float, burst: float) -> float:
        """Seconds until there is a token for `key`; 0 where there is one."""
        full_at = self._full_at.get(key)
        if full_at is None:
            return 0.0
        wait_s = full_at - now_mono - (burst - 1) / rate
        return wait_s if wait_s > _ROUNDING_S else 0.0

    def spend(self, key: K, now_mono: float, *, rate: float, cost: float = 1.0) -> None:
        """Takes `cost` tokens, whether or not they are there: a debt is earned back first."""
        full_at = max(self._full_at.pop(key, now_mono), now_mono)
        self._full_at[key] = full_at + cost / rate
        if len(self._full_at) > self._most:
            del self._full_at[next(iter(self._full_at))]

    def take(self, key: K, now_mono: float, *, rate: float, burst: float) -> float:
        """Takes a token if there is one. Seconds to wait for the next one, 0 where it was taken."""
        wait_s = self.wait_s(key, now_mono, rate=rate, burst=burst)
        if not wait_s:
            self.spend(key, now_mono, rate=rate)
        return wait_s
