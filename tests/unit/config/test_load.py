"""`config.load` and `config.parse`: what a whole configuration becomes, and that every mistake is reported at once."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenward.config import (
    AppRoleLogin,
    CertLogin,
    JwtLogin,
    KubernetesLogin,
    Limits,
    Signing,
    TokenLogin,
    load,
    parse,
)
from tokenward.core.identity import Selector, SpiffeId
from tokenward.core.model import JwtGrant, KvGrant, LeasedGrant, PlatformJwt, Policy, SignedJwt, TokenRole, X509Grant
from tokenward.errors import ConfigError, Problem, Reason

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"

BASE = """\
trust_domain = "acme.example"
environment = { name = "test", vault_paths = ["secret", "database/creds/", "transit", "pki_int"] }
vault.addresses = ["unix:///run/vault.sock"]
vault.signing = {}
vault.login = { method = "jwt", role = "agent" }
"""
WORKLOAD = """\
[workloads.billing]
selectors = ["unix:uid:1001"]
exchange = { method = "signed_jwt" }
"""


def problems_of(text: str, **others: str) -> list[str]:
    """The problems of `text` and other documents, as `file:line key: expected` without the file where it is `text`."""
    with pytest.raises(ConfigError) as caught:
        parse({"": text, **others})
    assert caught.value.reason is Reason.INVALID_CONFIG
    return [f"{problem.file}:{problem.line} {problem.key}: {problem.expected}" for problem in caught.value.problems]


def in_workload(lines: str) -> str:
    """A configuration whose one workload has `lines` after its own three (which are lines 6 to 8)."""
    return BASE + WORKLOAD + lines


# -- what it becomes ------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_sections() -> None:
    config = parse({"": BASE})
    assert config.listen.workload_socket == "/run/tokenward/workload.sock"
    assert config.listen.workload_socket_mode == 0o666
    assert config.listen.runtime_dir == "/run/tokenward/inner"
    assert config.vault.timeout_s == 2.0
    assert config.vault.max_reply_bytes == 1 << 20
    assert config.vault.inline_auth
    assert config.vault.signing == Signing(issuer="spiffe://acme.example", audience="openbao", key_file="")
    assert config.audit.file == "/var/log/tokenward/audit.jsonl"
    assert (config.log.level, config.log.format) == ("info", "text")
    assert config.attestation.reattest_s == 60.0
    assert config.policies == {"default": Policy()}
    assert config.workloads == {}
    assert config.warnings == ()


def test_a_workload_and_its_credentials_become_the_domain_s_values() -> None:
    config = parse(
        {
            "": in_workload("""\
owner = "payments"
purpose = "bills"
spiffe_path = "/teams/billing"
[policies.quick]
max_ttl = "10m"
overlap = "30s"
refresh_at = 0.5
[workloads.billing.credentials.key]
kind = "kv"
path = "secret/teams/billing"
poll = "1m"
policy = "quick"
scopes = ["read"]
[workloads.billing.credentials.db]
kind = "leased"
path = "database/creds/ledger"
[workloads.billing.credentials.jwt]
kind = "jwt"
path = "transit/keys/billing"
audiences = ["https://a.example", "https://b.example"]
ttl = "90s"
[workloads.billing.credentials.svid]
kind = "x509"
path = "pki_int/sign/billing"
[workloads.billing.credentials.token]
kind = "vault_token"
""")
        }
    )
    workload = config.workloads["billing"]
    assert workload.spiffe_id == SpiffeId("acme.example", "/teams/billing")
    assert workload.selectors == {Selector("unix:uid", "1001")}
    assert workload.exchange == SignedJwt(role="billing", mount="jwt")
    assert (workload.owner, workload.purpose) == ("payments", "bills")
    quick = Policy(refresh_at=0.5, overlap_s=30, max_ttl_s=600)
    assert workload.grants["key"] == KvGrant(
        name="key", path="secret/teams/billing", mount="secret", poll_s=60.0, policy=quick, scopes=("read",)
    )
    assert workload.grants["db"] == LeasedGrant(name="db", path="database/creds/ledger")
    assert workload.grants["jwt"] == JwtGrant(
        name="jwt", path="transit/keys/billing", audiences=("https://a.example", "https://b.example"), ttl_s=90.0
    )
    assert workload.grants["svid"] == X509Grant(name="svid", path="pki_int/sign/billing")
    assert workload.grants["token"].path == ""


def test_each_exchange_becomes_its_own_value() -> None:
    text = BASE + "".join(
        f'[workloads.w{index}]\nselectors = ["unix:uid:{index + 1}"]\nexchange = {{ {exchange} }}\n'
        for index, exchange in enumerate(
            (
                'method = "signed_jwt", role = "r", mount = "jwt/hosts"',
                'method = "platform_jwt", token_file = "/var/run/secrets/tokens/vault"',
                'method = "token_role"',
            )
        )
    )
    assert [workload.exchange for workload in parse({"": text}).workloads.values()] == [
        SignedJwt(role="r", mount="jwt/hosts"),
        PlatformJwt(role="w1", token_file="/var/run/secrets/tokens/vault"),
        TokenRole(role="w2"),
    ]


@pytest.mark.parametrize(
    ("login", "becomes"),
    [
        ('method = "jwt", role = "r", token_file = "/t"', JwtLogin(role="r", mount="jwt", token_file="/t")),
        (
            'method = "kubernetes", role = "r"',
            KubernetesLogin(role="r", token_file="/var/run/secrets/kubernetes.io/serviceaccount/token"),
        ),
        (
            'method = "cert", role = "r", cert_file = "/c", key_file = "/k"',
            CertLogin(role="r", cert_file="/c", key_file="/k"),
        ),
        (
            'method = "approle", role_id = "i", wrapped_secret_id_file = "/w", mount = "m"',
            AppRoleLogin(role_id="i", wrapped_secret_id_file="/w", mount="m"),
        ),
        ('method = "token", token_file = "/t"', TokenLogin(token_file="/t")),
    ],
)
def test_each_login_becomes_its_own_value(login: str, becomes: object) -> None:
    text = BASE.replace('method = "jwt", role = "agent"', login).replace("unix:///run/vault.sock", "https://vault:8200")
    assert parse({"": text}).vault.login == becomes


def test_a_kv_mount_of_several_segments_is_named() -> None:
    text = in_workload('[workloads.billing.credentials.key]\nkind = "kv"\npath = "secret/eu/a"\nmount = "secret/eu"\n')
    grant = parse({"": text}).workloads["billing"].grants["key"]
    assert isinstance(grant, KvGrant)
    assert grant.mount == "secret/eu"
    assert problems_of(text.replace('"secret/eu"', '"secret/e"')) == [
        ":12 workloads.billing.credentials.key.mount: expected the beginning of path, up to a slash"
    ]


def test_the_default_policy_applies_where_none_is_named() -> None:
    text = in_workload('[policies.default]\nmax_ttl = "20m"\n[workloads.billing.credentials.t]\nkind = "vault_token"\n')
    assert parse({"": text}).workloads["billing"].grants["t"].policy.max_ttl_s == 1200.0


# -- files ----------------------------------------------------------------------------------------------------------


def test_drop_ins_beside_the_file_are_merged_in_order_of_name(tmp_path: Path) -> None:
    main = tmp_path / "tokenward.toml"
    main.write_text(BASE)
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "b.toml").write_text('[vault]\ntimeout = "1s"\n')
    (tmp_path / "conf.d" / "a.toml").write_text(WORKLOAD)
    (tmp_path / "conf.d" / "c.toml").write_text('[workloads.billing.credentials.t]\nkind = "vault_token"\n')
    (tmp_path / "conf.d" / "notes.txt").write_text("not TOML")
    (tmp_path / "conf.d" / ".hidden.toml").write_text("not TOML")
    config = load(str(main))
    assert list(config.workloads["billing"].grants) == ["t"]
    assert config.vault.timeout_s == 1.0


def test_a_key_in_two_files_names_both_places() -> None:
    assert problems_of(BASE, **{"conf.d/a.toml": '\n[vault]\naddresses = ["unix:///a"]\n'}) == [
        "conf.d/a.toml:3 vault.addresses: is already set at :3"
    ]


def test_a_workload_in_two_files_names_both_places() -> None:
    assert problems_of(BASE + WORKLOAD, **{"conf.d/a.toml": WORKLOAD}) == [
        "conf.d/a.toml:1 workloads.billing: is already declared at :6"
    ]


def test_a_credential_in_two_files_names_both_places() -> None:
    text = "[workloads.billing.credentials.c]\n"
    assert problems_of(in_workload(text + 'kind = "vault_token"\n'), **{"conf.d/a.toml": text}) == [
        "conf.d/a.toml:1 workloads.billing.credentials.c: is already declared at :9"
    ]


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "none.toml"))
    assert caught.value.problems == (
        Problem(str(tmp_path / "none.toml"), 1, "file", "cannot be read: No such file or directory"),
    )


def test_every_unreadable_file_is_reported(tmp_path: Path) -> None:
    main = tmp_path / "tokenward.toml"
    main.write_bytes(b"a = 1\nb = '\xff'\n")
    (tmp_path / "conf.d" / "a.toml").mkdir(parents=True)
    (tmp_path / "conf.d" / "b.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError) as caught:
        load(str(main))
    assert [(os.path.basename(one.file), one.line, one.expected) for one in caught.value.problems] == [
        ("tokenward.toml", 2, "expected UTF-8"),
        ("a.toml", 1, "cannot be read: Is a directory"),
        ("b.toml", 1, "is larger than 1 MiB"),
    ]


def test_a_drop_in_directory_that_others_may_write_is_said_once(tmp_path: Path) -> None:
    """Sticky or not: what others add there would be obeyed."""
    main, drop_ins = tmp_path / "tokenward.toml", tmp_path / "conf.d"
    main.write_text(BASE)
    drop_ins.mkdir()
    for name in ("a.toml", "b.toml"):
        (drop_ins / name).write_text("")
    for mode in (0o777, 0o1777):
        drop_ins.chmod(mode)
        with pytest.raises(ConfigError) as caught:
            load(str(main))
        (problem,) = caught.value.problems
        assert (problem.file, problem.line, problem.key) == (str(drop_ins), 1, "file")
        assert f"{mode:04o}" in problem.expected
    drop_ins.chmod(0o755)
    (drop_ins / "b.toml").chmod(0o666)
    with pytest.raises(ConfigError) as caught:
        load(str(main))
    assert [one.file for one in caught.value.problems] == [str(drop_ins / "b.toml")]


NAMED = """\
trust_domain = "acme.example"
environment = { name = "test", vault_paths = ["secret"] }
vault.addresses = ["https://vault"]
vault.ca_file = "/D/ca"
vault.signing.key_file = "/D/signing"
vault.login = { LOGIN }
[workloads.pod]
selectors = ["unix:uid:1"]
exchange = { method = "platform_jwt", token_file = "/D/projected" }
[workloads.pod.credentials.key]
kind = "kv"
path = "secret/a"
validate = { http = "https://api", value = "{key}", ca_file = "/D/api" }
"""
LOGINS = {
    "jwt": {"token_file": "/D/token"},
    "cert": {"cert_file": "/D/cert", "key_file": "/D/key"},
    "approle": {"role_id": "r", "wrapped_secret_id_file": "/D/wrapped"},
    "token": {"token_file": "/D/token"},
}
EVERYWHERE = {
    "vault.ca_file": "ca",
    "vault.signing.key_file": "signing",
    "workloads.pod.exchange.token_file": "projected",
    "workloads.pod.credentials.key.validate.ca_file": "api",
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others can enter; those of pytest are closed to them, which protects any key."""
    with tempfile.TemporaryDirectory(prefix="tw-load-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def configured(place: Path, method: str) -> str:
    role = {} if method in {"approle", "token"} else {"role": "r"}
    login = ", ".join(f'{key} = "{value}"' for key, value in ({"method": method} | role | LOGINS[method]).items())
    main = place / "tokenward.toml"
    main.write_text(NAMED.replace("LOGIN", login).replace("/D/", f"{place}/"))
    main.chmod(0o644)
    return str(main)


@pytest.mark.parametrize("method", LOGINS)
def test_every_file_that_is_named_must_be_for_us_alone_to_write(place: Path, method: str) -> None:
    files = EVERYWHERE | {
        f"vault.login.{key}": path.removeprefix("/D/") for key, path in LOGINS[method].items() if path.startswith("/D/")
    }
    main = configured(place, method)
    load(main)  # none of them is there yet
    for name in files.values():
        (place / name).write_text("")
        (place / name).chmod(0o622)
    with pytest.raises(ConfigError) as caught:
        load(main)
    found = {(one.key, one.file) for one in caught.value.problems}
    assert found == {(key, str(place / name)) for key, name in files.items()}
    for name in files.values():
        (place / name).chmod(0o600)
    load(main)


def test_keys_alone_must_be_for_us_alone_to_read(place: Path) -> None:
    """A CA is public, and tokens that a kubelet projects can be read by every user of the container."""
    main = configured(place, "cert")
    for name in ("ca", "signing", "projected", "api", "cert", "key"):
        (place / name).write_text("")
        (place / name).chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        load(main)
    assert {one.key for one in caught.value.problems} == {"vault.signing.key_file", "vault.login.key_file"}
    assert all("chmod go-r" in one.expected for one in caught.value.problems)


# -- every mistake at once ------------------------------------------------------------------------------------------


def test_every_mistake_is_reported_at_once_in_order_with_its_line() -> None:
    assert problems_of("""\
trust_domain = "Acme"
[environment]
name = "test"
vault_paths = [
    "secret",
    "/etc",     # its own line
    "a/../b",
]
[vault]
adresses = ["unix:///a"]
timeout = 2
[log]
level = "warn"
[workloads.a]
selectors = ["unix:uid:1"]
selectors = ["unix:uid:2"]
[workloads.a.credentials.b]
kind = "oath2"
audiences = ["whatever that kind has"]
""") == [
        ":1 trust_domain: a trust domain has 1 to 255 of a-z 0-9 . _ -, nothing else",
        ":6 environment.vault_paths[1]: " + VAULT_PATH_EXPECTED,
        ":7 environment.vault_paths[2]: " + VAULT_PATH_EXPECTED,
        ":9 vault.addresses: is required",
        ":10 vault.adresses: unknown key; did you mean 'addresses'?",
        ':11 vault.timeout: expected a duration with its unit, such as "2s" or "15m", not a bare number',
        ":13 log.level: expected one of 'debug', 'info', 'warning', 'error'; did you mean 'warning'?",
        ':14 workloads.a.exchange: is required, such as { method = "signed_jwt" }',
        ":16 workloads.a.selectors: is already set at :15",
        ":18 workloads.a.credentials.b.kind: expected one of 'kv', 'leased', 'vault_token', 'jwt', 'x509'",
    ]


VAULT_PATH_EXPECTED = (
    "expected a path such as secret/teams/billing: segments of A-Z a-z 0-9 . _ @ : = ~ -, no leading slash, no '..',"
    " no '//' and no wildcard"
)


def test_an_empty_file_is_told_what_it_needs() -> None:
    assert problems_of("") == [
        ":1 trust_domain: is required",
        ":1 environment.name: is required",
        ":1 environment.vault_paths: is required",
        ":1 vault.addresses: is required",
    ]


def test_a_syntax_error_is_reported_alone_since_it_hides_what_is_missing() -> None:
    found = problems_of('trust_domain = "a"\n[vault\nx = ?\n', other="y\n")
    assert [one.partition(": ")[0] for one in found] == [":2 syntax", ":3 syntax", "other:1 syntax"]


@pytest.mark.parametrize(
    "section", ["environment", "listen", "vault", "audit", "log", "attestation", "limits", "policies"]
)
def test_a_section_that_is_not_a_table_is_one_problem(section: str) -> None:
    lines = [line for line in BASE.splitlines() if not line.startswith(section)]
    found = problems_of("\n".join([f"{section} = 3", *lines]))
    assert found == [f":1 {section}: expected a table, written [{section}]"]


@pytest.mark.parametrize(
    ("key", "belongs"),
    [
        ('audiences = ["a"]', "audiences: is a key of kind 'jwt', not of 'vault_token'"),
        ('poll = "5s"', "poll: is a key of kind 'kv', not of 'vault_token'"),
        ('ttl = "5m"', "ttl: is a key of kind 'jwt' and 'x509', not of 'vault_token'"),
        ('path = "a/b"', "path: is a key of kind 'kv' and 'leased' and 'jwt' and 'x509', not of 'vault_token'"),
    ],
)
def test_a_key_of_another_kind_says_which_kind_has_it(key: str, belongs: str) -> None:
    text = in_workload(f'[workloads.billing.credentials.t]\nkind = "vault_token"\n{key}\n')
    assert problems_of(text) == [f":11 workloads.billing.credentials.t.{belongs}"]


def test_a_key_of_another_login_says_which_login_has_it() -> None:
    text = BASE.replace('role = "agent"', 'role = "agent", role_id = "x"')
    assert problems_of(text) == [":5 vault.login.role_id: is a key of method 'approle', not of 'jwt'"]


def test_a_policy_may_have_a_rate_that_is_no_part_of_what_a_value_is() -> None:
    """Or every value would end when it is changed."""
    policy = parse({"": f"{BASE}[policies.default]\nrate = '30/m'\n"}).policies["default"]
    assert policy.rate == 0.5
    assert policy == parse({"": BASE}).policies["default"]
    assert problems_of(f"{BASE}[policies.default]\nrate = 50\n") == [
        ':7 policies.default.rate: expected a rate such as "10/s" or "30/m"'
    ]


def test_limits_that_are_not_set_are_left_to_the_machine() -> None:
    assert parse({"": BASE}).limits == Limits()
    limits = parse({"": BASE + '[limits]\nconnections = 10\nrequest_rate = "5/s"\nidle = "1m"\n'}).limits
    assert limits == Limits(connections=10, request_rate=5.0, idle_s=60.0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("connections = 0", "connections: expected a whole number from 1 to 1000000"),
        ("streams = 1.5", "streams: expected a whole number from 1 to 1000000"),
        ("requests = true", "requests: expected a whole number from 1 to 1000000"),
        ('attestations = "4"', "attestations: expected a whole number from 1 to 1000000"),
        ("request_rate = 5", 'request_rate: expected a rate such as "10/s" or "30/m"'),
        ('max_head = "100B"', 'max_head: expected a size from "1KiB" to "64KiB"'),
        ('idle = "10ms"', "idle: expected a duration from 1s to 366d"),
        ("streams = 5\nstreams_per_uid = 6", "streams_per_uid: expected at most streams (5)"),
    ],
)
def test_what_is_no_limit(line: str, problem: str) -> None:
    at = 7 + line.count("\n")
    assert problems_of(f"{BASE}[limits]\n{line}\n") == [f":{at} limits.{problem}"]


def test_the_admin_socket_is_in_a_directory_of_its_own() -> None:
    found = problems_of(f"{BASE}[listen]\nadmin_socket = '/run/tokenward/admin.sock'\n")
    assert [one.partition(",")[0] for one in found] == [
        ":7 listen.admin_socket: is where callers or the agent's own things are; give it a directory of its own"
    ]


@pytest.mark.parametrize(
    ("part", "instead", "problem"),
    [
        (
            "vault.signing = {}\n",
            "",
            ":4 vault.login.token_file: is required, or a table [vault.signing] with which the agent signs its own JWT",
        ),
        (
            '"jwt", role = "agent"',
            '"cert", role = "a", cert_file = "/c", key_file = "/k"',
            ":5 vault.login.method: 'cert' needs https:// addresses only",
        ),
        (
            '["unix:///run/vault.sock"]',
            "[]",
            ':3 vault.addresses: expected a list of at least one, such as ["..."]',
        ),
        (
            '["unix:///run/vault.sock"]',
            '["unix:///a", "unix:///a"]',
            ":3 vault.addresses[1]: is listed twice",
        ),
    ],
)
def test_rules_within_the_vault_section(part: str, instead: str, problem: str) -> None:
    assert problems_of(BASE.replace(part, instead)) == [problem]


def test_the_inner_socket_is_beside_the_workload_socket_unless_it_is_said_where() -> None:
    text = BASE + '[listen]\nworkload_socket = "/run/t/w.sock"\n'
    assert parse({"": text}).listen.runtime_dir == "/run/t/inner"
    assert parse({"": text + 'runtime_dir = "/run/u"\n'}).listen.runtime_dir == "/run/u"


def test_the_inner_socket_s_path_must_fit_as_well() -> None:
    text = f'{BASE}[listen]\nworkload_socket = "/{"a" * 84}/w.sock"\n'
    assert problems_of(text) == [
        ":7 listen.workload_socket: leaves no room for the longer path of a socket beside it; set runtime_dir"
    ]
    assert parse({"": text + 'runtime_dir = "/run/u"\n'})
    assert parse({"": text.replace("aa", "a", 1)})


def test_the_workload_socket_cannot_be_where_callers_cannot_enter() -> None:
    text = BASE + '[listen]\nworkload_socket = "/run/t/w.sock"\nruntime_dir = "/run/t"\n'
    assert problems_of(text) == [":7 listen.workload_socket: is inside of runtime_dir, which callers cannot enter"]


def test_no_report_repeats_a_secret_pasted_into_the_wrong_key() -> None:
    text = BASE.replace('method = "jwt", role = "agent"', 'method = "token", token_file = "hvs.SECRET"')
    text += '[audit]\nfile = "hvs.SECRET"\n[log]\nlevel = "hvs.SECRET"\n'
    assert "SECRET" not in "".join(problems_of(text))


def test_a_key_with_terminal_escapes_is_reported_quoted() -> None:
    assert problems_of(BASE + '"\\u001b[31m" = 1\n')[0].startswith(':6 "\\u001b[31m": unknown key')


# -- warnings -------------------------------------------------------------------------------------------------------


def test_what_can_be_used_but_is_not_meant_is_a_warning() -> None:
    text = BASE.replace('"jwt", role = "agent"', '"token", token_file = "/t"').replace("unix:///run/v", "https://v")
    config = parse({"t": text.replace("vault.sock", "vault:8200")})
    assert [(one.line, one.key) for one in config.warnings] == [
        (5, "vault.login.method"),
        (4, "vault.signing.key_file"),
    ]


# -- the document ---------------------------------------------------------------------------------------------------


def test_the_example_of_the_document_loads_without_a_warning(tmp_path: Path) -> None:
    example = re.search(r"^```toml\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert example
    (tmp_path / "tokenward.toml").write_text(example[1])
    config = load(str(tmp_path / "tokenward.toml"))
    assert set(config.workloads) == {"stripe-sync", "webhooks"}
    assert config.warnings == ()


def sections_of_the_document() -> dict[str, set[str]]:
    """Heading to the keys of the table below it."""
    keys: dict[str, set[str]] = {}
    for part in re.split(r"^##+ ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        keys[heading.replace("`", "")] = set(re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE))
    return keys


LOGIN = 'vault.login = {{ method = "{}", zzz = 1 }}'
CREDENTIAL = '[workloads.billing.credentials.c]\nkind = "{}"\nzzz = 1\n'
WITH_UNKNOWN_KEY = {
    "Top level": "zzz = 1\n" + BASE,
    "[environment]": BASE.replace('name = "test"', 'name = "test", zzz = 1'),
    "[listen]": BASE + "[listen]\nzzz = 1\n",
    "[vault]": BASE + "vault.zzz = 1\n",
    "[vault.signing]": BASE.replace("{}", "{ zzz = 1 }"),
    "[audit]": BASE + "[audit]\nzzz = 1\n",
    "[leases]": BASE + "[leases]\nzzz = 1\n",
    "[state]": BASE + "[state]\nzzz = 1\n",
    "[log]": BASE + "[log]\nzzz = 1\n",
    "[attestation]": BASE + "[attestation]\nzzz = 1\n",
    "[limits]": BASE + "[limits]\nzzz = 1\n",
    "[policies.NAME]": BASE + "[policies.a]\nzzz = 1\n",
    "[workloads.NAME]": in_workload("zzz = 1\n"),
    **{
        f'method = "{method}"': BASE.replace('vault.login = { method = "jwt", role = "agent" }', LOGIN.format(method))
        for method in ("jwt", "kubernetes", "cert", "approle", "token")
    },
    **{
        f'exchange.method = "{method}"': in_workload("").replace('"signed_jwt"', f'"{method}", zzz = 1')
        for method in ("signed_jwt", "platform_jwt", "token_role")
    },
    **{
        f'kind = "{kind}"': in_workload(CREDENTIAL.format(kind))
        for kind in ("kv", "leased", "vault_token", "jwt", "x509")
    },
}


@pytest.mark.parametrize("heading", WITH_UNKNOWN_KEY)
def test_the_document_has_exactly_the_keys_that_are_known(heading: str) -> None:
    """The report of an unknown key lists the known ones, which are those that the parser asks for."""
    [listed] = [one for one in problems_of(WITH_UNKNOWN_KEY[heading]) if "zzz: unknown key; known here: " in one]
    assert set(listed.partition("known here: ")[2].split(", ")) == sections_of_the_document()[heading]


def test_the_document_has_no_section_that_is_not_known() -> None:
    with_keys = {heading for heading, keys in sections_of_the_document().items() if keys}
    assert with_keys == set(WITH_UNKNOWN_KEY)
