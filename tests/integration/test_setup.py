"""The set-up of a vault, on a real OpenBao: what it makes is enough for the workloads, and for nothing else."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.openbao import Bao
from tests.postgres import Postgres
from tokenward.config import Config, parse
from tokenward.core.identity import Selector
from tokenward.core.model import Instant, Workload
from tokenward.core.secret import Secret
from tokenward.errors import Reason, TokenwardError, VaultDeniedError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.exchange import Exchange
from tokenward.vault.login import AgentSession
from tokenward.vault.setup import Change, Step, agent_spiffe_id, apply, plan, policy_name, revoke_admin
from tokenward.vault.signer import Signer

CONFIG = """
trust_domain = "example.org"

[environment]
name = "Test Lab"
vault_paths = ["secret", "database/creds", "transit/keys", "pki/sign"]

[vault]
addresses = ["unix:///run/bao.sock"]
signing = { issuer = "spiffe://example.org" }
login = { method = "jwt", role = "agent" }

[workloads.billing]
selectors = ["unix:uid:1001", "systemd:unit:billing.service", "unix:supplementary_gid:7", "unix:supplementary_gid:8"]
exchange = { method = "signed_jwt" }
[workloads.billing.credentials]
api = { kind = "kv", path = "secret/connectors/billing" }
db = { kind = "leased", path = "database/creds/billing" }
jwt = { kind = "jwt", path = "transit/keys/jwt", audiences = ["https://api.example"] }
svid = { kind = "x509", path = "pki/sign/svid", ttl = "1h" }
token = { kind = "vault_token" }

[workloads.ledger]
selectors = ["unix:uid:1002"]
exchange = { method = "signed_jwt" }
[workloads.ledger.credentials]
api = { kind = "kv", path = "secret/connectors/ledger" }
svid = { kind = "x509", path = "pki/sign/svid", ttl = "30m" }

[workloads.batch]
selectors = ["unix:uid:1003"]
spiffe_path = "/Teams/batch"
exchange = { method = "token_role" }
[workloads.batch.credentials]
api = { kind = "kv", path = "secret/connectors/batch" }
svid = { kind = "x509", path = "pki/sign/svid" }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A vault and the agent beside it."""

    bao: Bao
    client: VaultClient
    config: Config
    signer: Signer

    @property
    def steps(self) -> tuple[Step, ...]:
        """What `plan` leaves to us."""
        return tuple(
            step for step in plan(self.config, public_key_pem=self.signer.public_pem()) if isinstance(step, Step)
        )

    async def apply(self) -> dict[str, Change]:
        """What became of each step, by path."""
        outcomes = await apply(self.client, self.bao.admin_token, self.steps)
        return {outcome.step.path: outcome.change for outcome in outcomes if isinstance(outcome.step, Step)}

    async def admin(self, method: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        reply = await self.client.call(VaultRequest(method, path, body), into=dict[str, Any], auth=self.bao.admin_token)
        return reply.data or {}

    def exchange(self, signer: Signer | None = None) -> Exchange:
        signer, audience = signer or self.signer, "openbao"
        assert self.config.vault.login is not None
        session = AgentSession(
            client=self.client,
            login=self.config.vault.login,
            signer=signer,
            subject=agent_spiffe_id(self.config),
            audience=audience,
        )
        return Exchange(client=self.client, session=session, signer=signer, audience=audience, inline=True)

    async def as_workload(
        self, name: str, method: str, path: str, body: dict[str, object] | None = None
    ) -> dict[str, Any]:
        """A call with the rights of a workload, as the agent makes it."""
        request = VaultRequest(method, path, body)
        reply, _ = await self.exchange().call(self.config.workloads[name], request, into=dict[str, Any], now=now())
        return reply.data or {}

    async def as_agent(self, method: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        """A call with the agent's own rights."""
        reply = await self.exchange().agent_call(VaultRequest(method, path, body), into=dict[str, Any], now=now())
        return reply.data or {}


def now() -> Instant:
    return Instant(time.time(), time.monotonic())


def site_at(bao: Bao) -> Site:
    return Site(
        bao=bao,
        client=VaultClient(addresses=[bao.address]),
        config=parse({"tokenward.toml": CONFIG}),
        signer=Signer.generate(issuer="spiffe://example.org"),
    )


async def set_up(site: Site) -> None:
    """All that the configuration needs; each secret's value is its workload's name."""
    await site.apply()
    for name in ("billing", "ledger", "batch"):
        await site.admin("POST", f"secret/data/connectors/{name}", {"data": {"value": name}})


@pytest.fixture
async def site(fresh_bao: Bao) -> AsyncIterator[Site]:
    """A vault with nothing in it."""
    made = site_at(fresh_bao)
    yield made
    await made.client.close()


@pytest.fixture
async def ready(site: Site) -> Site:
    """A vault that was set up, for a test that changes it."""
    await set_up(site)
    return site


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """A vault that was set up, for tests that leave it as it is."""
    with tempfile.TemporaryDirectory(prefix="tokenward-bao-") as directory, Bao(directory=Path(directory)) as bao:
        made = site_at(bao)
        with asyncio.Runner() as runner:
            runner.run(set_up(made))
            yield made
            runner.run(made.client.close())


# -- a second time --------------------------------------------------------------------------------------------------


async def test_an_empty_vault_gets_everything(site: Site) -> None:
    assert set((await site.apply()).values()) == {Change.CREATED}


async def test_a_second_run_changes_nothing(ready: Site) -> None:
    before = len(ready.bao.requests())
    assert set((await ready.apply()).values()) == {Change.UNCHANGED}
    assert {seen["operation"] for seen in ready.bao.requests()[before:]} == {"read", "list"}


async def test_a_second_run_keeps_the_root_and_the_signing_key(ready: Site) -> None:
    issuers, key = await ready.admin("LIST", "pki/issuers"), await ready.admin("GET", "transit/keys/jwt")
    await ready.apply()
    assert await ready.admin("LIST", "pki/issuers") == issuers
    assert await ready.admin("GET", "transit/keys/jwt") == key


async def test_what_was_interrupted_goes_on_from_there(site: Site) -> None:
    done = site.steps[: len(site.steps) // 2]
    await apply(site.client, site.bao.admin_token, done)
    changes = list((await site.apply()).values())
    assert changes[: len(done)] == [Change.UNCHANGED] * len(done)
    assert set(changes[len(done) :]) == {Change.CREATED}


async def test_a_new_key_replaces_the_old_one(ready: Site) -> None:
    renewed = replace(ready, signer=Signer.generate(issuer="spiffe://example.org"))
    assert (await renewed.apply())["auth/jwt/config"] is Change.CORRECTED
    assert (await renewed.as_workload("billing", "GET", "secret/data/connectors/billing"))["data"]
    with pytest.raises(VaultDeniedError):
        await ready.as_workload("billing", "GET", "secret/data/connectors/billing")


async def test_during_a_rotation_both_keys_are_believed(ready: Site) -> None:
    renewed = Signer.generate(issuer="spiffe://example.org")
    both = plan(ready.config, public_key_pem=ready.signer.public_pem() + renewed.public_pem())
    await apply(ready.client, ready.bao.admin_token, both)
    for signer in (ready.signer, renewed):
        read = await replace(ready, signer=signer).as_workload("billing", "GET", "secret/data/connectors/billing")
        assert read["data"] == {"value": "billing"}


# -- changed by hand ------------------------------------------------------------------------------------------------

BILLING_ROLE, BATCH_ROLE = "auth/jwt/role/billing", "auth/token/roles/batch"
BILLING_POLICY = "sys/policies/acl/tokenward:example.org:test-lab:billing"


@pytest.mark.parametrize(
    ("path", "by_hand"),
    [
        (BILLING_ROLE, {"bound_claims": {"unix_uid": "1001"}}),
        (BILLING_ROLE, {"bound_claims": {}}),
        (BILLING_ROLE, {"bound_subject": ""}),
        (BILLING_ROLE, {"bound_audiences": ["openbao", "other"]}),
        (BILLING_ROLE, {"expiration_leeway": 3600}),
        (BILLING_ROLE, {"token_policies": ["root-like", "tokenward:example.org:test-lab:billing"]}),
        (BILLING_ROLE, {"token_no_default_policy": False}),
        (BILLING_ROLE, {"token_max_ttl": 999999}),
        (BILLING_ROLE, {"claim_mappings": {"sub": "name"}}),
        (BILLING_ROLE, {"groups_claim": "groups"}),
        (BATCH_ROLE, {"allowed_policies": ["other"]}),
        (BATCH_ROLE, {"allowed_policies_glob": ["*"]}),
        (BATCH_ROLE, {"allowed_entity_aliases": ["*"]}),
        (BATCH_ROLE, {"orphan": True}),
        (BATCH_ROLE, {"token_period": 3600}),
        (BILLING_POLICY, {"policy": 'path "secret/*" { capabilities = ["read"] }'}),
        ("auth/jwt/config", {"bound_issuer": "", "jwt_supported_algs": ["ES256", "RS256"]}),
    ],
)
async def test_what_was_changed_by_hand_is_put_right(ready: Site, path: str, by_hand: dict[str, object]) -> None:
    right = await ready.admin("GET", path)
    whole = dict(_step(ready, path).body)
    await ready.admin("POST", path, whole | by_hand)
    assert _fields(await ready.admin("GET", path)) != _fields(right)
    outcomes = [o for o in await apply(ready.client, ready.bao.admin_token, ready.steps) if o.differed]
    assert [(o.step, o.change) for o in outcomes] == [(_step(ready, path), Change.CORRECTED)]
    assert set(outcomes[0].differed) == set(by_hand)
    assert _fields(await ready.admin("GET", path)) == _fields(right)


@pytest.mark.parametrize(
    "by_hand",
    [{"allowed_uri_sans": ["*"]}, {"allow_any_name": True}, {"not_after_bound": "permit"}, {"max_ttl": "87600h"}],
)
async def test_a_certificate_role_changed_by_hand_is_put_right(ready: Site, by_hand: dict[str, object]) -> None:
    right = await ready.admin("GET", "pki/roles/svid")
    await ready.admin("POST", "pki/roles/svid", right | by_hand)
    assert (await ready.apply())["pki/roles/svid"] is Change.CORRECTED
    assert await ready.admin("GET", "pki/roles/svid") == right


def _fields(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what counts changes."""
    return {name: value for name, value in answer.items() if name not in {"version", "modified"}}


def _step(site: Site, path: str) -> Step:
    return next(step for step in site.steps if step.path == path)


FREE = {
    # Of the login with a browser, which a role of type jwt has not; and how a name is shown.
    BILLING_ROLE: {
        "allowed_redirect_uris",
        "callback_mode",
        "oauth2_metadata",
        "oidc_disable_confirmation",
        "oidc_scopes",
    },
    # Older names of fields that are there, and the role's own name. The vault does not show token_bound_cidrs or
    # token_num_uses while they are not set.
    BATCH_ROLE: {"explicit_max_ttl", "name", "period"},
    # What a certificate says beside its name, which is always empty here, and the issuer that an operator chooses.
    "pki/roles/svid": {
        "allow_wildcard_certificates",
        "country",
        "enforce_hostnames",
        "issuer_ref",
        "locality",
        "not_before",
        "organization",
        "ou",
        "policy_identifiers",
        "postal_code",
        "province",
        "signature_bits",
        "street_address",
        "use_pss",
    },
}


@pytest.mark.parametrize("path", FREE)
async def test_a_role_is_written_whole(shared: Site, path: str) -> None:
    """Each field that the vault knows is one that we set, or one that cannot widen anything."""
    known = (await shared.admin("GET", path)).keys()
    step = next(step for step in shared.steps if step.read == path)
    assert known - step.body.keys() == FREE[path]


async def test_another_kind_of_mount_is_not_touched(site: Site) -> None:
    await site.admin("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "1"}})
    with pytest.raises(TokenwardError, match="secret/ is there") as caught:
        await site.apply()
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert (await site.admin("GET", "sys/mounts/secret"))["options"] == {"version": "1"}


# -- what a workload can do, and cannot -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["billing", "ledger", "batch"])
async def test_a_workload_reads_its_own_secret(shared: Site, name: str) -> None:
    read = await shared.as_workload(name, "GET", f"secret/data/connectors/{name}")
    assert read["data"] == {"value": name}
    metadata = await shared.as_workload(name, "GET", f"secret/metadata/connectors/{name}")
    assert metadata["current_version"] == 1


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "secret/data/connectors/ledger", None),
        ("GET", "secret/data/connectors/billing/below", None),
        ("LIST", "secret/metadata/connectors", None),
        ("POST", "secret/data/connectors/billing", {"data": {"value": "mine"}}),
        ("DELETE", "secret/metadata/connectors/billing", None),
        ("POST", "transit/sign/jwt/sha2-256", {"input": "e30=", "marshaling_algorithm": "jws"}),
        ("GET", "transit/keys/jwt", None),
        ("GET", "auth/jwt/role/billing", None),
        ("POST", "auth/jwt/role/billing", {"token_policies": ["root-like"]}),
        ("POST", "auth/token/create", {}),
        ("POST", "auth/token/create/batch", {}),
        ("PUT", "sys/leases/revoke", {"lease_id": "database/creds/billing/x"}),
        ("POST", BILLING_POLICY, {"policy": ""}),
        ("GET", BILLING_POLICY, None),
        ("GET", "sys/mounts", None),
        ("POST", "pki/root/generate/internal", {"common_name": "mine"}),
        ("POST", "pki/issue/svid", {"uri_sans": "spiffe://example.org/billing"}),
    ],
)
async def test_a_workload_can_do_nothing_else(
    shared: Site, method: str, path: str, body: dict[str, object] | None
) -> None:
    with pytest.raises(VaultDeniedError) as caught:
        await shared.as_workload("billing", method, path, body)
    assert caught.value.reason is Reason.VAULT_DENIED
    assert "policies" in caught.value.public


@pytest.mark.parametrize(
    "change",
    [
        lambda billing: replace(billing, selectors=frozenset({Selector("unix:uid", "1001")})),
        lambda billing: replace(
            billing, selectors=billing.selectors - {Selector("unix:uid", "1001")} | {Selector("unix:uid", "1009")}
        ),
        lambda billing: replace(billing, selectors=billing.selectors - {Selector("unix:supplementary_gid", "8")}),
        lambda billing: replace(billing, spiffe_id=replace(billing.spiffe_id, path="/ledger")),
        lambda billing: replace(billing, exchange=replace(billing.exchange, role="ledger")),
        lambda billing: replace(billing, exchange=replace(billing.exchange, role="agent")),
    ],
    ids=["claims missing", "another uid", "one group of two", "another subject", "another role", "the agent's role"],
)
async def test_a_wrong_claim_is_refused(shared: Site, change: Callable[[Workload], Workload]) -> None:
    claimed = change(shared.config.workloads["billing"])
    request = VaultRequest("GET", "secret/data/connectors/billing")
    with pytest.raises(VaultDeniedError) as caught:
        await shared.exchange().call(claimed, request, into=dict[str, Any], now=now())
    assert caught.value.reason is Reason.LOGIN_FAILED


async def test_another_key_or_issuer_is_refused(shared: Site) -> None:
    request = VaultRequest("GET", "secret/data/connectors/billing")
    forger = Signer.generate(issuer="spiffe://example.org")
    with pytest.raises(VaultDeniedError):
        await shared.exchange(forger).call(shared.config.workloads["billing"], request, into=dict[str, Any], now=now())


async def test_an_expired_jwt_is_refused_to_the_second(shared: Site) -> None:
    """The vault's default leeway would take it for minutes more."""
    late = now().wall - 62
    with pytest.raises(VaultDeniedError):
        await shared.exchange().call(
            shared.config.workloads["billing"],
            VaultRequest("GET", "secret/data/connectors/billing"),
            into=dict[str, Any],
            now=Instant(late, 0.0),
        )


@pytest.mark.parametrize("name", ["billing", "ledger", "batch"])
async def test_a_workload_gets_a_certificate_for_its_own_name(shared: Site, name: str) -> None:
    spiffe_id = str(shared.config.workloads[name].spiffe_id)
    signed = await shared.as_workload(name, "POST", "pki/sign/svid", {"csr": request_for(spiffe_id), "ttl": "600s"})
    leaf = x509.load_pem_x509_certificate(signed["certificate"].encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [spiffe_id]


@pytest.mark.parametrize(
    "body",
    [
        {"name": "/ledger"},
        {"name": "/billing", "not_after": "2050-01-01T00:00:00Z"},
        {"name": "/billing", "uri_sans": "spiffe://example.org/ledger"},
        {"name": "/billing", "common_name": "ledger"},
    ],
)
async def test_a_certificate_for_another_name_or_beyond_the_limit_is_refused(
    shared: Site, body: dict[str, str]
) -> None:
    asked = {key: value for key, value in body.items() if key != "name"}
    csr = request_for(f"spiffe://example.org{body['name']}")
    with pytest.raises(VaultDeniedError):
        await shared.as_workload("billing", "POST", "pki/sign/svid", {"csr": csr, **asked})


def request_for(spiffe_id: str) -> str:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=True)
    signed = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


async def test_a_database_login_is_made_and_its_lease_renewed_with_the_token_that_made_it(
    shared: Site, postgres: Postgres
) -> None:
    await _connect_database(shared, postgres)
    exchange = shared.exchange()
    token, _ = await exchange.login(shared.config.workloads["billing"], now=now())
    made = await shared.client.call(
        VaultRequest("GET", "database/creds/billing", repeatable=False), into=dict[str, Any], auth=token.token
    )
    user, password = made.require_data()["username"], made.require_data()["password"]
    assert postgres.execute("SELECT 1 FROM pg_roles WHERE rolname = current_user", user=user, password=password)
    renewed = await shared.client.call(
        VaultRequest("PUT", "sys/leases/renew", {"lease_id": made.lease_id, "increment": 60}),
        into=dict[str, Any],
        auth=token.token,
    )
    assert renewed.lease_duration == 60
    await exchange.revoke(token)
    give_up_mono = time.monotonic() + 5
    while postgres.execute(f"SELECT 1 FROM pg_roles WHERE rolname = '{user}'"):  # leases end soon after their token
        assert time.monotonic() < give_up_mono
        await asyncio.sleep(0.02)


async def _connect_database(site: Site, postgres: Postgres) -> None:
    """What the plan leaves to the operator."""
    postgres.execute("CREATE ROLE setup_admin LOGIN CREATEROLE PASSWORD 'setup-admin'")
    await site.admin("POST", "sys/mounts/database", {"type": "database"})
    url = f"postgresql://{{{{username}}}}:{{{{password}}}}@{postgres.host}:{postgres.port}/postgres?sslmode=disable"
    await site.admin(
        "POST",
        "database/config/pg",
        {
            "plugin_name": "postgresql-database-plugin",
            "allowed_roles": ["billing"],
            "connection_url": url,
            "username": "setup_admin",
            "password": "setup-admin",
            "password_authentication": "scram-sha-256",
        },
    )
    creation = "CREATE ROLE \"{{name}}\" WITH LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';"
    await site.admin(
        "POST",
        "database/roles/billing",
        {
            "db_name": "pg",
            "default_ttl": "5m",
            "max_ttl": "15m",
            "creation_statements": [creation],
            "revocation_statements": ['DROP ROLE IF EXISTS "{{name}}";'],
        },
    )


# -- what the agent can do itself -----------------------------------------------------------------------------------


async def test_the_agent_signs_jwts(shared: Site) -> None:
    body = {
        "input": "e30=",
        "marshaling_algorithm": "jws",
        "key_version": 1,
        "signature_algorithm": "pkcs1v15",
    }
    assert (await shared.as_agent("POST", "transit/sign/jwt/sha2-256", body))["signature"].startswith("vault:v1:")
    assert (await shared.as_agent("GET", "transit/keys/jwt"))["latest_version"] == 1


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "transit/sign/jwt/sha2-256", {"input": "e30="}),
        ("POST", "transit/sign/jwt/sha2-256", {"input": "e30=", "marshaling_algorithm": "asn1"}),
        ("POST", "transit/sign/jwt/sha2-256", {"input": "e30=", "marshaling_algorithm": "jws", "prehashed": True}),
        ("POST", "transit/sign/jwt/sha2-512", {"input": "e30=", "marshaling_algorithm": "jws"}),
        ("POST", "transit/keys/jwt/rotate", {}),
        ("GET", "secret/data/connectors/billing", None),
        ("GET", "secret/data/connectors/batch", None),
        ("GET", "database/creds/billing", None),
        ("POST", "pki/sign/svid", {"csr": "x"}),
        ("POST", "auth/token/create", {"policies": ["tokenward:example.org:test-lab:billing"]}),
        ("POST", "auth/token/create/batch", {"entity_alias": "spiffe://example.org/billing"}),
        ("POST", "auth/token/create/batch", {}),
        (
            "POST",
            "auth/token/create/batch",
            {
                "entity_alias": "spiffe://example.org/Teams/batch",
                "policies": ["tokenward:example.org:test-lab:billing"],
            },
        ),
        ("POST", "auth/jwt/role/agent", {"token_policies": ["root-like"]}),
    ],
)
async def test_the_agent_itself_can_read_no_secret(
    shared: Site, method: str, path: str, body: dict[str, object] | None
) -> None:
    with pytest.raises(VaultDeniedError) as caught:
        await shared.as_agent(method, path, body)
    assert caught.value.reason is Reason.VAULT_DENIED


async def test_the_agents_children_have_the_workloads_policy_alone_and_end_with_the_agents_token(shared: Site) -> None:
    exchange = shared.exchange()
    token, _ = await exchange.login(shared.config.workloads["batch"], now=now())
    looked_up = (
        await shared.client.call(VaultRequest("GET", "auth/token/lookup-self"), into=dict[str, Any], auth=token.token)
    ).require_data()
    assert looked_up["policies"] == [policy_name(shared.config, "batch")]
    assert looked_up["meta"] == {"unix_uid": "1003"}
    assert looked_up["creation_ttl"] == 3600
    await exchange.agent_call(VaultRequest("POST", "auth/token/revoke-self", {}), into=dict[str, Any], now=now())
    with pytest.raises(VaultDeniedError):
        await shared.client.call(VaultRequest("GET", "auth/token/lookup-self"), into=dict[str, Any], auth=token.token)


async def test_the_administrators_token_can_be_ended(ready: Site) -> None:
    await revoke_admin(ready.client, ready.bao.admin_token)
    with pytest.raises(VaultDeniedError):
        await ready.admin("GET", "sys/mounts")
    assert await ready.as_workload("billing", "GET", "secret/data/connectors/billing")


async def test_a_token_without_the_right_to_set_up_is_refused(site: Site) -> None:
    with pytest.raises(VaultDeniedError):
        await apply(site.client, Secret("s.nobody"), site.steps)
