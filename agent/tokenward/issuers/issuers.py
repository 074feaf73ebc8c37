"""Picks the issuer of a grant. A closed set: a new kind of credential is one more case in each `match`."""

from __future__ import annotations

from typing import assert_never

from tokenward.core.model import (
    AnyGrant,
    Instant,
    Issued,
    JwtGrant,
    KvGrant,
    LeasedGrant,
    VaultTokenGrant,
    Workload,
    X509Grant,
)
from tokenward.core.schedule import capped
from tokenward.issuers.jwt import JwtIssuer
from tokenward.issuers.kv import KvIssuer
from tokenward.issuers.leased import LeasedIssuer
from tokenward.issuers.leases import Leases, kept
from tokenward.issuers.vault_token import VaultTokenIssuer
from tokenward.issuers.x509 import X509Issuer
from tokenward.validation import Validator
from tokenward.vault.client import VaultClient
from tokenward.vault.exchange import Exchange


class Issuers:
    """Obtains, renews and revokes credentials of every kind; nothing lives longer than its policy's `max_ttl`."""

    def __init__(self, *, client: VaultClient, exchange: Exchange, jwt_issuer: str, validator: Validator) -> None:
        self._validator = validator
        self._exchange = exchange
        self._leases = Leases(client=client, exchange=exchange)
        self._kv = KvIssuer(exchange=exchange)
        self._leased = LeasedIssuer(client=client, exchange=exchange, leases=self._leases)
        self._vault_token = VaultTokenIssuer(exchange=exchange)
        self._jwt = JwtIssuer(exchange=exchange, issuer=jwt_issuer)
        self._x509 = X509Issuer(client=client, exchange=exchange)

    async def issue(self, workload: Workload, grant: AnyGrant, audience: str, now: Instant) -> Issued:
        """A new value. Raises what the vault's answer deserves (tokenward.errors), never a foreign exception."""
        return capped(await self._issue(workload, grant, audience, now), grant.policy)

    async def _issue(self, workload: Workload, grant: AnyGrant, audience: str, now: Instant) -> Issued:
        match grant:
            case KvGrant():
                return await self._kv.issue(workload, grant, now)
            case LeasedGrant():
                return await self._leased.issue(workload, grant, now)
            case VaultTokenGrant():
                return await self._vault_token.issue(workload, grant, now)
            case JwtGrant():
                return await self._jwt.issue(workload, grant, audience, now)
            case X509Grant():
                return await self._x509.issue(workload, grant, now)
        assert_never(grant)

    async def renew(self, workload: Workload, grant: AnyGrant, issued: Issued, now: Instant) -> Issued | None:
        """The same value with a later end, or None when only a new value helps.

        Raises the vault's errors; RevokedError or NotFoundError when the vault has ended the value.
        """
        if isinstance(grant, KvGrant):
            return await self._kv.renew(workload, grant, issued, now)
        return await self._leases.renew(issued, grant.policy, now)

    async def validate(self, grant: AnyGrant, issued: Issued) -> None:
        """Returns when a new value may become current. Raises ValidationError."""
        await self._validator.check(grant, issued)

    async def revoke(self, issued: Issued) -> None:
        """Ends what `issued` left at the vault, if anything. Raises the vault's errors."""
        await self._leases.revoke(issued)

    def forget(self, workload: str, now: Instant) -> tuple[Issued, ...]:
        """Lets go of the token that is kept to speak for `workload`, if there is one: it is to be revoked."""
        token = self._exchange.forget(workload)
        return () if token is None else (kept(token, now),)
