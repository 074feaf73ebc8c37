"""The fetcher: one value from the vault, recorded, or the reason why there is none.

Owns the order: renew where that is enough, else issue; try a new value where its grant asks for that; record. Leaves to
the broker who waits for it and where it is kept. Invariants: whatever was made and is not returned is revoked; nothing
is returned that is not in the audit log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tokenward.auditlog import AuditLog
from tokenward.clock import Clock
from tokenward.core.audit import Record
from tokenward.core.model import AnyGrant, Exchanged, Instant, Issued, Key, Workload
from tokenward.errors import NotFoundError, RevokedError, TokenwardError
from tokenward.revoker import Revoker

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where values come from: `issuers.Issuers`, which raise a TokenwardError for whatever the vault does."""

    async def issue(self, workload: Workload, grant: AnyGrant, audience: str, now: Instant) -> Issued:
        """A new value."""
        ...

    async def renew(self, workload: Workload, grant: AnyGrant, issued: Issued, now: Instant) -> Issued | None:
        """The same value with a later end, or None when only a new one helps.

        Raises RevokedError or NotFoundError when the vault ended the value: it must not be served any more.
        """
        ...

    async def validate(self, grant: AnyGrant, issued: Issued) -> None:
        """Returns when a new value may become current, raises the error that says why not."""
        ...

    def forget(self, workload: str, now: Instant) -> tuple[Issued, ...]:
        """Lets go of what is kept to speak for `workload`; returns what must be revoked for it."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Flight:
    """One value under way. `ended` is set when its key was ended meanwhile: what it brings is nobody's."""

    key: Key
    workload: Workload
    grant: AnyGrant
    anew: bool
    """True when the value that is held must not just be renewed."""
    ended: TokenwardError | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """A value, and the keyed hash under which it is in the record."""

    issued: Issued
    fingerprint: str


class Fetcher:
    """Obtains values of every kind from `source`."""

    def __init__(self, *, source: Source, revoker: Revoker, audit: AuditLog, clock: Clock) -> None:
        self._source = source
        self._revoker = revoker
        self._audit = audit
        self._clock = clock

    async def fetch(self, flight: Flight, held: Issued | None, *, on_ended: Callable[[], None]) -> Fetched:
        """The value that is `held` with a later end where the vault allows, else a new one.

        `on_ended` is called when the vault turns out to have ended what is held: it must not be served any more. Raises
        what the vault's answer deserves, ValidationError, AuditError, or what `flight` was ended with.
        """
        event = "renew"
        try:
            issued = None if flight.anew or held is None else await self._renewed(flight, held, on_ended)
            if issued is None:
                event = "issue"
                issued = await self._source.issue(flight.workload, flight.grant, flight.key.audience, self._clock.now())
                if held is None or held.values != issued.values:
                    event = "validate"
                    await self._validate(flight, issued)
        except TokenwardError as error:
            _log.warning("%s of %s failed: %s", event, flight.key, error)
            self._record(event, flight, outcome=error.reason)
            raise
        if flight.ended is not None:
            self._revoker.end(flight.key, (issued,))
            raise flight.ended
        return Fetched(issued, self._recorded(flight, issued))

    async def _renewed(self, flight: Flight, held: Issued, on_ended: Callable[[], None]) -> Issued | None:
        try:
            return await self._source.renew(flight.workload, flight.grant, held, self._clock.now())
        except (RevokedError, NotFoundError) as error:
            _log.warning("%s was ended at the vault: %s", flight.key, error)
            on_ended()
            if isinstance(error, NotFoundError):
                raise
            return None

    async def _validate(self, flight: Flight, issued: Issued) -> None:
        """Raises when a new value is not to be served; then, or when we are cancelled, it is revoked."""
        try:
            await self._source.validate(flight.grant, issued)
        except BaseException:
            self._revoker.end(flight.key, (issued,), why="it did not pass its validation")
            raise

    def _recorded(self, flight: Flight, issued: Issued) -> str:
        """Records what was obtained; returns its fingerprint. AuditError: it is revoked, unless it was there before."""
        fingerprint = self._audit.fingerprint(issued.values)
        try:
            if issued.exchanged is not None:
                self._record_exchange(flight.workload, issued.exchanged)
            self._record(
                "issue" if issued.renewed is None else "renew",
                flight,
                fingerprint=fingerprint,
                vault_request_id=issued.vault_request_id,
            )
        except TokenwardError:
            if issued.renewed is None:
                self._revoker.end(flight.key, (issued,))
            raise
        return fingerprint

    def _record(
        self, event: str, flight: Flight, *, outcome: str = "ok", fingerprint: str = "", vault_request_id: str = ""
    ) -> None:
        self._audit.append(
            Record(
                event=event,
                outcome=outcome,
                workload=flight.workload.name,
                spiffe_id=str(flight.workload.spiffe_id),
                credential=flight.key.credential,
                audience=flight.key.audience,
                fingerprint=fingerprint,
                vault_request_id=vault_request_id,
            )
        )

    def _record_exchange(self, workload: Workload, made: Exchanged) -> None:
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
