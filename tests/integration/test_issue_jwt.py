"""JWTs signed by a real OpenBao, read by a verifier that knows nothing but the public key."""

from __future__ import annotations

from typing import Any

import jwt
import pytest

from tests.issuing import Agent, agent_at, now
from tests.openbao import Bao
from tokenward.core.model import Issued, JwtGrant
from tokenward.errors import VaultBadReplyError, VaultDeniedError
from tokenward.issuers.jwt import JwtIssuer
from tokenward.vault.client import VaultRequest
from tokenward.vault.keeper import NoData

ISSUER = "https://tokenward.example.org"
PARTNER = "https://api.partner.example"
GRANT = JwtGrant(name="partner", path="transit/keys/partner", audiences=(PARTNER,), ttl_s=120, scopes=("a", "b"))


async def verified(agent: Agent, issued: Issued, version: int, *, algorithm: str = "ES256") -> dict[str, Any]:
    """The claims, as a partner verifies them: by the published key, for its own audience, now."""
    key = (await agent.admin("GET", GRANT.path))["keys"][str(version)]["public_key"]
    token = issued.values["token"].reveal()
    assert jwt.get_unverified_header(token)["kid"] == f"partner-v{version}"
    claims: dict[str, Any] = jwt.decode(token, key, algorithms=[algorithm], audience=PARTNER, issuer=ISSUER)
    return claims


async def test_a_token_verifies_with_the_published_key(fresh_bao: Bao) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        issued = await JwtIssuer(exchange=agent.exchange, issuer=ISSUER).issue(agent.workload, GRANT, PARTNER, now())
        claims = await verified(agent, issued, 1)
    assert claims["sub"] == "spiffe://example.org/billing"
    assert claims["scope"] == "a b"
    assert claims["exp"] - claims["iat"] == 120


@pytest.mark.parametrize("kind", ["rsa-2048", "rsa-3072"])
async def test_a_token_by_an_rsa_key_verifies_as_rs256(fresh_bao: Bao, kind: str) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        await agent.admin("POST", f"{GRANT.path}/config", {"deletion_allowed": True})
        await agent.admin("DELETE", GRANT.path)
        await agent.admin("POST", GRANT.path, {"type": kind})
        issued = await JwtIssuer(exchange=agent.exchange, issuer=ISSUER).issue(agent.workload, GRANT, PARTNER, now())
        await verified(agent, issued, 1, algorithm="RS256")


async def test_a_key_that_is_rotated_and_retired_is_followed_at_once(fresh_bao: Bao) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        issuer = JwtIssuer(exchange=agent.exchange, issuer=ISSUER)
        await issuer.issue(agent.workload, GRANT, PARTNER, now())
        await agent.admin("POST", f"{GRANT.path}/rotate", {})
        await verified(agent, await issuer.issue(agent.workload, GRANT, PARTNER, now()), 1)
        await agent.admin("POST", f"{GRANT.path}/config", {"min_encryption_version": 2})
        await verified(agent, await issuer.issue(agent.workload, GRANT, PARTNER, now()), 2)


async def test_a_key_made_anew_behind_our_back_is_followed_at_once(fresh_bao: Bao) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        issuer = JwtIssuer(exchange=agent.exchange, issuer=ISSUER)
        await issuer.issue(agent.workload, GRANT, PARTNER, now())
        await agent.admin("POST", f"{GRANT.path}/config", {"deletion_allowed": True})
        await agent.admin("DELETE", GRANT.path)
        await agent.admin("POST", GRANT.path, {"type": "ecdsa-p256"})
        await verified(agent, await issuer.issue(agent.workload, GRANT, PARTNER, now()), 1)


async def test_a_key_of_another_kind_is_refused_with_what_to_do(fresh_bao: Bao) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        await agent.admin("POST", f"{GRANT.path}/config", {"deletion_allowed": True})
        await agent.admin("DELETE", GRANT.path)
        await agent.admin("POST", GRANT.path, {"type": "aes256-gcm96"})
        with pytest.raises(VaultBadReplyError, match="make it one of ecdsa-p256"):
            await JwtIssuer(exchange=agent.exchange, issuer=ISSUER).issue(agent.workload, GRANT, PARTNER, now())


async def test_a_workload_may_not_sign_for_itself(fresh_bao: Bao) -> None:
    """Transit signs any claims, so the right to sign would be the right to be anybody."""
    request = VaultRequest(
        "POST", "transit/sign/partner/sha2-256", {"input": "e30uZTMw", "marshaling_algorithm": "jws", "key_version": 1}
    )
    async with agent_at(fresh_bao, GRANT) as agent:
        with pytest.raises(VaultDeniedError):
            await agent.exchange.call(agent.workload, request, into=NoData, now=now())
