"""An agent that a real OpenBao believes: set up by `vault.setup` for given grants, ready for an issuer to use."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.making import workload
from tests.openbao import Bao
from tokenward.config import Config, Environment, JwtLogin, Signing, Vault
from tokenward.core.model import AnyGrant, Instant, Workload
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.exchange import Exchange
from tokenward.vault.keeper import NoData
from tokenward.vault.login import AgentSession
from tokenward.vault.setup import agent_spiffe_id, apply, plan
from tokenward.vault.signer import Signer


@dataclass(frozen=True)
class Agent:
    """What an issuer needs, and the administrator's hand to change the vault behind its back."""

    client: VaultClient
    exchange: Exchange
    workload: Workload
    bao: Bao

    async def admin(self, method: str, path: str, body: Mapping[str, object] | None = None) -> NoData:
        reply = await self.client.call(VaultRequest(method, path, body), into=NoData, auth=self.bao.admin_token)
        return reply.data or {}


def now() -> Instant:
    return Instant(time.time(), time.monotonic())


@asynccontextmanager
async def agent_at(bao: Bao, *grants: AnyGrant) -> AsyncIterator[Agent]:
    """An agent with one workload, `billing`, that has `grants`."""
    billing = workload("billing", grants={grant.name: grant for grant in grants})
    signing = Signing(issuer="https://agent.example.org")
    login = JwtLogin(role="agent")
    config = Config(
        trust_domain="example.org",
        environment=Environment(name="test", vault_paths=("",)),
        vault=Vault(addresses=(bao.address,), login=login, signing=signing),
        policies={},
        workloads={billing.name: billing},
    )
    signer = Signer.generate(issuer=signing.issuer)
    client = VaultClient(addresses=config.vault.addresses)
    try:
        await apply(client, bao.admin_token, plan(config, public_key_pem=signer.public_pem()))
        session = AgentSession(
            client=client, login=login, signer=signer, subject=agent_spiffe_id(config), audience=signing.audience
        )
        exchange = Exchange(client=client, session=session, signer=signer, audience=signing.audience, inline=True)
        yield Agent(client, exchange, billing, bao)
    finally:
        await client.close()
