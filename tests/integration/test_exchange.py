"""Workloads proved to a real OpenBao, each by its own method, each with its own rights and no others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tls_bao import TlsBao, now, running
from tests.making import workload
from tokenward.config import TokenLogin
from tokenward.core.model import PlatformJwt, TokenRole, VaultToken, Workload
from tokenward.errors import Reason, VaultDeniedError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.exchange import Exchange, claims_of
from tokenward.vault.keeper import ROUNDED_UP_S, NoData
from tokenward.vault.login import AgentSession
from tokenward.vault.signer import Signer

READ = VaultRequest("GET", "secret/data/a")
OTHER = VaultRequest("GET", "other/data/a")
APP = workload(
    "app", "unix:uid:7", "unix:supplementary_gid:20", "unix:supplementary_gid:10", "systemd:unit:app.service"
)
ISSUER = "https://agent.example.org"


class Setting:
    """A vault that knows the key of `signer` and the workload `app`."""

    def __init__(self, bao: TlsBao) -> None:
        self.bao = bao
        self.signer = Signer.generate(issuer=ISSUER)
        self.client = VaultClient(addresses=[bao.address], timeout_s=10.0)

    async def set_up(self) -> None:
        await self.bao.enable_kv()
        await self.bao.admin("POST", "sys/mounts/other", {"type": "kv", "options": {"version": "2"}})
        await self.bao.admin("POST", "other/data/a", {"data": {"k": "not for app"}})
        await self.bao.admin("POST", "sys/auth/jwt", {"type": "jwt"})
        config = {"jwt_validation_pubkeys": [self.signer.public_pem()], "bound_issuer": ISSUER}
        await self.bao.admin("POST", "auth/jwt/config", config)
        claims = claims_of(APP.selectors)
        role = {
            "role_type": "jwt",
            "user_claim": "sub",
            "bound_subject": str(APP.spiffe_id),
            "bound_audiences": ["openbao"],
            "bound_claims": claims,
            "claim_mappings": {name: name for name in claims},
            "expiration_leeway": -1,
            "clock_skew_leeway": -1,
            "not_before_leeway": -1,
            "token_policies": ["reader"],
            "token_ttl": "5m",
            "token_max_ttl": "15m",
        }
        await self.bao.admin("POST", "auth/jwt/role/app", role)
        token_role = {
            "allowed_policies": ["reader"],
            "orphan": False,
            "renewable": True,
            "token_type": "service",
            "allowed_entity_aliases": ["spiffe://example.org/*"],
        }
        await self.bao.admin("POST", "auth/token/roles/app", token_role)

    def exchange(self, session: AgentSession | None = None, *, inline: bool = True) -> Exchange:
        return Exchange(client=self.client, session=session, signer=self.signer, audience="openbao", inline=inline)

    async def looked_up(self, token: VaultToken) -> dict[str, Any]:
        return await self.bao.admin("POST", "auth/token/lookup-accessor", {"accessor": token.accessor})


@pytest.fixture(scope="module")
def bao() -> Iterator[TlsBao]:
    with running() as made:
        yield made


@pytest.fixture
async def setting(bao: TlsBao) -> AsyncIterator[Setting]:
    made = Setting(bao)
    await made.set_up()
    yield made
    await made.client.close()
    for path in ("sys/mounts/secret", "sys/mounts/other", "sys/auth/jwt"):
        await bao.admin("DELETE", path)


@pytest.fixture
def session(setting: Setting, tmp_path: Path) -> AgentSession:
    (tmp_path / "token").write_text(setting.bao.admin_token.reveal())
    return AgentSession(client=setting.client, login=TokenLogin(token_file=str(tmp_path / "token")))


async def reads_its_own_and_no_other(exchange: Exchange, proved: Workload) -> str:
    """Reads what it may, is refused what it may not; the accessor of the token that was used."""
    reply, exchanged = await exchange.call(proved, READ, into=NoData, now=now())
    assert reply.require_data()["data"] == {"k": "v"}
    assert exchanged.vault_request_id == reply.request_id
    with pytest.raises(VaultDeniedError, match="policies do not allow") as caught:
        await exchange.call(proved, OTHER, into=NoData, now=now())
    assert caught.value.reason is Reason.VAULT_DENIED
    return exchanged.accessor


async def test_inline_no_token_exists_and_the_audit_log_names_the_workload(setting: Setting) -> None:
    before = len(setting.bao.requests())
    assert await reads_its_own_and_no_other(setting.exchange(), APP) == ""
    made = setting.bao.requests()[before:]
    assert [request["path"] for request in made if request["path"].startswith("auth/token")] == []
    assert "secret/data/a" in [request["path"] for request in made]


async def test_without_inline_authentication_one_token_is_kept_and_revoked_at_the_end(setting: Setting) -> None:
    exchange = setting.exchange(inline=False)
    first = await reads_its_own_and_no_other(exchange, APP)
    assert first
    assert await reads_its_own_and_no_other(exchange, APP) == first
    token = exchange.forget(APP.name)
    assert token is not None
    await exchange.revoke(token)
    with pytest.raises(VaultDeniedError):
        await setting.bao.admin("POST", "auth/token/lookup-accessor", {"accessor": first})


async def test_a_login_states_the_selectors_to_the_vault_and_its_token_is_the_callers(setting: Setting) -> None:
    exchange = setting.exchange()
    token, exchanged = await exchange.login(APP, now=now())
    other, _ = await exchange.login(APP, now=now())
    seen = await setting.looked_up(token)
    assert seen["meta"] == {"role": "app", **claims_of(APP.selectors)}
    assert seen["meta"]["unix_supplementary_gid"] == "10,20"
    assert (seen["ttl"] > 290, token.renewable, exchanged.accessor) == (True, True, token.accessor)
    await exchange.revoke(token)
    with pytest.raises(VaultDeniedError):
        await setting.looked_up(token)
    assert await setting.looked_up(other)


async def test_a_token_is_renewed_up_to_its_maximum(setting: Setting) -> None:
    exchange = setting.exchange()
    token, _ = await exchange.login(APP, now=now())
    sent = now()
    renewed = await exchange.renew(token, 600.4, now=sent)
    assert renewed.expires_mono == sent.mono + 600 - ROUNDED_UP_S
    capped = await exchange.renew(token, 36_000, now=sent)
    assert capped.expires_mono is not None
    assert capped.expires_mono <= sent.mono + 900


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("proved", "expected"),
    [
        (replace(APP, selectors=workload("app", "unix:uid:8").selectors), "other claims"),
        (replace(APP, spiffe_id=workload("else").spiffe_id), "another subject"),
    ],
    ids=["other selectors", "other subject"],
)
async def test_a_workload_that_the_role_does_not_bind_is_refused(
    setting: Setting, proved: Workload, expected: str, inline: bool
) -> None:
    with pytest.raises(VaultDeniedError, match=expected) as caught:
        await setting.exchange(inline=inline).call(proved, READ, into=NoData, now=now())
    assert caught.value.reason is Reason.LOGIN_FAILED


async def test_a_key_that_the_vault_does_not_know_proves_nothing(setting: Setting) -> None:
    setting.signer = Signer.generate(issuer=ISSUER)
    for attempt in (
        setting.exchange().call(APP, READ, into=NoData, now=now()),
        setting.exchange().login(APP, now=now()),
    ):
        with pytest.raises(VaultDeniedError, match="does not know the key") as caught:
            await attempt
        assert caught.value.reason is Reason.LOGIN_FAILED


@pytest.mark.parametrize("inline", [True, False])
async def test_a_platform_jwt_proves_the_workload(setting: Setting, tmp_path: Path, inline: bool) -> None:
    """Stands for a projected token: the vault sees a JWT that the agent did not make."""
    token = setting.signer.sign(
        subject=str(APP.spiffe_id), audience="openbao", claims=claims_of(APP.selectors), now=now()
    )
    (tmp_path / "jwt").write_text(token.reveal())
    pod = replace(APP, exchange=PlatformJwt(role="app", token_file=str(tmp_path / "jwt")))
    exchange = Exchange(client=setting.client, session=None, signer=None, audience="", inline=inline)
    accessor = await reads_its_own_and_no_other(exchange, pod)
    assert bool(accessor) is not inline


async def test_a_token_role_makes_a_child_with_the_spiffe_id_as_its_entity(
    setting: Setting, session: AgentSession
) -> None:
    by_role = replace(APP, exchange=TokenRole(role="app"))
    exchange = setting.exchange(session)
    await reads_its_own_and_no_other(exchange, by_role)
    token, exchanged = await exchange.login(by_role, now=now())
    seen = await setting.looked_up(token)
    assert seen["meta"] == claims_of(APP.selectors)
    assert seen["policies"] == ["default", "reader"]
    assert seen["path"] == "auth/token/create/app"
    entity = await setting.bao.admin("GET", f"identity/entity/id/{seen['entity_id']}")
    assert [alias["name"] for alias in entity["aliases"]] == [str(APP.spiffe_id)]
    assert (exchanged.method, exchanged.accessor) == ("token_role", token.accessor)


async def test_a_token_role_for_another_trust_domain_says_what_to_allow(
    setting: Setting, session: AgentSession
) -> None:
    foreign = replace(APP, exchange=TokenRole(role="app"), spiffe_id=type(APP.spiffe_id)("else.example", "/app"))
    with pytest.raises(VaultDeniedError, match="allowed_entity_aliases") as caught:
        await setting.exchange(session).login(foreign, now=now())
    assert caught.value.reason is Reason.LOGIN_FAILED


async def test_revoking_the_agents_token_ends_every_child(setting: Setting, tmp_path: Path) -> None:
    await setting.bao.admin(
        "POST",
        "sys/policies/acl/agent",
        {"policy": 'path "auth/token/create/app" { capabilities = ["create", "update"] }'},
    )
    made = VaultRequest("POST", "auth/token/create", {"policies": ["agent"], "ttl": "5m", "no_parent": True})
    reply = await setting.client.call(made, into=NoData, auth=setting.bao.admin_token)
    agents = reply.require_auth().held_from(now())
    (tmp_path / "agent").write_text(agents.token.reveal())
    session = AgentSession(client=setting.client, login=TokenLogin(token_file=str(tmp_path / "agent")))
    child, _ = await setting.exchange(session).login(replace(APP, exchange=TokenRole(role="app")), now=now())
    assert child.expires_mono is not None
    assert child.expires_mono < now().mono + 300  # its parent's end, not the 768 hours that the vault says
    assert not child.renewable
    await setting.exchange(session).revoke(agents)
    with pytest.raises(VaultDeniedError):
        await setting.looked_up(child)


async def test_the_agents_own_call_has_the_agents_rights(setting: Setting, session: AgentSession) -> None:
    reply = await setting.exchange(session).agent_call(OTHER, into=NoData, now=now())
    assert reply.require_data()["data"] == {"k": "not for app"}
