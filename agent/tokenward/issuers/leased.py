"""Credentials of kind `leased`: any dynamic secret that a vault engine makes and ends, such as a database login.

Each version has a vault token of its own, made for it: whatever goes wrong half-way, revoking that one token leaves
nothing behind at the vault.
"""

from __future__ import annotations

from tokenward.core.model import Instant, Issued, Lease, LeasedGrant, Workload
from tokenward.errors import VaultBadReplyError
from tokenward.issuers.fields import RawFields, secret_fields
from tokenward.issuers.leases import Leases, end_of
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.exchange import Exchange


class LeasedIssuer:
    """Makes a lease of the engine that the grant's path names; `Leases` keeps it."""

    def __init__(self, *, client: VaultClient, exchange: Exchange, leases: Leases) -> None:
        self._client = client
        self._exchange = exchange
        self._leases = leases

    async def issue(self, workload: Workload, grant: LeasedGrant, now: Instant) -> Issued:
        """Raises the vault's errors, and VaultBadReplyError for a secret without a lease."""
        token, exchanged = await self._exchange.login(workload, now=now)
        try:
            reply = await self._client.call(
                VaultRequest("GET", grant.path, repeatable=False), into=RawFields, auth=token.token
            )
            if not reply.lease_id or reply.lease_duration <= 0 or not reply.data:
                raise VaultBadReplyError(f"{grant.path} answered without a lease; a static secret is of kind 'kv'")
        except BaseException:  # a cancelled attempt too: the lease may have been made all the same
            await self._leases.abandon(token)
            raise
        return Issued(
            values=secret_fields(reply.data),
            issued=now,
            expires=end_of(token, now, reply.lease_duration),
            lease=Lease(token=token, lease_id=reply.lease_id, renewable=reply.renewable),
            exchanged=exchanged,
            vault_request_id=reply.request_id,
        )
