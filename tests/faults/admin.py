"""The administrator's hand on a vault, past any fault between the agent and it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from tokenward.core.secret import Secret
from tokenward.errors import NotFoundError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.keeper import NoData


class Admin:
    """Calls the vault at `address` with all rights."""

    def __init__(self, address: str, token: Secret) -> None:
        self._address = address
        self._token = token

    def call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The data of the answer, empty where there is none. Raises TokenwardError."""
        return asyncio.run(self._call(method, path, body))

    def keys(self, prefix: str) -> set[str]:
        """The names below `prefix`; none where there is nothing."""
        try:
            return set(self.call("LIST", prefix).get("keys", ()))
        except NotFoundError:
            return set()

    async def _call(self, method: str, path: str, body: Mapping[str, object] | None) -> dict[str, Any]:
        client = VaultClient(addresses=[self._address], timeout_s=10.0, threads=1)
        try:
            reply = await client.call(VaultRequest(method, path, body), into=NoData, auth=self._token)
        finally:
            await client.close()
        return reply.data or {}
