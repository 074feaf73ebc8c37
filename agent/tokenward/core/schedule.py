"""When a credential is looked at again: refresh times and back-off. Pure: clock and randomness are arguments."""

from __future__ import annotations

from dataclasses import replace

from tokenward.core.model import Instant, Issued, Policy

_SPREAD = 0.1
_BACKOFF_FIRST_S = 0.5
_BACKOFF_CAP_S = 30.0
_WORTHWHILE = 0.5


def due(issued: Issued, policy: Policy, *, draw: float, margin_s: float, first: bool = False) -> Instant:
    """When to refresh: `policy.refresh_at` of the life, +-10 % by `draw` in [0, 1).

    The `first` refresh of a key comes at any time from half of that to the whole: what was fetched together, at a
    start or by many agents at once, is not replaced together.

    Never so late that less than `margin_s` seconds are left for the attempts, except that a life too short for the
    margin is used at least by half. A value with a polling interval of its own is looked at again after that,
    spread likewise.
    """
    began = issued.renewed or issued.issued
    life_s = issued.expires.mono - began.mono
    spread = (1 + draw) / 2 if first else 1 - _SPREAD + 2 * _SPREAD * draw
    if issued.refresh_s is not None:
        after_s = min(issued.refresh_s * spread, life_s)
    else:
        after_s = min(life_s * policy.refresh_at * spread, max(life_s - margin_s, life_s / 2))
    return Instant(began.wall + after_s, began.mono + after_s)


def capped(issued: Issued, policy: Policy) -> Issued:
    """`issued` with its end no later than `policy.max_ttl_s` after it was obtained."""
    excess_s = issued.expires.mono - (issued.issued.mono + policy.max_ttl_s)
    if excess_s <= 0:
        return issued
    expires = Instant(issued.expires.wall - excess_s, issued.expires.mono - excess_s)
    return replace(issued, expires=expires)


def is_worth_renewing(before: Issued, after: Issued, now: Instant) -> bool:
    """Whether a renewal still bought something: at least half of the life that the value had when it was new.

    Near the end of what the vault allows, each renewal buys less; a new value is better than renewing ever faster.
    """
    return after.expires.mono - now.mono >= before.full_life_s * _WORTHWHILE


def backoff_s(failures: int, *, draw: float) -> float:
    """Seconds to wait after the given number of failures in a row: exponential, capped, full jitter by `draw`.

    A tenth of the ceiling is the least, so that a draw near 0 does not hammer.
    """
    ceiling_s = min(_BACKOFF_CAP_S, _BACKOFF_FIRST_S * (1 << min(failures - 1, 10)))
    return ceiling_s * max(0.1, draw)
