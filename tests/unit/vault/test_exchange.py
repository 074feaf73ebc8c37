"""Whom a call is made as, against a fake vault; that a real one agrees is tried in the integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import vault as fake
from tests.fakes.vault import FakeVault, serving
from tests.making import instant, workload
from tokenward.config import TokenLogin
from tokenward.core.identity import SELECTOR_TYPES, Selector
from tokenward.core.model import AnyExchange, PlatformJwt, SignedJwt, TokenRole, Workload
from tokenward.errors import Reason, VaultDeniedError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.exchange import Exchange, claims_of
from tokenward.vault.login import AgentSession
from tokenward.vault.signer import Signer

READ = VaultRequest("GET", "secret/data/a")


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[FakeVault]:
    made = FakeVault(secrets={"secret/data/a": {"k": "v"}}, roles={"app": ("secret/",)})
    with serving(made, socket_path=str(tmp_path / "vault.sock")):
        yield made


@pytest.fixture
async def client(vault: FakeVault) -> AsyncIterator[VaultClient]:
    made = VaultClient(addresses=[vault.address], timeout_s=5.0, threads=2)
    yield made
    await made.close()


@pytest.fixture
def session(vault: FakeVault, client: VaultClient, tmp_path: Path) -> AgentSession:
    (tmp_path / "agent-token").write_text(vault.new_token(("agent/",)))
    return AgentSession(client=client, login=TokenLogin(token_file=str(tmp_path / "agent-token")))


def exchange(client: VaultClient, session: AgentSession | None = None, *, inline: bool = True) -> Exchange:
    signer = Signer.generate(issuer="https://agent")
    return Exchange(client=client, session=session, signer=signer, audience="openbao", inline=inline)


def proved_by(how: AnyExchange, *selectors: str) -> Workload:
    return replace(workload("app", *selectors), exchange=how)


async def test_inline_a_read_makes_no_token(vault: FakeVault, client: VaultClient) -> None:
    reply, exchanged = await exchange(client).call(workload(), READ, into=dict, now=instant(0))
    assert reply.require_data()["data"] == {"k": "v"}
    assert not vault.tokens
    assert len(vault.requests) == 1
    assert (exchanged.method, exchanged.role, exchanged.accessor) == ("signed_jwt", "app", "")
    assert exchanged.vault_request_id == reply.request_id


async def test_without_inline_a_token_is_kept_for_a_workload_and_another_for_the_next(
    vault: FakeVault, client: VaultClient
) -> None:
    vault.roles["other"] = ("secret/",)
    made = exchange(client, inline=False)
    for _ in range(3):
        for each in (workload("app"), workload("other")):
            _, exchanged = await made.call(each, READ, into=dict, now=instant(0))
    assert len(vault.asked_for("auth/jwt/login")) == 2
    assert exchanged.accessor == list(vault.tokens.values())[1].accessor


async def test_many_calls_of_one_cold_workload_log_in_once(vault: FakeVault, client: VaultClient) -> None:
    made = exchange(client, inline=False)
    await asyncio.gather(*(made.call(workload(), READ, into=dict, now=instant(0)) for _ in range(20)))
    assert len(vault.asked_for("auth/jwt/login")) == 1


async def test_a_kept_token_that_was_revoked_is_thrown_away_and_the_call_tried_once_more(
    vault: FakeVault, client: VaultClient
) -> None:
    made = exchange(client, inline=False)
    await made.call(workload(), READ, into=dict, now=instant(0))
    vault.tokens.clear()
    await made.call(workload(), READ, into=dict, now=instant(0))
    assert len(vault.asked_for("auth/jwt/login")) == 2


async def test_a_workload_whose_proof_was_configured_anew_is_proved_anew(vault: FakeVault, client: VaultClient) -> None:
    made = exchange(client, inline=False)
    await made.call(workload("app", "unix:uid:1"), READ, into=dict, now=instant(0))
    await made.call(workload("app", "unix:uid:2"), READ, into=dict, now=instant(0))
    assert len(vault.asked_for("auth/jwt/login")) == 2


async def test_a_login_gives_a_token_of_its_own_each_time(vault: FakeVault, client: VaultClient) -> None:
    made = exchange(client)
    first, _ = await made.login(workload(), now=instant(0))
    second, exchanged = await made.login(workload(), now=instant(10))
    assert first.token != second.token
    assert (second.expires_mono, exchanged.accessor) == (310, second.accessor)
    await made.revoke(first)
    assert set(vault.tokens) == {second.token.reveal()}


async def test_the_jwt_states_the_workloads_own_selectors(vault: FakeVault, client: VaultClient) -> None:
    await exchange(client).login(workload("app", "unix:uid:7", "systemd:unit:app.service"), now=instant(0))
    sent = jwt.decode(vault.requests[0].body.split(b'"jwt":"')[1].split(b'"')[0], options={"verify_signature": False})
    assert sent["sub"] == "spiffe://example.org/app"
    assert (sent["unix_uid"], sent["systemd_unit"], sent["aud"]) == ("7", "app.service", "openbao")


async def test_a_platform_jwt_is_sent_as_it_is(vault: FakeVault, client: VaultClient, tmp_path: Path) -> None:
    (tmp_path / "jwt").write_text("a.b.c\n")
    pod = proved_by(PlatformJwt(role="app", token_file=str(tmp_path / "jwt")))
    _, exchanged = await exchange(client).login(pod, now=instant(0))
    assert b'"a.b.c"' in vault.requests[0].body
    assert exchanged.method == "platform_jwt"


async def test_a_token_role_makes_a_child_of_the_agents_token_and_reads_with_it(
    vault: FakeVault, client: VaultClient, session: AgentSession
) -> None:
    vault.roles["app-role"] = ("secret/",)
    by_role = proved_by(TokenRole(role="app-role"), "unix:uid:7")
    made = exchange(client, session)
    reply, exchanged = await made.call(by_role, READ, into=dict, now=instant(0))
    (created,) = vault.asked_for("auth/token/create/app-role")
    assert b'"entity_alias":"spiffe://example.org/app"' in created.body
    assert b'"meta":{"unix_uid":"7"}' in created.body
    agents = (await session.token(instant(0))).token.reveal()
    child = vault.asked_for("secret/data/a")[0].headers["X-Vault-Token"]
    assert child != agents
    assert (exchanged.method, exchanged.accessor, bool(reply.data)) == (
        "token_role",
        vault.tokens[child].accessor,
        True,
    )


async def test_the_agents_own_call_goes_with_the_agents_token(
    vault: FakeVault, client: VaultClient, session: AgentSession
) -> None:
    vault.secrets["agent/key"] = {"k": "v"}
    await exchange(client, session).agent_call(VaultRequest("GET", "agent/key"), into=dict, now=instant(0))
    sent = vault.asked_for("agent/key")[0].headers["X-Vault-Token"]
    assert sent == (await session.token(instant(0))).token.reveal()


async def test_without_a_login_of_its_own_the_agent_says_what_is_missing(client: VaultClient) -> None:
    with pytest.raises(VaultDeniedError, match=r"configure vault\.login") as caught:
        await exchange(client).agent_call(READ, into=dict, now=instant(0))
    assert caught.value.reason is Reason.LOGIN_FAILED


@pytest.mark.parametrize("inline", [True, False])
async def test_a_workload_that_cannot_be_proved_is_told_from_one_without_rights(
    vault: FakeVault, client: VaultClient, inline: bool
) -> None:
    made = exchange(client, inline=inline)
    with pytest.raises(VaultDeniedError, match="no such role") as unproved:
        await made.call(proved_by(SignedJwt(role="none")), READ, into=dict, now=instant(0))
    with pytest.raises(VaultDeniedError, match="policies do not allow") as without:
        await made.call(workload(), VaultRequest("GET", "other/a"), into=dict, now=instant(0))
    assert (unproved.value.reason, without.value.reason) == (Reason.LOGIN_FAILED, Reason.VAULT_DENIED)


async def test_inline_a_mount_that_is_not_there_is_a_failed_login(vault: FakeVault, client: VaultClient) -> None:
    vault.lies.append(fake.refuses(403, fake.NO_TOKEN))
    with pytest.raises(VaultDeniedError, match="auth/jwt/login") as caught:
        await exchange(client).call(workload(), READ, into=dict, now=instant(0))
    assert caught.value.reason is Reason.LOGIN_FAILED


async def test_a_missing_role_of_an_engine_is_no_failed_login(vault: FakeVault, client: VaultClient) -> None:
    vault.lies.append(fake.refuses(400, "unknown role: web"))
    with pytest.raises(VaultDeniedError, match="engine has no such role") as caught:
        await exchange(client).call(workload(), READ, into=dict, now=instant(0))
    assert caught.value.reason is Reason.VAULT_DENIED


async def test_a_kept_token_that_is_forgotten_is_whoever_asked_s_to_revoke(
    vault: FakeVault, client: VaultClient
) -> None:
    made = exchange(client, inline=False)
    await made.call(workload("app"), READ, into=dict, now=instant(0))
    token = made.forget("app")
    assert token is not None
    assert made.forget("app") is made.forget("never seen") is None
    await made.revoke(token)
    assert vault.tokens == {}
    await made.call(workload("app"), READ, into=dict, now=instant(0))
    assert len(vault.tokens) == 1, "it starts again"


async def test_a_token_with_all_rights_is_given_back_and_refused(vault: FakeVault, client: VaultClient) -> None:
    auth = {"client_token": "s.everything", "accessor": "a", "lease_duration": 60, "policies": ["default", "root"]}
    vault.lies.append(fake.says(200, {"request_id": "r", "auth": auth}))
    with pytest.raises(VaultDeniedError, match="all rights") as caught:
        await exchange(client).login(workload(), now=instant(0))
    assert caught.value.reason is Reason.LOGIN_FAILED
    (revoked,) = vault.asked_for("auth/token/revoke-self")
    assert revoked.headers["X-Vault-Token"] == "s.everything"


async def test_a_renewal_asks_for_whole_seconds_and_counts_less_than_it_gets_from_before_it_was_sent(
    vault: FakeVault, client: VaultClient
) -> None:
    made = exchange(client)
    token, _ = await made.login(workload(), now=instant(0))
    renewed = await made.renew(token, 59.7, now=instant(100))
    assert vault.asked_for("auth/token/renew-self")[0].body == b'{"increment":"60s"}'
    assert renewed.expires_mono == 399, "the vault rounds up what is left"


def test_each_kind_of_selector_is_a_claim_of_its_own() -> None:
    claims = claims_of([Selector(kind, "v") for kind in SELECTOR_TYPES])
    assert len(claims) == len(SELECTOR_TYPES)
    assert claims["k8s_pod_uid"] == "v"


@given(st.lists(st.builds(Selector, st.sampled_from(sorted(SELECTOR_TYPES)), st.text("0123456789", min_size=1))))
def test_claims_do_not_depend_on_the_order_of_selectors(selectors: list[Selector]) -> None:
    assert claims_of(selectors) == claims_of(reversed(selectors))


def test_several_of_one_kind_are_one_claim_that_needs_them_all() -> None:
    selectors = [Selector.parse(f"unix:supplementary_gid:{gid}") for gid in (20, 10)]
    assert claims_of(selectors) == {"unix_supplementary_gid": "10,20"}
