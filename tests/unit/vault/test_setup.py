"""What a vault must hold for a configuration, and how that reads."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tokenward.config import Config, parse
from tokenward.errors import Reason, TokenwardError
from tokenward.vault.setup import ByHand, Outcome, Step, plan, policy_name, render
from tokenward.vault.setup.applier import Change
from tokenward.vault.signer import Signer

PEM = Signer.generate(issuer="spiffe://example.org").public_pem()

HEAD = """
trust_domain = "example.org"
environment = { name = "Production EU", vault_paths = ["secret", "database/creds", "transit/keys", "pki/sign"] }
[vault]
addresses = ["https://vault.example:8200"]
signing = { issuer = "agents.example.org", audience = "bao", key_file = "/run/key" }
"""
AGENT = 'login = { method = "jwt", role = "agent" }\n'


def configured(*workloads: str, head: str = HEAD + AGENT) -> Config:
    return parse({"tokenward.toml": head + "\n".join(workloads)})


def workload(
    name: str,
    *credentials: str,
    exchange: str = '{ method = "signed_jwt" }',
    uid: int = 1000,
    selectors: str = "",
    extra: str = "",
) -> str:
    tables = (f"{key} = {rest}" for key, _, rest in (one.partition(" = ") for one in credentials))
    return "\n".join(
        [
            f"[workloads.{name}]",
            f'selectors = ["unix:uid:{uid}"{selectors}]',
            f"exchange = {exchange}",
            extra,
            f"[workloads.{name}.credentials]",
            *tables,
        ]
    )


KV = 'api = { kind = "kv", path = "secret/team/api" }'
LEASED = 'db = { kind = "leased", path = "database/creds/app" }'
JWT = 'jwt = { kind = "jwt", path = "transit/keys/jwt", audiences = ["a"] }'
X509 = 'svid = { kind = "x509", path = "pki/sign/svid" }'
TOKEN = 'token = { kind = "vault_token" }'
PLATFORM = '{ method = "platform_jwt", mount = "k8s", token_file = "/run/token" }'
CHILD = '{ method = "token_role" }'


def steps(config: Config) -> dict[str, Step]:
    """By path."""
    return {step.path: step for step in plan(config, public_key_pem=PEM) if isinstance(step, Step)}


def by_hand(config: Config) -> str:
    return "\n".join(step.what for step in plan(config, public_key_pem=PEM) if isinstance(step, ByHand))


def rules(config: Config, name: str = "") -> dict[str, str]:
    """The rules of a policy: path to what stands between its braces, on one line."""
    text = str(steps(config)[f"sys/policies/acl/{policy_name(config, name)}"].body["policy"])
    found = re.findall(r'path "([^"]+)" \{\n(.*?)\n\}\n', text, re.DOTALL)
    assert "".join(f'path "{path}" {{\n{body}\n}}\n' for path, body in found) == text
    return {path: " ".join(body.split()) for path, body in found}


OWN_TOKEN = {
    "auth/token/lookup-self": 'capabilities = ["read"]',
    "auth/token/renew-self": 'capabilities = ["update"]',
    "auth/token/revoke-self": 'capabilities = ["update"]',
}


# -- policies -------------------------------------------------------------------------------------------------------


def test_a_policy_names_its_trust_domain_environment_and_workload() -> None:
    config = configured(workload("app", KV))
    assert policy_name(config, "app") == "tokenward:example.org:production-eu:app"
    assert policy_name(config) == "tokenward:example.org:production-eu"


@pytest.mark.parametrize(
    ("credential", "allowed"),
    [
        (
            KV,
            {
                "secret/data/team/api": 'capabilities = ["read"]',
                "secret/metadata/team/api": 'capabilities = ["read"]',
            },
        ),
        (
            LEASED,
            {"database/creds/app": 'capabilities = ["read"]', "sys/leases/renew": 'capabilities = ["update"]'},
        ),
        (
            X509,
            {
                "pki/sign/svid": 'capabilities = ["update"] required_parameters = ["csr"]'
                ' allowed_parameters = { "csr" = [] "ttl" = [] }'
            },
        ),
        (JWT, {}),
        (TOKEN, {}),
    ],
)
def test_a_workload_may_do_what_its_grants_need_and_nothing_else(credential: str, allowed: dict[str, str]) -> None:
    assert rules(configured(workload("app", credential)), "app") == allowed | OWN_TOKEN


def test_a_secret_below_a_mount_of_two_parts_is_found_there() -> None:
    credential = 'api = { kind = "kv", path = "secret/team/api", mount = "secret/team" }'
    config = configured(workload("app", credential))
    assert "secret/team/data/api" in rules(config, "app")
    assert steps(config)["sys/mounts/secret/team"].body == {"type": "kv", "options": {"version": "2"}}


def test_the_agent_alone_signs_and_in_one_way() -> None:
    config = configured(workload("app", JWT))
    assert rules(config) == OWN_TOKEN | {
        "transit/sign/jwt/sha2-256": (
            'capabilities = ["update"] required_parameters = ["input", "marshaling_algorithm"] allowed_parameters = {'
            ' "input" = [] "key_version" = [] "marshaling_algorithm" = ["jws"] "signature_algorithm" = ["pkcs1v15"] }'
        ),
        "transit/keys/jwt": 'capabilities = ["read"]',
        "auth/token/revoke-accessor": 'capabilities = ["update"] required_parameters = ["accessor"]'
        ' allowed_parameters = { "accessor" = [] }',
    }


def test_the_agent_makes_children_for_their_own_name_only() -> None:
    config = configured(workload("app", KV, exchange=CHILD))
    assert rules(config)["auth/token/create/app"] == (
        'capabilities = ["update"] required_parameters = ["entity_alias"] allowed_parameters = {'
        ' "entity_alias" = ["spiffe://example.org/app"] "display_name" = [] "meta" = [] }'
    )


def test_an_agent_without_a_login_has_no_policy() -> None:
    config = configured(workload("app", KV), head=HEAD)
    assert f"sys/policies/acl/{policy_name(config)}" not in steps(config)


# -- roles ----------------------------------------------------------------------------------------------------------


def test_a_signed_jwt_is_bound_to_subject_audience_and_every_selector() -> None:
    config = configured(
        workload("app", KV, selectors=', "k8s:pod-uid:u", "unix:supplementary_gid:8", "unix:supplementary_gid:7"')
    )
    body = steps(config)["auth/jwt/role/app"].body
    assert body["bound_subject"] == "spiffe://example.org/app"
    assert body["bound_audiences"] == ["bao"]
    assert body["bound_claims"] == {"unix_uid": "1000", "unix_supplementary_gid": "7,8", "k8s_pod_uid": "u"}
    assert body["token_policies"] == [policy_name(config, "app")]
    assert (body["expiration_leeway"], body["clock_skew_leeway"], body["not_before_leeway"]) == (-1, -1, -1)


def test_the_mount_believes_the_agents_key_and_issuer() -> None:
    body = steps(configured(workload("app", KV)))["auth/jwt/config"].body
    assert body["jwt_validation_pubkeys"] == [PEM.strip()]
    assert body["bound_issuer"] == "agents.example.org"
    assert body["jwt_supported_algs"] == ["ES256"]


def test_a_key_that_is_none_is_an_error() -> None:
    with pytest.raises(TokenwardError, match="PEM") as caught:
        plan(configured(workload("app", KV)), public_key_pem="ssh-ed25519 AAAA")
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_each_mount_is_made_once_however_many_use_it() -> None:
    config = configured(
        workload("one", KV, X509), workload("two", KV, X509, uid=2, exchange='{ method = "signed_jwt", mount = "b" }')
    )
    paths = [step.path for step in plan(config, public_key_pem=PEM) if isinstance(step, Step)]
    assert len(paths) == len(set(paths))
    assert {"sys/mounts/secret", "sys/mounts/pki", "sys/auth/jwt", "sys/auth/b"} <= set(paths)


def test_the_agents_own_token_is_periodic_so_that_its_children_live_on() -> None:
    body = steps(configured(workload("app", KV)))["auth/jwt/role/agent"].body
    assert body["bound_subject"] == "spiffe://example.org/tokenward/agent"
    assert (body["token_period"], body["token_ttl"], body["token_max_ttl"]) == (900, 0, 0)


@pytest.mark.parametrize(
    ("max_ttl", "ttl_s", "max_ttl_s"), [("10m", 600, 600), ("1h", 900, 3600), ("2500ms", 3, 3)], ids=str
)
def test_a_token_lives_as_long_as_the_longest_grant(max_ttl: str, ttl_s: int, max_ttl_s: int) -> None:
    policy = f'[policies.p]\nmax_ttl = "{max_ttl}"\noverlap = "0s"\n'
    head = HEAD.replace("[vault]", '[vault]\ntimeout = "100ms"')
    body = steps(configured(workload("app", KV[:-1] + ', policy = "p" }'), policy, head=head))["auth/jwt/role/app"].body
    assert (body["token_ttl"], body["token_max_ttl"]) == (ttl_s, max_ttl_s)


def test_children_of_the_agents_token_end_with_it() -> None:
    config = configured(workload("app", KV, exchange=CHILD, extra='spiffe_path = "/Team/app"'))
    body = steps(config)["auth/token/roles/app"].body
    assert body["orphan"] is False
    assert body["allowed_policies"] == [policy_name(config, "app")]
    assert body["allowed_entity_aliases"] == ["spiffe://example.org/team/app"]
    assert body["token_explicit_max_ttl"] == 3600


def test_a_platform_token_is_bound_to_its_service_account() -> None:
    selectors = ', "k8s:ns:shop", "k8s:sa:web"'
    body = steps(configured(workload("app", KV, exchange=PLATFORM, selectors=selectors)))["auth/k8s/role/app"].body
    assert body["bound_subject"] == "system:serviceaccount:shop:web"
    assert body["bound_claims"] == {
        "/kubernetes.io/namespace": "shop",
        "/kubernetes.io/serviceaccount/name": "web",
    }


@pytest.mark.parametrize("selectors", ["", ', "k8s:ns:shop"', ', "k8s:sa:web"'])
def test_a_platform_token_that_cannot_be_bound_is_left_to_the_operator(selectors: str) -> None:
    """A role bound by its audience alone would let in every pod of the cluster."""
    config = configured(workload("app", KV, exchange=PLATFORM, selectors=selectors))
    assert "auth/k8s/role/app" not in steps(config)
    assert "auth/k8s/config" not in steps(config)
    said = by_hand(config)
    assert "role app at auth/k8s" in said
    assert policy_name(config, "app") in said
    assert "auth/k8s/config" in said
    assert "audience bao" in said


@pytest.mark.parametrize(
    ("login", "said"),
    [
        ('{ method = "kubernetes", role = "agents" }', "role agents at auth/kubernetes"),
        ('{ method = "jwt", role = "agents", mount = "k8s", token_file = "/run/t" }', "role agents at auth/k8s"),
        ('{ method = "cert", role = "agents", cert_file = "/c", key_file = "/k" }', "role agents at auth/cert"),
        ('{ method = "approle", role_id = "x", wrapped_secret_id_file = "/w" }', "AppRole at auth/approle"),
        ('{ method = "token", token_file = "/run/t" }', "in /run/t"),
    ],
)
def test_a_login_that_we_cannot_bind_is_left_to_the_operator_with_the_name_of_the_policy(login: str, said: str) -> None:
    config = configured(workload("app", KV), head=f"{HEAD}login = {login}\n")
    assert f"sys/policies/acl/{policy_name(config)}" in steps(config)
    assert said in by_hand(config)
    assert policy_name(config) in by_hand(config)


# -- certificates ---------------------------------------------------------------------------------------------------


def test_a_certificate_role_signs_the_name_under_which_the_caller_logged_in() -> None:
    config = configured(
        workload("app", X509), workload("bot", X509, uid=2, exchange=CHILD), workload("cat", X509, uid=3)
    )
    body = steps(config)["pki/roles/svid"].body
    assert body["allowed_uri_sans"] == [
        "{{identity.entity.aliases.<accessor of auth/jwt/>.name}}",
        "{{identity.entity.aliases.<accessor of auth/token/>.name}}",
    ]
    assert body["allowed_uri_sans_template"] is True
    assert body["not_after_bound"] == "ttl-limited"


def test_a_certificate_is_not_stored_so_that_standbys_can_sign_it() -> None:
    body = steps(configured(workload("app", X509)))["pki/roles/svid"].body
    assert (body["no_store"], body["generate_lease"]) == (True, False)


def test_a_certificate_role_lasts_as_long_as_its_longest_grant() -> None:
    config = configured(workload("app", X509[:-1] + ', ttl = "30m" }'), workload("bot", X509, uid=2))
    body = steps(config)["pki/roles/svid"].body
    assert (body["ttl"], body["max_ttl"]) == (3600, 3600)


def test_a_platform_workload_has_a_certificate_role_of_its_own_with_its_name_in_it() -> None:
    alone = configured(workload("app", X509, exchange=PLATFORM))
    assert steps(alone)["pki/roles/svid"].body["allowed_uri_sans"] == ["spiffe://example.org/app"]
    with pytest.raises(TokenwardError, match="app needs a PKI role of its own"):
        plan(configured(workload("app", X509, exchange=PLATFORM), workload("bot", X509, uid=2)), public_key_pem=PEM)


# -- what cannot be told apart --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "workloads",
    [
        [workload("app", KV), workload("bot", KV, uid=2, exchange='{ method = "signed_jwt", role = "app" }')],
        [workload("app", KV, exchange='{ method = "signed_jwt", role = "agent" }')],
        [
            workload("app", KV, exchange=CHILD),
            workload("bot", KV, uid=2, exchange='{ method = "token_role", role = "app" }'),
        ],
    ],
)
def test_two_with_one_role_are_an_error(workloads: list[str]) -> None:
    with pytest.raises(TokenwardError, match="is used twice") as caught:
        plan(configured(*workloads), public_key_pem=PEM)
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_the_same_role_name_at_two_mounts_is_no_error() -> None:
    other = workload("bot", KV, uid=2, exchange='{ method = "signed_jwt", role = "app", mount = "b" }')
    assert "auth/b/role/app" in steps(configured(workload("app", KV), other))


def test_a_mount_for_both_kinds_of_jwt_is_an_error() -> None:
    shared = '{ method = "platform_jwt", mount = "jwt", token_file = "/run/token" }'
    with pytest.raises(TokenwardError, match="use two mounts"):
        plan(configured(workload("app", KV), workload("bot", KV, uid=2, exchange=shared)), public_key_pem=PEM)


@pytest.mark.parametrize("path", ["/tokenward/agent", "/Tokenward/Agent"])
def test_a_workload_with_the_agents_name_is_an_error(path: str) -> None:
    with pytest.raises(TokenwardError, match="SPIFFE ID"):
        plan(configured(workload("app", KV, extra=f'spiffe_path = "{path}"')), public_key_pem=PEM)


def test_two_names_that_differ_in_case_alone_are_an_error() -> None:
    """The vault's entity aliases are compared without case: both would be one entity."""
    other = workload("bot", KV, uid=2, extra='spiffe_path = "/APP"')
    with pytest.raises(TokenwardError, match="SPIFFE ID"):
        plan(configured(workload("app", KV), other), public_key_pem=PEM)


# -- what is printed ------------------------------------------------------------------------------------------------

EVERYTHING = configured(workload("app", KV, LEASED, JWT, X509, TOKEN), workload("bot", KV, uid=2, exchange=CHILD))


def test_what_is_printed_is_a_shell_script_that_says_all_there_is_to_do(tmp_path: Path) -> None:
    """Run with a `bao` that only writes down what it is given."""
    stub = tmp_path / "bao"
    stub.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$*" >> ' + shlex.quote(f"{tmp_path}/asked") + "\n"
        'cat > "' + str(tmp_path) + "/$(wc -l < " + str(tmp_path) + '/asked)"\n'
    )
    stub.chmod(0o700)
    planned = plan(EVERYTHING, public_key_pem=PEM)
    script = render(planned)
    subprocess.run(["sh", "-eu"], input=script, text=True, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    asked = (tmp_path / "asked").read_text().splitlines()
    doable = [step for step in planned if isinstance(step, Step)]
    assert len(asked) == len(doable)
    for number, (line, step) in enumerate(zip(asked, doable, strict=True), start=1):
        given = (tmp_path / str(number)).read_text()
        if "policy" in step.body:
            assert line == f"policy write {step.path.removeprefix('sys/policies/acl/')} -"
            assert given == step.body["policy"]
        else:
            assert line == f"write {step.path} -"
            assert json.loads(given) == step.body


def test_what_is_printed_says_what_is_left_to_the_operator() -> None:
    script = render(plan(EVERYTHING, public_key_pem=PEM))
    assert "# BY HAND: the engine and the role behind database/creds/app" in script
    assert "# BY HAND: the fields of the secret secret/team/api" in script
    assert "# <accessor of auth/jwt/> is: bao read -field=accessor sys/auth/jwt" in script


def test_an_outcome_says_what_differed() -> None:
    step = steps(EVERYTHING)["auth/jwt/role/app"]
    outcome = Outcome(step, Change.CORRECTED, ("bound_claims", "token_ttl"))
    assert str(outcome) == "corrected: who may log in as app (bound_claims, token_ttl)"
