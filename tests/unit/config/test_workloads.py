"""The rules between workloads, and between a grant and what surrounds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokenward.config import parse
from tokenward.config.workloads import VALIDATION_KEYS
from tokenward.core.model import AnyValidation, HttpValidation, PostgresqlValidation, Template
from tokenward.errors import ConfigError, Problem

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"
HEAD = """\
trust_domain = "acme.example"
environment = { name = "test", vault_paths = ["production/", "database/creds", "transit/keys/web", "pki/sign"] }
vault = { addresses = ["unix:///v"], signing = {} }
"""


def shown(problems: tuple[Problem, ...]) -> list[str]:
    return [f"{problem.line} {problem.key}: {problem.expected}" for problem in problems]


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse({"f": HEAD + text})
    return shown(caught.value.problems)


def workload(name: str, selectors: str, more: str = "") -> str:
    """Three lines and `more`; the first workload begins at line 4."""
    return f'[workloads.{name}]\nselectors = [{selectors}]\nexchange.method = "signed_jwt"\n{more}'


def credential(lines: str, *, name: str = "c") -> str:
    """One workload with one credential, whose `lines` begin at line 8."""
    return workload("a", '"unix:uid:1"', f"[workloads.a.credentials.{name}]\n{lines}\n")


# -- between workloads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('"unix:uid:1"', '"unix:uid:1"'),
        ('"unix:uid:1"', '"unix:uid:1", "unix:gid:1"'),
        ('"unix:uid:1", "unix:gid:1"', '"unix:gid:1"'),
    ],
)
def test_two_workloads_that_match_one_process_are_an_error(first: str, second: str) -> None:
    assert problems_of(workload("a", first) + workload("b", second)) == [
        (
            "8 workloads.b.selectors: a process can match both this and workload 'a' (f:5): one's selectors are among"
            " the other's"
        )
    ]


def test_workloads_that_a_single_valued_type_tells_apart_are_fine() -> None:
    text = workload("a", '"unix:uid:1", "unix:gid:5"') + workload("b", '"unix:uid:2", "unix:path:/b"')
    assert parse({"f": HEAD + text}).warnings == ()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('"unix:uid:1"', '"systemd:unit:a.service"'),
        ('"unix:supplementary_gid:1"', '"unix:supplementary_gid:2"'),
    ],
)
def test_workloads_that_some_process_could_match_both_are_a_warning(first: str, second: str) -> None:
    warnings = parse({"f": HEAD + workload("a", first) + workload("b", second)}).warnings
    assert shown(warnings) == [
        (
            "8 workloads.b.selectors: a process that has these and those of workload 'a' would match both and get"
            " nothing; give them different values of one type"
        )
    ]


def test_two_workloads_with_one_spiffe_id_are_an_error() -> None:
    text = workload("a", '"unix:uid:1"') + workload("b", '"unix:uid:2"', 'spiffe_path = "/a"\n')
    assert problems_of(text) == ["10 workloads.b.spiffe_path: workload 'a' has the same SPIFFE ID"]


@pytest.mark.parametrize("name", ["A", "a_b", "-a", "a.b", "a" * 64, ""])
def test_a_name_is_lower_case_letters_digits_and_dashes(name: str) -> None:
    found = problems_of(workload(f'"{name}"', '"unix:uid:1"'))
    assert [one.partition(": ")[2] for one in found] == [
        "expected a name of 1 to 63 of a-z 0-9 -, that does not begin with -"
    ]


def test_credential_and_policy_names_have_the_same_form() -> None:
    found = problems_of("[policies.A]\n[policies.b.c]\n" + credential('kind = "vault_token"', name="C"))
    assert [one.split(": ")[0] for one in found] == ["4 policies.A", "5 policies.b.c", "9 workloads.a.credentials.C"]


# -- selectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ("", ': expected a list of at least one, such as ["..."]'),
        ("1", "[0]: expected a string of one line that is not empty"),
        ('"unix:uid:1", "unix:uid:2"', ": no process can have two of unix:uid"),
        ('"unix:uid:1", "unix:uid:1"', "[1]: is listed twice"),
    ],
)
def test_selectors_that_no_process_can_have(selectors: str, expected: str) -> None:
    assert problems_of(workload("a", selectors)) == [f"5 workloads.a.selectors{expected}"]


def test_a_bad_selector_is_one_problem_and_no_comparison_of_what_is_left() -> None:
    text = workload("a", '"unix:uid:1"') + workload("b", '"unix:uid:1", "unix:gid:x"')
    assert problems_of(text) == ["8 workloads.b.selectors[1]: expected unix:gid:NUMBER, in decimal"]


def test_a_process_can_have_several_supplementary_groups() -> None:
    text = workload("a", '"unix:supplementary_gid:1", "unix:supplementary_gid:2"')
    assert len(parse({"f": HEAD + text}).workloads["a"].selectors) == 2


def test_a_workload_without_selectors_is_an_error() -> None:
    assert problems_of('[workloads.a]\nexchange.method = "signed_jwt"\n') == ["4 workloads.a.selectors: is required"]


@pytest.mark.parametrize("program", ["python3.11", "node", "java", "ruby", "perl", "bash", "sh", "busybox"])
def test_an_interpreter_s_path_alone_is_a_warning(program: str) -> None:
    warnings = parse({"f": HEAD + workload("a", f'"unix:path:/usr/bin/{program}"')}).warnings
    assert shown(warnings) == [
        f"5 workloads.a.selectors: whatever {program} runs is this workload; add its user, unit or container"
    ]


@pytest.mark.parametrize("selectors", ['"unix:path:/usr/bin/ledgerd"', '"unix:path:/usr/bin/sh", "unix:uid:5"'])
def test_a_program_of_its_own_or_with_a_user_is_no_warning(selectors: str) -> None:
    assert parse({"f": HEAD + workload("a", selectors)}).warnings == ()


@pytest.mark.parametrize("selectors", ['"unix:uid:0"', '"unix:user:root"', '"unix:uid:0", "unix:gid:0"'])
def test_nothing_but_root_is_a_warning(selectors: str) -> None:
    warnings = parse({"f": HEAD + workload("a", selectors)}).warnings
    assert [one.expected.partition(";")[0] for one in warnings] == ["every process of root is this workload"]


# -- identity and exchange ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a", "/a/", "/a//b", "/a/../b", "/ä", "/a b"])
def test_a_bad_spiffe_path_is_an_error(path: str) -> None:
    [found] = problems_of(workload("a", '"unix:uid:1"', f'spiffe_path = "{path}"\n'))
    assert found.startswith("7 workloads.a.spiffe_path: ")


def test_an_unknown_exchange_names_the_nearest() -> None:
    text = workload("a", '"unix:uid:1"').replace("signed_jwt", "signed_jtw")
    assert problems_of(text) == [
        (
            "6 workloads.a.exchange.method: expected one of 'signed_jwt', 'platform_jwt', 'token_role'; did you mean"
            " 'signed_jwt'?"
        )
    ]


def test_an_exchange_needs_what_it_builds_on() -> None:
    text = workload("a", '"unix:uid:1"') + workload("b", '"unix:uid:2"').replace("signed_jwt", "token_role")
    with pytest.raises(ConfigError) as caught:
        parse({"f": HEAD.replace(", signing = {}", "") + text})
    assert shown(caught.value.problems) == [
        "6 workloads.a.exchange.method: 'signed_jwt' needs a table [vault.signing]",
        (
            "9 workloads.b.exchange.method: 'token_role' needs a table [vault.login]: the agent's own token makes the"
            " child"
        ),
    ]


def test_owner_and_purpose_are_required_by_the_policies_in_use() -> None:
    policies = '[policies.strict]\nrequire = ["owner", "purpose"]\n'
    strict = credential('kind = "vault_token"\npolicy = "strict"')
    assert parse({"f": HEAD + policies + credential('kind = "vault_token"')})
    assert problems_of(policies + strict) == [
        "6 workloads.a.owner: is required by policy 'strict'",
        "6 workloads.a.purpose: is required by policy 'strict'",
    ]
    assert parse({"f": HEAD + policies + strict.replace("exchange", 'owner = "o"\npurpose = "p"\nexchange')})


def test_a_workload_without_credentials_is_held_to_the_default_policy() -> None:
    text = '[policies.default]\nrequire = ["owner"]\n' + workload("a", '"unix:uid:1"')
    assert problems_of(text) == ["6 workloads.a.owner: is required by policy 'default'"]


# -- grants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["production/a", "production/a/b", "production/a/", "database/creds/x"])
def test_a_path_in_the_environment_is_fine(path: str) -> None:
    grant = parse({"f": HEAD + credential(f'kind = "leased"\npath = "{path}"')}).workloads["a"].grants["c"]
    assert grant.path == path.rstrip("/")


@pytest.mark.parametrize("path", ["productions/a", "staging/a", "database/credsx/a", "database/x"])
def test_a_path_outside_of_the_environment_is_an_error(path: str) -> None:
    assert problems_of(credential(f'kind = "leased"\npath = "{path}"')) == [
        (
            "9 workloads.a.credentials.c.path: is outside of environment.vault_paths (production, database/creds,"
            " transit/keys/web, pki/sign)"
        )
    ]


@pytest.mark.parametrize(
    "path",
    ["/production/a", "production//a", "production/../a", "production/*", "production/+/a", "production/a?b", ""],
)
def test_a_path_that_the_vault_could_read_otherwise_is_an_error(path: str) -> None:
    [found] = problems_of(credential(f'kind = "kv"\npath = "{path}"'))
    assert found.startswith("9 workloads.a.credentials.c.path: expected a ")


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        ("kv", "production", "expected the mount and a path in it, such as secret/teams/billing"),
        ("leased", "production", "expected the mount and a path in it, such as secret/teams/billing"),
        ("jwt", "transit/sign/web", "expected a path of the form transit/keys/NAME"),
        ("x509", "pki/issue/web", "expected a path of the form pki/sign/ROLE"),
        ("x509", "sign/web", "expected a path of the form pki/sign/ROLE"),
    ],
)
def test_each_kind_has_its_form_of_path(kind: str, path: str, expected: str) -> None:
    audiences = 'audiences = ["a"]' if kind == "jwt" else ""
    text = credential(f'kind = "{kind}"\npath = "{path}"\n{audiences}')
    assert problems_of(text) == [f"9 workloads.a.credentials.c.path: {expected}"]


@pytest.mark.parametrize(
    ("audiences", "expected"),
    [
        ("", "7 workloads.a.credentials.c.audiences: is required"),
        ("audiences = []", '10 workloads.a.credentials.c.audiences: expected a list of at least one, such as ["..."]'),
        ('audiences = ["a", "a"]', "10 workloads.a.credentials.c.audiences[1]: is listed twice"),
    ],
)
def test_a_jwt_needs_audiences(audiences: str, expected: str) -> None:
    assert problems_of(credential(f'kind = "jwt"\npath = "transit/keys/web"\n{audiences}')) == [expected]


def test_a_credential_needs_a_kind() -> None:
    assert problems_of(credential('path = "staging/a"')) == ["7 workloads.a.credentials.c.kind: is required"]


def test_polling_has_a_floor() -> None:
    [found] = problems_of(credential('kind = "kv"\npath = "production/a"\npoll = "999ms"'))
    assert found == "10 workloads.a.credentials.c.poll: expected a duration from 1s to 366d"


def test_a_scope_with_a_space_would_be_two() -> None:
    [found] = problems_of(credential('kind = "vault_token"\nscopes = ["a b"]'))
    assert found.startswith("9 workloads.a.credentials.c.scopes[0]: expected one scope")


def test_an_unknown_policy_names_the_nearest() -> None:
    text = "[policies.standard]\n" + credential('kind = "vault_token"\npolicy = "standart"')
    assert problems_of(text) == [
        "10 workloads.a.credentials.c.policy: there is no such policy; did you mean 'standard'?"
    ]


def test_a_credential_declared_twice_names_both_places() -> None:
    text = credential('kind = "vault_token"\n[workloads.a.credentials.c]\nkind = "kv"')
    assert problems_of(text) == ["9 workloads.a.credentials.c: is already declared at f:7"]


# -- times ----------------------------------------------------------------------------------------------------------


MARGIN = "expected more than 6s, the refresh margin: three attempts of vault.timeout each must fit in before expiry"


@pytest.mark.parametrize("ttl", ["5s", "6s"])
def test_a_life_under_the_refresh_margin_is_an_error(ttl: str) -> None:
    assert problems_of(f'[policies.a]\nmax_ttl = "{ttl}"\n') == [f"5 policies.a.max_ttl: {MARGIN}"]
    jwt = credential(f'kind = "jwt"\npath = "transit/keys/web"\naudiences = ["a"]\nttl = "{ttl}"')
    assert problems_of(jwt) == [f"11 workloads.a.credentials.c.ttl: {MARGIN}"]


def test_a_life_just_above_the_refresh_margin_is_fine() -> None:
    text = '[policies.a]\nmax_ttl = "6s1ms"\noverlap = "0s"\n'
    assert parse({"f": HEAD + text}).policies["a"].max_ttl_s == 6.001


def test_the_refresh_margin_follows_the_vault_s_timeout() -> None:
    text = HEAD.replace("signing", 'timeout = "21m", signing')
    with pytest.raises(ConfigError) as caught:
        parse({"f": text})
    assert [problem.key for problem in caught.value.problems] == ["policies.default.max_ttl"]


@pytest.mark.parametrize("overlap", ["1m", "2m"])
def test_an_overlap_as_long_as_the_life_is_an_error(overlap: str) -> None:
    [found] = problems_of(f'[policies.a]\nmax_ttl = "1m"\noverlap = "{overlap}"\n')
    assert found.startswith("6 policies.a.overlap: is ")


@pytest.mark.parametrize("share", ["0.1", "0.91", "1", "0", "-1", "nan", "inf", "true", '"0.5"'])
def test_refresh_at_is_a_share_of_the_lifetime(share: str) -> None:
    [found] = problems_of(f"[policies.a]\nrefresh_at = {share}\n")
    assert found.startswith("5 policies.a.refresh_at: expected a number above 0.1 and at most 0.9")


# -- how a new value is tried -----------------------------------------------------------------------------------------

KINDS = {
    "kv": 'kind = "kv"\npath = "production/a"\n',
    "leased": 'kind = "leased"\npath = "database/creds/a"\n',
    "vault_token": 'kind = "vault_token"\n',
    "jwt": 'kind = "jwt"\npath = "transit/keys/web"\naudiences = ["a"]\n',
    "x509": 'kind = "x509"\npath = "pki/sign/web"\n',
}
URL = "https://api.partner.example/v1/ping"
DB = 'postgresql = "db.acme.example/ledger"'


def validation_of(kind: str, table: str) -> AnyValidation | None:
    """What `validate = { <table> }` becomes in a credential of that kind."""
    text = credential(f"{KINDS[kind]}validate = {{ {table} }}")
    return parse({"f": HEAD + text}).workloads["a"].grants["c"].validate


def validation_problems(table: str, *, kind: str = "kv") -> list[str]:
    """As `problems_of`, without what is the same for all: the line and the credential."""
    line = 9 + KINDS[kind].count("\n") - 1
    found = problems_of(credential(f"{KINDS[kind]}validate = {{ {table} }}"))
    return [one.removeprefix(f"{line} workloads.a.credentials.c.") for one in found]


@pytest.mark.parametrize("kind", KINDS)
def test_without_validate_nothing_is_tried(kind: str) -> None:
    assert parse({"f": HEAD + credential(KINDS[kind])}).workloads["a"].grants["c"].validate is None


@pytest.mark.parametrize("kind", ["kv", "leased", "vault_token", "jwt"])
def test_a_check_by_http(kind: str) -> None:
    written = f'http = "{URL}", header = "X-Key", value = "{{token}}", method = "HEAD", expect = 204, timeout = "2s"'
    assert validation_of(kind, written + ', ca_file = "/etc/ca.pem"') == HttpValidation(
        url=URL,
        value=Template(("", ""), ("token",)),
        header="X-Key",
        method="HEAD",
        expect=204,
        timeout_s=2.0,
        ca_file="/etc/ca.pem",
    )


@pytest.mark.parametrize("kind", ["vault_token", "jwt"])
def test_a_kind_with_a_token_needs_no_more_than_an_address(kind: str) -> None:
    assert validation_of(kind, f'http = "{URL}"') == HttpValidation(
        url=URL, value=Template(("Bearer ", ""), ("token",)), header="Authorization", method="GET", expect=200
    )
    assert validation_problems(f'http = "{URL}", value = "{{api_key}}"', kind=kind)[0].startswith(
        f"validate.value: expected the fields of kind {kind!r} only: token"
    )


@pytest.mark.parametrize("kind", ["kv", "leased"])
def test_a_check_by_postgresql(kind: str) -> None:
    assert validation_of(kind, DB + ', ca_file = "/etc/ca.pem"') == PostgresqlValidation(
        host="db.acme.example", port=5432, database="ledger", sslmode="verify-full", ca_file="/etc/ca.pem"
    )
    assert validation_of(kind, 'postgresql = "/run/postgresql/ledger"') == PostgresqlValidation(
        host="/run/postgresql", port=5432, database="ledger", sslmode="disable"
    )
    for host in ("127.0.0.1", "[::1]", "localhost"):
        made = validation_of(kind, f'postgresql = "{host}:5433/ledger", sslmode = "disable"')
        assert made == PostgresqlValidation(host=host.strip("[]"), port=5433, database="ledger", sslmode="disable")


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("", "validate: expected the key 'http' or 'postgresql', such as { http = \"https://...\" }"),
        (
            f'http = "{URL}", {DB}, zzz = 1',
            "validate: expected the key 'http' or 'postgresql', one of them, not both",
        ),
        (f'http = "{URL}"', "validate.value: is required"),
        (
            'http = "http://api.partner.example", value = "{a}"',
            "validate.http: expected https://: plain http:// is taken only for a loopback address",
        ),
        (
            f'http = "{URL}", value = "{{a}}", sslmode = "disable"',
            "validate.sslmode: is a key of a check by 'postgresql', not by 'http'",
        ),
        (
            f'{DB}, ca_file = "/ca", expect = 200',
            "validate.expect: is a key of a check by 'http', not by 'postgresql'",
        ),
        (
            f'http = "{URL}", value = "{{a}}", expected = 200',
            "validate.expected: unknown key; did you mean 'expect'?",
        ),
        (
            f'http = "{URL}", value = "{{a}}", timeout = "31s"',
            "validate.timeout: expected a duration of at most 30s",
        ),
        (f'http = "{URL}", value = "{{a}}", method = "POST"', "validate.method: expected one of 'GET', 'HEAD'"),
        (DB, "validate.ca_file: is required: the CAs that may have signed the database's certificate"),
        (
            f'{DB}, sslmode = "disable"',
            "validate.sslmode: expected 'verify-full' or 'verify-ca': only a loopback address can do without TLS",
        ),
        (
            f'{DB}, sslmode = "require"',
            "validate.sslmode: expected one of 'verify-full', 'verify-ca', 'disable'",
        ),
        (
            'postgresql = "/run/pg/x", sslmode = "verify-full"',
            "validate.sslmode: expected one of 'disable'",
        ),
    ],
)
def test_mistakes_in_a_check_are_reported(written: str, problem: str) -> None:
    assert problem in validation_problems(written)


def test_every_mistake_in_a_check_is_reported_with_its_line() -> None:
    text = credential(
        f'{KINDS["kv"]}[workloads.a.credentials.c.validate]\nhttp = "ftp://a"\nvalue = "sk_live_1"\nexpect = "200"\n'
    )
    found = problems_of(text)
    assert [one.partition(": ")[0] for one in found] == [
        f"{line} workloads.a.credentials.c.validate.{key}"
        for line, key in ((11, "http"), (12, "value"), (13, "expect"))
    ]
    assert not any("sk_live_1" in one for one in found)


@pytest.mark.parametrize("kind", ["vault_token", "jwt"])
def test_a_token_is_no_database_login(kind: str) -> None:
    assert validation_problems(f'{DB}, ca_file = "/ca"', kind=kind) == [
        f"validate.postgresql: needs the fields username and password, which kind {kind!r} has not"
    ]


def test_a_certificate_is_not_tried() -> None:
    [found] = validation_problems(f'http = "{URL}"', kind="x509")
    assert found == ("validate: is a key of kind 'kv' and 'leased' and 'vault_token' and 'jwt', not of 'x509'")


def test_validate_is_a_table() -> None:
    text = credential(f'{KINDS["kv"]}validate = "https://a"')
    assert problems_of(text) == [
        "10 workloads.a.credentials.c.validate: expected a table, written [workloads.a.credentials.c.validate]"
    ]


@pytest.mark.parametrize(("way", "keys"), VALIDATION_KEYS.items())
def test_the_document_has_the_keys_of_each_check(way: str, keys: frozenset[str]) -> None:
    part = DOCUMENT.read_text().partition("### `validate`")[2].partition(f"`validate = {{ {way} =")[2]
    table = part.partition("\n| ")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `validate\.(\w+)` \|", table, re.MULTILINE)) == keys
