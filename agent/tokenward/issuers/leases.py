"""Leases after they are made: renewed while the vault allows, revoked when nobody needs them.

A lease lives no longer than the token that made it, whatever its own duration says, so both are renewed and the
earlier end counts. Revoking the token revokes the lease with it.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from tokenward.core.model import Instant, Issued, Lease, Policy, VaultToken
from tokenward.core.schedule import capped, is_worth_renewing
from tokenward.errors import Reason, RevokedError, TokenwardError, VaultDeniedError
from tokenward.vault.client import Refusal, VaultClient, VaultRequest, refusal_of
from tokenward.vault.exchange import Exchange
from tokenward.vault.keeper import ROUNDED_UP_S, NoData

_FOR_EVER_S = 366 * 86400.0
_GONE = frozenset({Refusal.BAD_TOKEN, Refusal.LEASE_GONE})

_log = logging.getLogger(__name__)


class Leases:
    """Renews and revokes what the issuers of `leased` and `vault_token` made."""

    def __init__(self, *, client: VaultClient, exchange: Exchange) -> None:
        self._client = client
        self._exchange = exchange

    async def renew(self, issued: Issued, policy: Policy, now: Instant) -> Issued | None:
        """The same value with a later end; None when the vault allows no more of it that is worth having.

        Raises the vault's errors, except a refusal, which means None, and RevokedError when the vault knows the lease,
        or the token that made it, no more.
        """
        lease = issued.lease
        if lease is None or not lease.renewable:
            return None
        life_s = issued.full_life_s
        try:
            token = lease.token
            if token.renewable:
                token = await self._exchange.renew(token, round(life_s), now=now)
            lease_s = life_s
            if lease.lease_id:
                lease_s = await self._renew_lease(lease.lease_id, token, life_s)
        except VaultDeniedError as error:
            if refusal_of(error) in _GONE:
                raise RevokedError(Reason.REVOKED, "its lease was ended at the vault") from error
            return None
        renewed = replace(
            issued,
            renewed=now,
            new_s=life_s,
            expires=end_of(token, now, lease_s),
            lease=replace(lease, token=token),
            exchanged=None,
        )
        renewed = capped(renewed, policy)
        return renewed if is_worth_renewing(issued, renewed, now) else None

    async def _renew_lease(self, lease_id: str, token: VaultToken, life_s: float) -> float:
        reply = await self._client.call(
            VaultRequest("PUT", "sys/leases/renew", {"lease_id": lease_id, "increment": round(life_s)}),
            into=NoData,
            auth=token.token,
        )
        return max(0.0, reply.lease_duration - ROUNDED_UP_S)

    async def revoke(self, issued: Issued) -> None:
        """Ends the lease of `issued` at the vault, if it has one. Raises the vault's errors."""
        if issued.lease is not None:
            await self._exchange.revoke(issued.lease.token)

    async def abandon(self, token: VaultToken) -> None:
        """Revokes the token of an attempt that failed, as far as the vault can be reached; its TTL does the rest."""
        try:
            await self._exchange.revoke(token)
        except TokenwardError as error:
            _log.warning("a token of a failed attempt was not revoked (%s); it ends by its TTL", error.reason)


def end_of(token: VaultToken, now: Instant, longest_s: float) -> Instant:
    """When something made with `token` ends on both clocks: with the token, at most `longest_s` seconds from `now`."""
    left_s = longest_s if token.expires_mono is None else min(longest_s, token.expires_mono - now.mono)
    return Instant(now.wall + left_s, now.mono + left_s)


def kept(token: VaultToken, now: Instant) -> Issued:
    """A token that stands for itself and serves nobody, as something that can be revoked."""
    return Issued(values={}, issued=now, expires=end_of(token, now, _FOR_EVER_S), lease=Lease(token=token))
