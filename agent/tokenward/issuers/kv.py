"""Credentials of kind `kv`: the fields of a KV v2 secret, read with the workload's own rights.

A secret is fetched once per version: between versions only its metadata is looked at.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import msgspec

from tokenward.core.model import Instant, Issued, KvGrant, Workload
from tokenward.errors import NotFoundError, Reason, VaultBadReplyError, VaultDeniedError
from tokenward.issuers.fields import RawFields, secret_fields
from tokenward.vault.client import VaultRequest
from tokenward.vault.exchange import Exchange


class KvVersion(msgspec.Struct, frozen=True):
    """What the vault says of one version. `deletion_time` may lie ahead (`delete_version_after`)."""

    deletion_time: str = ""
    destroyed: bool = False

    def is_gone(self, now: Instant) -> bool:
        """Whether it cannot be read any more."""
        if self.destroyed or not self.deletion_time:
            return self.destroyed
        try:
            return datetime.fromisoformat(self.deletion_time).timestamp() <= now.wall
        except ValueError:
            return True


class KvOneVersion(KvVersion, frozen=True):
    """As `KvVersion`, with its number."""

    version: int = 0


class KvRead(msgspec.Struct, frozen=True):
    """What `GET <mount>/data/<path>` answers with: `data` is null once the newest version is deleted."""

    data: RawFields | None
    metadata: KvOneVersion = KvOneVersion()


class KvMetadata(msgspec.Struct, frozen=True):
    """What `GET <mount>/metadata/<path>` answers with, of which we read this."""

    current_version: int
    versions: dict[str, KvVersion] = {}


class KvIssuer:
    """Reads the newest version. The value has no life of its own at the vault, so it is used for the grant's `max_ttl`
    at most and looked at again every `poll_s` seconds: an unchanged version prolongs the value that is there."""

    def __init__(self, *, exchange: Exchange) -> None:
        self._exchange = exchange

    async def issue(self, workload: Workload, grant: KvGrant, now: Instant) -> Issued:
        """Raises NotFoundError for a secret that is missing or deleted, and the vault's errors."""
        reply, exchanged = await self._exchange.call(
            workload, VaultRequest("GET", f"{grant.mount}/data/{_secret(grant)}"), into=KvRead, now=now
        )
        if reply.data is None or reply.data.data is None:
            raise _gone(grant)
        if not reply.data.data:
            raise VaultBadReplyError(f"the secret at {grant.path} has no fields")
        return Issued(
            values=secret_fields(reply.data.data),
            issued=now,
            expires=_end(grant, now),
            refresh_s=grant.poll_s,
            kv_version=reply.data.metadata.version,
            exchanged=exchanged,
            vault_request_id=reply.request_id,
        )

    async def renew(self, workload: Workload, grant: KvGrant, issued: Issued, now: Instant) -> Issued | None:
        """`issued` with a later end while its version is the newest; None when there is another, or when the vault's
        policy lets nobody see the metadata: then the secret itself is read again.

        Raises NotFoundError once the newest version was deleted or destroyed, and the vault's errors.
        """
        try:
            reply, exchanged = await self._exchange.call(
                workload, VaultRequest("GET", f"{grant.mount}/metadata/{_secret(grant)}"), into=KvMetadata, now=now
            )
        except VaultDeniedError as error:
            if error.reason is Reason.VAULT_DENIED:
                return None
            raise
        found = reply.require_data()
        newest = found.versions.get(str(found.current_version))
        if newest is None or newest.is_gone(now):
            raise _gone(grant)
        if found.current_version != issued.kv_version:
            return None
        return replace(
            issued,
            issued=now,
            renewed=now,
            expires=_end(grant, now),
            exchanged=exchanged,
            vault_request_id=reply.request_id,
        )


def _secret(grant: KvGrant) -> str:
    return grant.path.removeprefix(grant.mount).strip("/")


def _end(grant: KvGrant, now: Instant) -> Instant:
    max_ttl_s = grant.policy.max_ttl_s
    return Instant(now.wall + max_ttl_s, now.mono + max_ttl_s)


def _gone(grant: KvGrant) -> NotFoundError:
    return NotFoundError(
        Reason.SECRET_NOT_FOUND, f"the vault has no readable version of {grant.path}: write one, or undelete it"
    )
