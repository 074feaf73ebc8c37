"""The broker: brings callers, the store, the issuers and the watchers together. It alone writes the store.

    get      decide in the store; on a miss one flight to the vault, shared by all who ask meanwhile
    renew    the refresher says that a key is due; the same flight, with nobody waiting
    flight   vault, then audit, then store, then watchers: never back

A flight belongs to the broker, not to the caller who began it: callers come and go, the flight ends by itself.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from tokenward.auditlog import AuditLog
from tokenward.clock import Clock
from tokenward.core.audit import Record
from tokenward.core.model import AnyGrant, Instant, Issued, Key, Served, Workload
from tokenward.core.policy import audience_of
from tokenward.core.schedule import backoff_s
from tokenward.core.store import Failed, Fetch, Hit, Store, Wait
from tokenward.errors import Reason, TokenwardError, UnavailableError, VaultUnavailableError
from tokenward.watchers import Watchers

_log = logging.getLogger(__name__)

_GRACE_S = 1.0
"""How long an old value outlives the last acknowledgement: somebody may be using what it read just before."""
_REPORT_PAUSE_S = 10.0
"""At most one look per credential and this time, however many callers report it refused."""


class Source(Protocol):
    """Where values come from: `issuers.Issuers`, which raise a TokenwardError for whatever the vault does."""

    async def issue(self, workload: Workload, grant: AnyGrant, audience: str, now: Instant) -> Issued:
        """A new value."""
        ...

    async def renew(self, issued: Issued, grant: AnyGrant, now: Instant) -> Issued | None:
        """The same value with a later end, or None when only a new one helps."""
        ...

    async def revoke(self, issued: Issued) -> None:
        """Ends what was made at the vault for `issued`."""
        ...


class Broker:
    """Answers from the store, fetches what is missing, keeps what is there, and revokes what has ended.

    `draw` gives the random fractions in [0, 1) that spread refreshes and back-off.
    """

    def __init__(
        self,
        *,
        store: Store,
        issuers: Source,
        watchers: Watchers,
        audit: AuditLog,
        clock: Clock,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._issuers = issuers
        self._watchers = watchers
        self._audit = audit
        self._clock = clock
        self._draw = draw
        self._subjects: dict[Key, tuple[Workload, AnyGrant]] = {}
        self._flights: dict[Key, asyncio.Task[Served]] = {}
        self._revocations: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()
        """Set whenever the store's next due time may have moved."""

    async def get(self, workload: Workload, grant: AnyGrant, audience: str, *, timeout_s: float) -> Served:
        """The live value of `grant` for `workload`: at once when there is one, else within `timeout_s` seconds.

        Raises:
            TokenwardError: what the vault's answer deserves; the same error for all who waited for it.
            VaultUnavailableError: no answer in time; the flight goes on for whoever asks next.
        """
        key = Key(workload.name, grant.name, audience_of(grant, audience))
        decision = self._store.decide(key, grant, self._clock.now())
        match decision:
            case Hit(served):
                return served
            case Failed(error, retry_after_s):
                error.retry_after_s = retry_after_s
                raise error.with_traceback(None)
            case Fetch():
                self._subjects[key] = (workload, grant)
                flight = self._depart(key)
            case Wait():
                flight = self._flights[key]
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(flight)
        except TimeoutError as error:
            raise VaultUnavailableError(
                Reason.VAULT_UNREACHABLE, f"the vault did not answer for {key} in time; the agent goes on trying"
            ) from error

    def renew(self, key: Key) -> None:
        """Starts the refresh of `key` unless one is under way; whoever watches is told the outcome."""
        if self._store.begin(key):
            self._depart(key)

    def moved_on(self, key: Key, version: int) -> None:
        """Everybody who was told of `version` of `key` uses it: the one before goes soon, not at the overlap's end."""
        self._store.hasten(key, version, grace_s=_GRACE_S, now=self._clock.now())
        self.changed.set()

    async def look_again(
        self, workload: Workload, grant: AnyGrant, audience: str, version: int, *, timeout_s: float
    ) -> Served:
        """What there is instead of `version`, which the far end refused: a new value, obtained at once unless somebody
        just had one obtained, else the one that is there.

        Raises TokenwardError as `get` does, when no value is left.
        """
        key = Key(workload.name, grant.name, audience_of(grant, audience))
        if self._store.may_look_again(key, version, pause_s=_REPORT_PAUSE_S, now=self._clock.now()):
            self._store.begin(key)
            flight = self._depart(key, anew=True)
            with suppress(TokenwardError, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await asyncio.shield(flight)
        return await self.get(workload, grant, audience, timeout_s=timeout_s)

    def retire(self, key: Key) -> None:
        """Ends the overlap of `key`: the previous version is revoked and watchers see it gone."""
        self._revoke(key, self._store.retire(key))
        served = self._store.live(key, self._clock.now())
        if served is not None:
            self._watchers.publish(key, served)
        self.changed.set()

    def lapse(self, key: Key) -> None:
        """Lets go of `key`, which nobody wants any more."""
        self._revoke(key, self._store.drop(key))
        self._subjects.pop(key, None)
        self.changed.set()

    async def close(self) -> None:
        """Ends every flight, forgets every value and revokes every lease. Bounded by whoever cancels it."""
        flights = tuple(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        for key, ended in self._store.drop_all().items():
            self._revoke(key, ended)
        await asyncio.gather(*self._revocations)

    # -- flights ------------------------------------------------------------------------------------------------

    def _depart(self, key: Key, *, anew: bool = False) -> asyncio.Task[Served]:
        _log.debug("asking the vault for %s", key)
        flight = asyncio.get_running_loop().create_task(self._fly(key, anew=anew), name=f"fetch {key}")
        self._flights[key] = flight
        flight.add_done_callback(_note_outcome)
        return flight

    async def _fly(self, key: Key, *, anew: bool) -> Served:
        workload, grant = self._subjects[key]
        try:
            issued = await self._obtain(key, workload, grant, anew=anew)
            ended = self._keep(key, workload, issued)
        except TokenwardError as error:
            self._store.fail(key, error, draw=self._draw(), now=self._clock.now())
            self._tell(key, error)
            raise
        except BaseException:  # a bug, or the end of the agent: the key must not stay in flight for ever
            self._revoke(key, self._store.drop(key))
            raise
        finally:
            del self._flights[key]
            self.changed.set()
        self._revoke(key, ended)
        served = self._store.live(key, self._clock.now())
        _log.debug("have %s", key)
        if served is None:
            raise UnavailableError(Reason.EXPIRED, f"the vault gave a value for {key} that had already expired")
        self._watchers.publish(key, served)
        return served

    async def _obtain(self, key: Key, workload: Workload, grant: AnyGrant, *, anew: bool) -> Issued:
        """A renewed value where the lease allows and none is wanted `anew`, else a new one."""
        now = self._clock.now()
        held = self._store.live(key, now)
        event = "issue"
        try:
            if held is not None and held.current.issued.lease is not None and not anew:
                event = "renew"
                renewed = await self._issuers.renew(held.current.issued, grant, now)
                if renewed is not None:
                    return renewed
                event = "issue"
            return await self._issuers.issue(workload, grant, key.audience, self._clock.now())
        except TokenwardError as error:
            _log.warning("%s of %s failed: %s", event, key, error)
            self._record(event, key, workload, outcome=error.reason)
            raise

    def _keep(self, key: Key, workload: Workload, issued: Issued) -> tuple[Issued, ...]:
        """Records and stores what was obtained; returns what must be revoked for it. AuditError: nothing is kept."""
        fingerprint = self._audit.fingerprint(issued.values)
        try:
            if issued.exchanged is not None:
                made = issued.exchanged
                self._audit.append(
                    Record(
                        event="exchange",
                        workload=workload.name,
                        spiffe_id=str(workload.spiffe_id),
                        method=made.method,
                        role=made.role,
                        accessor=made.accessor,
                        vault_request_id=made.vault_request_id,
                    )
                )
            self._audit.append(
                Record(
                    event="issue" if issued.renewed is None else "renew",
                    workload=workload.name,
                    spiffe_id=str(workload.spiffe_id),
                    credential=key.credential,
                    audience=key.audience,
                    fingerprint=fingerprint,
                    vault_request_id=issued.vault_request_id,
                )
            )
        except TokenwardError:
            if issued.renewed is None:
                self._revoke(key, (issued,))
            raise
        return self._store.put(key, issued, fingerprint=fingerprint, draw=self._draw(), now=self._clock.now())

    def _tell(self, key: Key, error: TokenwardError) -> None:
        served = self._store.live(key, self._clock.now())
        self._watchers.publish(key, error if served is None else served)

    # -- revocation ---------------------------------------------------------------------------------------------

    def _revoke(self, key: Key, ended: tuple[Issued, ...]) -> None:
        for issued in ended:
            if issued.lease is not None:
                task = asyncio.get_running_loop().create_task(self._end_lease(key, issued), name=f"revoke {key}")
                self._revocations.add(task)
                task.add_done_callback(self._revocations.discard)

    async def _end_lease(self, key: Key, issued: Issued) -> None:
        """Revokes until it is done, refused, or the lease has ended by itself."""
        failures = 0
        outcome = "ok"
        while issued.is_live(self._clock.now()):
            try:
                await self._issuers.revoke(issued)
            except TokenwardError as error:
                outcome = error.reason
                if not error.retryable:
                    break
                failures += 1
                await asyncio.sleep(backoff_s(failures, draw=self._draw()))
            else:
                outcome = "ok"
                break
        try:
            self._record("revoke", key, None, outcome=outcome)
        except TokenwardError as error:
            _log.error("the end of a lease of %s is not in the audit log: %s", key, error)

    def _record(self, event: str, key: Key, workload: Workload | None, *, outcome: str) -> None:
        self._audit.append(
            Record(
                event=event,
                outcome=outcome,
                workload=key.workload,
                spiffe_id=str(workload.spiffe_id) if workload is not None else "",
                credential=key.credential,
                audience=key.audience,
            )
        )


def _note_outcome(flight: asyncio.Task[Served]) -> None:
    """Callers get the outcome themselves; a bug is logged even when nobody waited for it."""
    if flight.cancelled():
        return
    error = flight.exception()
    if error is not None and not isinstance(error, TokenwardError):
        _log.error("%s failed: %s", flight.get_name(), type(error).__name__, exc_info=error)
