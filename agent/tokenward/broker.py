"""The broker: brings callers, the store, the issuers and the watchers together. It alone writes the store.

    get          decide in the store; on a miss one flight to the vault, shared by all who ask meanwhile
    renew        the refresher says that a key is due; the same flight, with nobody waiting
    flight       vault, then validation, then audit, then store, then watchers: never back
    revoke       an operator ends what a scope covers; nobody gets it again until that is lifted
    reconfigure  the workloads are others now; what is the same keeps its value

A flight belongs to the broker, not to the caller who began it: callers come and go, the flight ends by itself. When its
key was ended meanwhile, what it brings is revoked and nobody gets it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from tokenward.auditlog import AuditLog
from tokenward.clock import Clock
from tokenward.core.blocks import Block, Blocks, Scope
from tokenward.core.model import AnyGrant, Key, Served, Workload
from tokenward.core.policy import audience_of
from tokenward.core.reload import Changes, changes, grant_of
from tokenward.core.store import Failed, Fetch, Hit, Store, Wait
from tokenward.errors import (
    InvalidRequestError,
    Reason,
    RevokedError,
    TokenwardError,
    UnavailableError,
    VaultUnavailableError,
)
from tokenward.fetcher import Fetched, Fetcher, Flight, Source
from tokenward.revoker import Revoker
from tokenward.watchers import Watchers

_log = logging.getLogger(__name__)

_GRACE_S = 1.0
"""How long an old value outlives the last acknowledgement: somebody may be using what it read just before."""
_REPORT_PAUSE_S = 10.0
"""At most one look per credential and this time, however many callers report it refused."""


class Broker:
    """Answers from the store, fetches what is missing, keeps what is there, and revokes what has ended.

    `draw` gives the random fractions in [0, 1) that spread refreshes and back-off.
    """

    def __init__(
        self,
        *,
        workloads: Mapping[str, Workload],
        store: Store,
        issuers: Source,
        revoker: Revoker,
        watchers: Watchers,
        audit: AuditLog,
        clock: Clock,
        blocks: Blocks | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._workloads = workloads
        self._store = store
        self._issuers = issuers
        self._fetcher = Fetcher(source=issuers, revoker=revoker, audit=audit, clock=clock)
        self._revoker = revoker
        self._watchers = watchers
        self._clock = clock
        self._blocks = blocks or Blocks()
        self._draw = draw
        self._flying: dict[asyncio.Task[Served], Flight] = {}
        self._flights: dict[Key, asyncio.Task[Served]] = {}
        """Those of `_flying` that were not ended."""
        self.changed = asyncio.Event()
        """Set whenever the store's next due time may have moved."""

    async def get(self, workload: Workload, grant: AnyGrant, audience: str, *, timeout_s: float) -> Served:
        """The live value of `grant` for `workload`: at once when there is one, else within `timeout_s` seconds.

        Raises:
            TokenwardError: what the vault's answer deserves; the same error for all who waited for it.
            RevokedError: an operator ended it.
            VaultUnavailableError: no answer in time; the flight goes on for whoever asks next.
            UnavailableError: the configuration was replaced since the caller was attested.
        """
        if self._workloads.get(workload.name) is not workload:
            raise _reconfigured()
        key = Key(workload.name, grant.name, audience_of(grant, audience))
        self._blocks.verify(key)
        decision = self._store.decide(key, grant, self._clock.now())
        match decision:
            case Hit(served):
                return served
            case Failed(error, retry_after_s):
                error.retry_after_s = retry_after_s
                raise error.with_traceback(None)
            case Fetch():
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

    def encourage(self) -> None:
        """The vault is back: what failed meanwhile need not wait for the end of its back-off."""
        self._store.encourage(self._draw, self._clock.now())
        self.changed.set()

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

    async def rotate(self, workload: str, credential: str) -> tuple[Served, ...]:
        """New values of a credential that is held, for each audience. The ones before stay for the overlap.

        Raises InvalidRequestError when nothing of it is held, and what the vault's answer deserves: then what is held
        stays.
        """
        held = [key for key, _ in self.held() if (key.workload, key.credential) == (workload, credential)]
        if not held:
            text = f"nothing is held of {workload}/{credential}; whoever asks for it next gets a new value"
            raise InvalidRequestError(text)
        tasks = [self._depart(key, anew=True) if self._store.begin(key) else self._flights[key] for key in held]
        return tuple(await asyncio.shield(asyncio.gather(*tasks)))

    def held(self) -> tuple[tuple[Key, Served], ...]:
        """Every live value."""
        now = self._clock.now()
        found = ((key, self._store.live(key, now)) for key in sorted(self._store.keys))
        return tuple((key, served) for key, served in found if served is not None)

    def retire(self, key: Key) -> None:
        """Ends the overlap of `key`: the previous version is revoked and watchers see it gone."""
        self._revoker.end(key, self._store.retire(key))
        served = self._store.live(key, self._clock.now())
        if served is not None:
            self._watchers.publish(key, served)
        self.changed.set()

    def lapse(self, key: Key) -> None:
        """Lets go of `key`, which nobody wants any more."""
        self._revoker.end(key, self._store.drop(key))
        self.changed.set()

    # -- ends before their time -----------------------------------------------------------------------------------

    def let_go(self, workload: str) -> None:
        """The last process of `workload` has gone: so do its values. Whoever comes next begins anew."""
        for key in tuple(self._store.keys):
            if key.workload == workload:
                self._end(key, _unwanted(), why="the last process has gone")

    def revoke(self, block: Block) -> int:
        """Ends everything that `block` covers and lets nobody have it until `lift`; returns how many values that were.

        At the vault leases and tokens are revoked in the background, for as long as that takes.
        """
        self._blocks.add(block)
        covered = [key for key in tuple(self._store.keys) if block.scope.covers(key)]
        why = RevokedError(Reason.REVOKED, f"{block.scope} was revoked by an operator ({block.reason})")
        for key in covered:
            self._end(key, why, why=block.reason)
        if not block.scope.credential:
            self._forget([block.scope.workload] if block.scope.workload else self._workloads, why=block.reason)
        return len(covered)

    def lift(self, scope: Scope) -> bool:
        """Lets callers have again what was revoked as `scope`; False when that was not blocked."""
        lifted = self._blocks.lift(scope)
        if lifted:
            names = {scope.workload} if scope.workload else self._workloads.keys()
            self._watchers.end(_lifted(), names)
        return lifted

    def reconfigure(self, workloads: Mapping[str, Workload]) -> Changes:
        """From now on serves `workloads`. What is the same keeps its value, everything else ends and is revoked.

        The streams of every workload that changed end, so that whoever comes back sees what it may have now.
        """
        found = changes(self._workloads, workloads)
        self._workloads = workloads
        for key in tuple(self._store.keys):
            if (key.workload, key.credential) in found.ended:
                self._end(key, _reconfigured(), why="the configuration changed")
        self._forget(found.workloads, why="the configuration changed")
        self._watchers.end(_reconfigured(), found.workloads)
        return found

    async def halt(self) -> None:
        """Ends every flight and revokes the tokens that speak for workloads. The values that are held stay."""
        tasks = tuple(self._flying)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._forget(self._workloads)

    async def close(self) -> None:
        """Ends every flight, forgets every value and revokes every lease. Bounded by whoever cancels it."""
        await self.halt()
        for key, ended in self._store.drop_all().items():
            self._revoker.end(key, ended)
        await self._revoker.settled()

    def _forget(self, workloads: Iterable[str], *, why: str = "") -> None:
        for workload in workloads:
            self._revoker.end(Key(workload, ""), self._issuers.forget(workload, self._clock.now()), why=why)

    def _end(self, key: Key, error: TokenwardError, *, why: str) -> None:
        """Whoever waits for `key` or watches it gets `error`; all that was made for it is revoked."""
        task = self._flights.pop(key, None)
        if task is not None:
            self._flying[task].ended = error
        self._revoker.end(key, self._store.drop(key), why=why)
        self._watchers.publish(key, error)
        self.changed.set()

    # -- flights ------------------------------------------------------------------------------------------------

    def _depart(self, key: Key, *, anew: bool = False) -> asyncio.Task[Served]:
        _log.debug("asking the vault for %s", key)
        found = grant_of(self._workloads, key)
        assert found is not None, "a key without a grant was ended when the configuration changed"
        flight = Flight(key=key, workload=found[0], grant=found[1], anew=anew)
        task = asyncio.get_running_loop().create_task(self._fly(flight), name=f"fetch {key}")
        self._flights[key] = task
        self._flying[task] = flight
        task.add_done_callback(self._land)
        return task

    def _land(self, task: asyncio.Task[Served]) -> None:
        """Callers get the outcome themselves; a bug is logged even when nobody waited for it."""
        del self._flying[task]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TokenwardError):
            _log.error("%s failed: %s", task.get_name(), type(error).__name__, exc_info=error)

    async def _fly(self, flight: Flight) -> Served:
        key = flight.key
        held = self._store.live(key, self._clock.now())
        try:
            fetched = await self._fetcher.fetch(
                flight, held.current.issued if held is not None else None, on_ended=lambda: self._void(flight)
            )
        except TokenwardError as error:
            if flight.ended is not None:
                raise flight.ended.with_traceback(None) from None
            self._store.fail(key, error, draw=self._draw(), now=self._clock.now())
            self._tell(key, error)
            raise
        except asyncio.CancelledError:  # the end of the agent
            if flight.ended is None:
                self._store.abort(key)
            raise
        except BaseException:  # a bug: the key must not stay in flight for ever
            if flight.ended is None:
                self._revoker.end(key, self._store.drop(key))
            raise
        finally:
            if flight.ended is None:
                del self._flights[key]
            self.changed.set()
        return self._keep(key, fetched)

    def _keep(self, key: Key, fetched: Fetched) -> Served:
        """Stores what was fetched, and tells who watches."""
        now = self._clock.now()
        ended = self._store.put(key, fetched.issued, fingerprint=fetched.fingerprint, draw=self._draw(), now=now)
        self._revoker.end(key, ended)
        served = self._store.live(key, now)
        _log.debug("have %s", key)
        if served is None:
            raise UnavailableError(Reason.EXPIRED, f"the vault gave a value for {key} that had already expired")
        self._watchers.publish(key, served)
        return served

    def _void(self, flight: Flight) -> None:
        """The vault ended what is held: it is served no more, whatever comes after it."""
        if flight.ended is None:
            self._revoker.end(flight.key, self._store.void(flight.key), why="ended at the vault")

    def _tell(self, key: Key, error: TokenwardError) -> None:
        served = self._store.live(key, self._clock.now())
        self._watchers.publish(key, error if served is None else served)


def _reconfigured() -> UnavailableError:
    return UnavailableError(Reason.CONFIGURATION_CHANGED, "the agent's configuration was replaced just now; ask again")


def _lifted() -> UnavailableError:
    return UnavailableError(Reason.CONFIGURATION_CHANGED, "a revocation was lifted just now; ask again")


def _unwanted() -> UnavailableError:
    return UnavailableError(Reason.EXPIRED, "it was let go when the last process of the workload had gone; ask again")
