"""The credentials that the agent holds, and what to do about each: one synchronous decision per call.

Owns: the current version of each key, the one before it while they overlap, and the state of failure. Leaves to the
broker: all I/O, and telling watchers. Only the broker writes. Nothing in here awaits, so no caller sees a half-made
change.

    state of a key            what a caller gets             what the refresher is told
    ------------------------  -----------------------------  ------------------------------------------
    unknown                   Fetch (once), then Wait        -
    fetch in flight           Wait, or Hit while one lives   -
    live                      Hit                            Refresh when due, Lapse when idle since then
    live, refresh failed      Hit, stale                     Refresh after the back-off
    nothing live, failed      Failed until the back-off ends Refresh after the back-off if watched, else Lapse
    overlap                   Hit with `previous`            Retire when the overlap ends
    ended by the vault        as before the first value      as before the first value

Invariant: what `decide` returns in a Hit is live at the `now` it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from tokenward.core.handover import Held
from tokenward.core.model import AnyGrant, Instant, Issued, Key, Served, Version
from tokenward.core.schedule import backoff_s, due
from tokenward.errors import Reason, TokenwardError


@dataclass(frozen=True, slots=True)
class Hit:
    """A live value: answer at once."""

    served: Served


@dataclass(frozen=True, slots=True)
class Wait:
    """Somebody is fetching already: share the outcome."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Nobody is: the caller of `decide` must fetch, and end it with `put` or `fail`."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last attempt failed and it is too early for another."""

    error: TokenwardError
    retry_after_s: float


Decision = Hit | Wait | Fetch | Failed

_BACK_WITHIN_S = 3.0
_TOLD_TO_WAIT = Reason.VAULT_RATE_LIMITED
"""The vault itself said when to come again, and is obeyed."""
_LAST_PAUSE_S = 0.5
"""The shortest wait between attempts at the very end of a value's life."""


@dataclass(frozen=True, slots=True)
class Refresh:
    """Renew or replace the value of `key` now; `urgent` when it ends so soon that the attempts can hardly wait."""

    key: Key
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Retire:
    """The overlap of `key` has ended: revoke the previous version."""

    key: Key


@dataclass(frozen=True, slots=True)
class Lapse:
    """Nobody wants `key` any more, or it has expired: let it go."""

    key: Key


Task = Refresh | Retire | Lapse


@dataclass(slots=True)
class _Entry:
    grant: AnyGrant
    current: Version | None = None
    previous: Version | None = None
    retire: Instant | None = None
    number: int = 0
    in_flight: bool = False
    used_mono: float = 0.0
    failures: int = 0
    error: TokenwardError | None = None
    retry_mono: float = 0.0
    looked_mono: float | None = None
    """When somebody's report last made us look again."""
    served: Served | None = field(default=None, repr=False)
    """The answer for the state as it is, made once: a hit allocates nothing."""


class Store:
    """Decides for each key. `margin_s` is the time to leave before an expiry for attempts to refresh, in seconds."""

    def __init__(self, *, margin_s: float) -> None:
        self._margin_s = margin_s
        self._entries: dict[Key, _Entry] = {}
        self._numbers: dict[Key, int] = {}
        """The last version number of each key that was dropped: the count goes on when it comes back."""

    # -- asked by callers ---------------------------------------------------------------------------------------

    def decide(self, key: Key, grant: AnyGrant, now: Instant) -> Decision:
        """What to do for a caller of `key`. After `Fetch` the key is in flight until `put` or `fail`."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(grant, number=self._numbers.pop(key, 0))
        entry.used_mono = now.mono
        if entry.current is not None and entry.current.issued.is_live(now):
            return Hit(self._answer(key, entry, now))
        if entry.in_flight:
            return Wait()
        if entry.error is not None and now.mono < entry.retry_mono:
            return Failed(entry.error, entry.retry_mono - now.mono)
        entry.in_flight = True
        return Fetch()

    def live(self, key: Key, now: Instant) -> Served | None:
        """The live value of `key` without counting as a use, or None."""
        entry = self._entries.get(key)
        if entry is None or entry.current is None or not entry.current.issued.is_live(now):
            return None
        return self._answer(key, entry, now)

    # -- written by the broker ----------------------------------------------------------------------------------

    def begin(self, key: Key) -> bool:
        """Marks a refresh of `key` as in flight; False when one is already, or the key is gone."""
        entry = self._entries.get(key)
        if entry is None or entry.in_flight:
            return False
        entry.in_flight = True
        return True

    def put(self, key: Key, issued: Issued, *, fingerprint: str, draw: float, now: Instant) -> tuple[Issued, ...]:
        """Stores what was obtained and ends the flight; returns what must be revoked at once.

        The same values again prolong the version that is there. A new value becomes the next
        version, and the one before stays valid for the overlap, or until its own end if that is earlier. A second new
        value within an overlap displaces the older of the two.
        """
        entry = self._entries[key]
        entry.in_flight, entry.failures, entry.error, entry.served = False, 0, None, None
        before = entry.current
        if before is not None and before.issued.values == issued.values:
            when = due(issued, entry.grant.policy, draw=before.draw, margin_s=self._margin_s)
            entry.current = Version(
                number=before.number,
                issued=issued,
                since=before.since,
                draw=before.draw,
                due=when,
                fingerprint=before.fingerprint,
            )
            return ()
        was_live = before is not None and before.issued.is_live(now)
        displaced = entry.previous
        entry.number += 1
        entry.current = Version(
            number=entry.number,
            issued=issued,
            since=issued.issued,
            draw=draw,
            due=due(issued, entry.grant.policy, draw=draw, margin_s=self._margin_s, first=not was_live),
            fingerprint=fingerprint,
        )
        entry.previous, entry.retire = None, None
        ended = [displaced.issued] if displaced is not None else []
        if before is not None:
            overlap_s = min(entry.grant.policy.overlap_s, before.issued.expires.mono - now.mono)
            if was_live and overlap_s > 0:
                entry.previous, entry.retire = before, Instant(now.wall + overlap_s, now.mono + overlap_s)
            else:
                ended.append(before.issued)
        return tuple(ended)

    def fail(self, key: Key, error: TokenwardError, *, draw: float, now: Instant) -> None:
        """Ends the flight without a value: what lives stays and is stale, the next attempt waits for the back-off."""
        entry = self._entries[key]
        if entry.error is None:
            entry.served = None  # it is stale from now on; another failure is no news
        entry.in_flight, entry.error = False, error
        entry.failures += 1
        after_s = error.retry_after_s or 0.0
        wait_s = max(backoff_s(entry.failures, draw=draw), after_s)
        if entry.current is not None and entry.current.issued.is_live(now):
            left_s = entry.current.issued.expires.mono - now.mono
            wait_s = min(wait_s, max(left_s / 2, _LAST_PAUSE_S))  # the vault may be back before the value ends
        entry.retry_mono = now.mono + (max(wait_s, after_s) if error.reason is _TOLD_TO_WAIT else wait_s)

    def encourage(self, draw: Callable[[], float], now: Instant) -> None:
        """The vault is back: what failed is tried again within a few seconds, each at its own time, if not earlier."""
        for entry in self._entries.values():
            if entry.error is not None and entry.error.reason is not _TOLD_TO_WAIT:
                entry.retry_mono = min(entry.retry_mono, now.mono + draw() * _BACK_WITHIN_S)

    def abort(self, key: Key) -> None:
        """Ends the flight without an outcome."""
        self._entries[key].in_flight = False

    def hasten(self, key: Key, version: int, *, grace_s: float, now: Instant) -> None:
        """Everybody uses `version`: if that is the current one, the overlap ends in `grace_s` seconds at the latest."""
        entry = self._entries.get(key)
        if entry is None or entry.retire is None or entry.current is None or entry.current.number != version:
            return
        if now.mono + grace_s < entry.retire.mono:
            entry.retire, entry.served = Instant(now.wall + grace_s, now.mono + grace_s), None

    def may_look_again(self, key: Key, version: int, *, pause_s: float, now: Instant) -> bool:
        """Whether a report that `version` was refused is worth a look: it is current, and none was taken just now."""
        entry = self._entries.get(key)
        if entry is None or entry.in_flight or entry.current is None or entry.current.number != version:
            return False
        if entry.looked_mono is not None and now.mono - entry.looked_mono < pause_s:
            return False
        entry.looked_mono = now.mono
        return True

    def retire(self, key: Key) -> tuple[Issued, ...]:
        """Ends the overlap of `key`; returns what must be revoked."""
        entry = self._entries.get(key)
        if entry is None or entry.previous is None:
            return ()
        ended = entry.previous.issued
        entry.previous, entry.retire, entry.served = None, None, None
        return (ended,)

    def void(self, key: Key) -> tuple[Issued, ...]:
        """The vault ended what is held of `key`: nothing of it is served again; returns what may be left to revoke."""
        entry = self._entries[key]
        ended = tuple(version.issued for version in (entry.previous, entry.current) if version is not None)
        entry.current, entry.previous, entry.retire, entry.served = None, None, None, None
        return ended

    def drop(self, key: Key) -> tuple[Issued, ...]:
        """Forgets `key`; returns everything that must be revoked."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return ()
        self._numbers[key] = entry.number
        return tuple(version.issued for version in (entry.previous, entry.current) if version is not None)

    def drop_all(self) -> dict[Key, tuple[Issued, ...]]:
        """Forgets everything; returns what must be revoked, by key."""
        return {key: self.drop(key) for key in tuple(self._entries)}

    # -- handed from one agent to the next ------------------------------------------------------------------------

    def held(self, now: Instant, digest: Callable[[Key], str]) -> tuple[Held, ...]:
        """Every live value, as the next agent takes it over; `digest` says what a key's grant is."""
        return tuple(
            Held(
                key=key,
                grant_digest=digest(key),
                current=entry.current,
                previous=entry.previous,
                retire=entry.retire,
                used_mono=entry.used_mono,
            )
            for key, entry in self._entries.items()
            if entry.current is not None and entry.current.issued.is_live(now)
        )

    def adopt(self, held: Held, grant: AnyGrant) -> None:
        """Takes over what an agent before this one held, for a key that is not known yet."""
        self._entries[held.key] = _Entry(
            grant,
            current=held.current,
            previous=held.previous,
            retire=held.retire,
            number=held.current.number,
            used_mono=held.used_mono,
        )

    @property
    def numbers(self) -> dict[Key, int]:
        """The last version number of each key that has no live value to tell it."""
        without = {key: entry.number for key, entry in self._entries.items() if entry.current is None and entry.number}
        return self._numbers | without

    def count_on(self, numbers: Mapping[Key, int]) -> None:
        """The count of these keys goes on after these numbers."""
        self._numbers |= numbers

    # -- asked by the refresher ---------------------------------------------------------------------------------

    def due(self, now: Instant, watched: Container[Key]) -> tuple[Task, ...]:
        """What must be done at `now`, the most urgent refresh first. `watched` are keys in use even if nobody asks."""
        by_urgency = sorted(self._entries.items(), key=lambda item: _end_mono(item[1]))
        return tuple(task for key, entry in by_urgency for task in self._tasks(key, entry, now, watched))

    def next_due_mono(self) -> float | None:
        """The monotonic time at which `due` may next return something; None when nothing is held."""
        return min((_wake_mono(entry) for entry in self._entries.values() if not entry.in_flight), default=None)

    @property
    def keys(self) -> AbstractSet[Key]:
        """The keys that are known, whether they have a value or not."""
        return self._entries.keys()

    def __len__(self) -> int:
        return len(self._entries)

    # -- within -------------------------------------------------------------------------------------------------

    def _tasks(self, key: Key, entry: _Entry, now: Instant, watched: Container[Key]) -> Iterator[Task]:
        if entry.in_flight:
            return
        if entry.retire is not None and now.mono >= entry.retire.mono:
            yield Retire(key)
        if now.mono < _refresh_mono(entry):
            return
        current = entry.current
        is_live = current is not None and current.issued.is_live(now)
        urgent = is_live and _end_mono(entry) - now.mono < self._margin_s
        if key in watched:
            entry.used_mono = now.mono  # being watched is being used
            yield Refresh(key, urgent)
        elif current is None or not is_live or _is_idle(entry, current, now):
            yield Lapse(key)
        else:
            yield Refresh(key, urgent)

    def _answer(self, key: Key, entry: _Entry, now: Instant) -> Served:
        previous = entry.previous
        if previous is not None and not previous.issued.is_live(now):
            previous, entry.served = None, None
        if entry.served is None:
            assert entry.current is not None
            entry.served = Served(
                key=key,
                kind=entry.grant.kind,
                current=entry.current,
                previous=previous,
                retire=entry.retire if previous is not None else None,
                stale=entry.error is not None,
            )
        return entry.served


def _is_idle(entry: _Entry, current: Version, now: Instant) -> bool:
    began = current.issued.renewed or current.issued.issued
    life_s = current.issued.expires.mono - began.mono
    return now.mono - entry.used_mono >= life_s


def _refresh_mono(entry: _Entry) -> float:
    if entry.error is not None or entry.current is None:
        return entry.retry_mono
    return entry.current.due.mono


def _end_mono(entry: _Entry) -> float:
    """When the value ends; at once, where there is none."""
    return entry.current.issued.expires.mono if entry.current is not None else 0.0


def _wake_mono(entry: _Entry) -> float:
    refresh_mono = _refresh_mono(entry)
    return refresh_mono if entry.retire is None else min(refresh_mono, entry.retire.mono)
