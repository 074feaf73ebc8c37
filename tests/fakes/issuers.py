"""Issuers with behaviour: they make values, take their time, fail on demand, and remember what is still valid."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tests.making import issued
from tokenward.core.model import AnyGrant, Instant, Issued, Workload
from tokenward.errors import Reason, RevokedError, TokenwardError


class FakeIssuers:
    """A vault that makes numbered secrets with leases of `lifetime_s`.

    `hold()` makes every call wait until `release()`; `failing_with` makes every call fail; `renewals_left` is how often
    one lease can be renewed. `live` are the leases that were made and not revoked; one that is taken out of it was
    revoked at the vault. `deleted_with` is what renewing says once the secret is gone there. `invalid_with` is what the
    far end says of new values. `kept` are tokens that speak for workloads.
    """

    def __init__(self, *, lifetime_s: float = 100.0, renewals_left: int = 0) -> None:
        self.lifetime_s = lifetime_s
        self.renewals_left = renewals_left
        self.failing_with: TokenwardError | None = None
        self.revocation_failing_with: TokenwardError | None = None
        self.deleted_with: TokenwardError | None = None
        self.invalid_with: TokenwardError | None = None
        self.kept: set[str] = set()
        self.made = 0
        self.live: set[str] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.entered = asyncio.Event()

    def hold(self) -> None:
        self._open.clear()
        self.entered.clear()

    def release(self) -> None:
        self._open.set()

    async def issue(self, workload: Workload, grant: AnyGrant, audience: str, now: Instant) -> Issued:
        del workload, grant, audience
        self.made += 1
        name = f"secret-{self.made}"
        await self._answer()
        self.live.add(name)
        return issued(lifetime_s=self.lifetime_s, at=now.mono, value=name, leased=True)

    async def renew(self, workload: Workload, grant: AnyGrant, issued: Issued, now: Instant) -> Issued | None:
        del workload, grant
        if self.deleted_with is not None:
            raise self.deleted_with
        if issued.values["password"].reveal() not in self.live:
            raise RevokedError(Reason.REVOKED, "its lease was ended at the vault")
        if not self.renewals_left:
            return None
        await self._answer()
        self.renewals_left -= 1
        ends = Instant(now.wall + self.lifetime_s, now.mono + self.lifetime_s)
        return replace(issued, renewed=now, expires=ends)

    async def revoke(self, issued: Issued) -> None:
        if self.revocation_failing_with is not None:
            raise self.revocation_failing_with
        self.live.discard(issued.values["password"].reveal())

    async def validate(self, grant: AnyGrant, issued: Issued) -> None:
        del grant, issued
        if self.invalid_with is not None:
            raise self.invalid_with

    def forget(self, workload: str, now: Instant) -> tuple[Issued, ...]:
        del now
        if workload not in self.kept:
            return ()
        self.kept.discard(workload)
        name = f"token of {workload}"
        self.live.add(name)
        return (issued(value=name, leased=True),)

    async def _answer(self) -> None:
        self.entered.set()
        await self._open.wait()
        if self.failing_with is not None:
            raise self.failing_with
