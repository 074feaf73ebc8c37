"""Credentials of kind `kv`: the fields of a KV v2 secret, read with the workload's own rights."""

from __future__ import annotations

import msgspec

from tokenward.core.model import Instant, Issued, KvGrant, Workload
from tokenward.errors import NotFoundError, Reason, VaultBadReplyError
from tokenward.issuers.fields import RawFields, secret_fields
from tokenward.vault.client import VaultRequest
from tokenward.vault.exchange import Exchange


class KvRead(msgspec.Struct, frozen=True):
    """What `GET <mount>/data/<path>` answers with: `data` is null once the newest version is deleted."""

    data: RawFields | None


class KvIssuer:
    """Reads the newest version. The value has no life of its own at the vault, so it is used for the grant's `max_ttl`
    at most and read again every `poll_s` seconds: an unchanged value prolongs the version that is there."""

    def __init__(self, *, exchange: Exchange) -> None:
        self._exchange = exchange

    async def issue(self, workload: Workload, grant: KvGrant, now: Instant) -> Issued:
        """Raises NotFoundError for a secret that is missing or deleted, and the vault's errors."""
        secret = grant.path.removeprefix(grant.mount).strip("/")
        reply, exchanged = await self._exchange.call(
            workload, VaultRequest("GET", f"{grant.mount}/data/{secret}"), into=KvRead, now=now
        )
        if reply.data is None or reply.data.data is None:
            raise NotFoundError(
                Reason.SECRET_NOT_FOUND, f"the vault has no readable version of {grant.path}: write one, or undelete it"
            )
        if not reply.data.data:
            raise VaultBadReplyError(f"the secret at {grant.path} has no fields")
        max_ttl_s = grant.policy.max_ttl_s
        return Issued(
            values=secret_fields(reply.data.data),
            issued=now,
            expires=Instant(now.wall + max_ttl_s, now.mono + max_ttl_s),
            refresh_s=grant.poll_s,
            exchanged=exchanged,
            vault_request_id=reply.request_id,
        )
