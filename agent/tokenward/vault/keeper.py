"""`TokenKeeper`: one vault token, kept alive for as long as somebody uses it.

Owns when a token is obtained, renewed and replaced; its `source` knows how one is obtained. States:

    none     -> obtain ------------------------------> fresh
    fresh    -> two thirds of its life are over -----> due
    due      -> renewed for a useful time -----------> fresh
             -> cannot be renewed: obtain a new one -> fresh
             -> the vault does not answer -----------> due, tried again after a pause, the token used meanwhile
    any      -> `forget`, or its life is over -------> none

Invariants: any number of callers cause one call to the vault; a cancelled caller cancels nobody else; an expired token
is never handed out. No task of its own: a token that nobody asks for is not renewed.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from tokenward.core.model import Instant, VaultToken
from tokenward.errors import TokenwardError, VaultDeniedError
from tokenward.vault.client import Refusal, Reply, VaultClient, VaultRequest, refusal_of

RENEW_AT = 2 / 3
PAUSE_S = 5.0
MIN_AGE_S = 60.0
ROUNDED_UP_S = 1.0
"""What a renewal grants is what is left of the maximum, in whole seconds, upwards: 0.2 s left is a duration of 1."""

T = TypeVar("T")

NoData = dict[str, Any]
"""For calls whose answer's data says nothing that we need."""


class TokenSource(Protocol):
    """How a token is obtained anew."""

    async def obtain(self, now: Instant) -> VaultToken:
        """A token just made, or the error that says why there is none."""
        ...


class TokenKeeper:
    """Hands out the token of `source`, and replaces it ahead of its end."""

    def __init__(self, *, client: VaultClient, source: TokenSource) -> None:
        self._client = client
        self._source = source
        self._held: VaultToken | None = None
        self._full_s = 0.0  # the life that the source gave it; a renewal gives less near the maximum
        self._obtained_mono = 0.0
        self._due_mono = 0.0
        self._flight: asyncio.Task[VaultToken] | None = None

    async def token(self, now: Instant) -> VaultToken:
        """A live token. Raises what the source raises."""
        held = self._held
        if held is not None and is_live(held, now) and (held.expires_mono is None or now.mono < self._due_mono):
            return held
        if self._flight is None:
            self._flight = asyncio.create_task(self._replace(now), name="vault token")
            self._flight.add_done_callback(self._landed)
        return await asyncio.shield(self._flight)

    async def call(self, request: VaultRequest, *, into: type[T], now: Instant) -> tuple[Reply[T], VaultToken]:
        """Performs `request` with the token; after a 403 with a new one, once.

        The old one may have been revoked, or its role may give other policies by now. A new one has them already, so
        a path that is not allowed does not cost a login each time.
        """
        token = await self.token(now)
        try:
            return await self._client.call(request, into=into, auth=token.token), token
        except VaultDeniedError as error:
            refusal = refusal_of(error)
            is_old = now.mono - self._obtained_mono >= MIN_AGE_S
            if refusal is not Refusal.BAD_TOKEN and not (refusal is Refusal.POLICY and is_old):
                raise
        self.forget(token)
        token = await self.token(now)
        return await self._client.call(request, into=into, auth=token.token), token

    def forget(self, token: VaultToken | None = None) -> None:
        """Lets go of the token, which the vault no longer takes; if `token` is given, of that one and no other."""
        if token is None or token is self._held:
            self._held = None

    def let_go(self) -> VaultToken | None:
        """The token that is held, which is the caller's to revoke from now on."""
        held, self._held = self._held, None
        return held

    async def revoke(self) -> None:
        """Ends the token at the vault. Raises TokenwardError when that fails; it is forgotten even so."""
        if self._flight is not None:
            await asyncio.wait({self._flight})
        held, self._held = self._held, None
        if held is not None:
            await revoke_token(self._client, held)

    # -- within ---------------------------------------------------------------------------------------------------

    def _landed(self, flight: asyncio.Task[VaultToken]) -> None:
        self._flight = None
        if not flight.cancelled():
            flight.exception()  # seen, even when every caller has gone

    async def _replace(self, now: Instant) -> VaultToken:
        held = self._held if self._held is not None and is_live(self._held, now) else None
        try:
            renewed = await self._renewed(held, now) if held is not None else None
            if renewed is not None:
                return renewed
            obtained = await self._source.obtain(now)
            self._obtained_mono = now.mono
            return self._keep(obtained, now)
        except TokenwardError:
            if self._held is None or not is_live(self._held, now):
                raise
            self._due_mono = now.mono + PAUSE_S
            return self._held

    async def _renewed(self, held: VaultToken, now: Instant) -> VaultToken | None:
        """The token with more life, or None when it is better replaced."""
        if not held.renewable:
            return None
        try:
            renewed = await renew_token(self._client, held, now=now)
        except VaultDeniedError as error:
            if refusal_of(error) is Refusal.BAD_TOKEN:
                self.forget(held)
            return None
        life_s = float("inf") if renewed.expires_mono is None else renewed.expires_mono - now.mono
        if life_s >= self._full_s / 2:
            return self._keep(renewed, now, full_s=self._full_s)
        self._held = renewed  # its maximum is near: used only until there is another
        return None

    def _keep(self, token: VaultToken, now: Instant, *, full_s: float | None = None) -> VaultToken:
        self._held = token
        if token.expires_mono is not None:
            life_s = token.expires_mono - now.mono
            self._full_s = life_s if full_s is None else full_s
            self._due_mono = now.mono + life_s * RENEW_AT
        return token


def is_live(token: VaultToken, now: Instant) -> bool:
    """Whether the vault still takes it, by its own word."""
    return token.expires_mono is None or now.mono < token.expires_mono


async def renew_token(
    client: VaultClient, token: VaultToken, *, now: Instant, increment_s: float | None = None
) -> VaultToken:
    """The same token with a new end, which the vault may cap. Raises VaultDeniedError when it cannot be renewed."""
    body = {} if increment_s is None else {"increment": f"{max(1, round(increment_s))}s"}
    request = VaultRequest("POST", "auth/token/renew-self", body)
    reply = await client.call(request, into=NoData, auth=token.token)
    renewed = reply.require_auth().held_from(now)
    ends = renewed.expires_mono
    return renewed if ends is None else replace(renewed, expires_mono=max(now.mono, ends - ROUNDED_UP_S))


async def revoke_token(client: VaultClient, token: VaultToken) -> None:
    """Ends `token` and every lease made with it; one that has ended already is as good. A batch token just expires."""
    if not token.accessor:
        return
    try:
        await client.call(VaultRequest("POST", "auth/token/revoke-self", {}), into=NoData, auth=token.token)
    except TokenwardError as error:
        if refusal_of(error) is not Refusal.BAD_TOKEN:
            raise
