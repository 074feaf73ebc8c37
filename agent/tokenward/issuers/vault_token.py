"""Credentials of kind `vault_token`: a vault token with the workload's own policies, made by a fresh login."""

from __future__ import annotations

from tokenward.core.model import Instant, Issued, Lease, VaultTokenGrant, Workload
from tokenward.core.secret import Secret
from tokenward.issuers.leases import end_of
from tokenward.vault.exchange import Exchange


class VaultTokenIssuer:
    """The token is its own lease: renewed while the vault allows, revoked when its version ends."""

    def __init__(self, *, exchange: Exchange) -> None:
        self._exchange = exchange

    async def issue(self, workload: Workload, grant: VaultTokenGrant, now: Instant) -> Issued:
        """Raises the vault's errors."""
        token, exchanged = await self._exchange.login(workload, now=now)
        return Issued(
            values={"token": token.token, "accessor": Secret(token.accessor)},
            issued=now,
            expires=end_of(token, now, grant.policy.max_ttl_s),
            lease=Lease(token=token, renewable=token.renewable),
            exchanged=exchanged,
            vault_request_id=exchanged.vault_request_id,
        )
