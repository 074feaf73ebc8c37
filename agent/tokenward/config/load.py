"""Loads the configuration: finds the files, reads the sections, and raises every mistake at once.

Owns: which files there are, the order of reading, and the rules between sections. Leaves lines to `toml_lines`, plain
sections to `form`, and policies and workloads to `workloads`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tokenward.config import values
from tokenward.config.form import choose, fill, keys_of
from tokenward.config.sections import (
    DEFAULT_TIMEOUT_S,
    AppRoleLogin,
    AttestationConfig,
    Audit,
    CertLogin,
    Config,
    Environment,
    JwtLogin,
    KubernetesLogin,
    Leases,
    Limits,
    Listen,
    Log,
    Login,
    Signing,
    StateFile,
    TokenLogin,
    Vault,
)
from tokenward.config.toml_lines import Table, read
from tokenward.config.workloads import WorkloadReader
from tokenward.core.model import PlatformJwt
from tokenward.errors import ConfigError, Problem
from tokenward.hardening import flaw_of

LOGINS: tuple[type[Login], ...] = (JwtLogin, KubernetesLogin, CertLogin, AppRoleLogin, TokenLogin)
LOGIN_KEYS: Mapping[type[Login], frozenset[str]] = {cls: keys_of(cls) | {"method"} for cls in LOGINS}
_LOGIN_FILES = ("token_file", "cert_file", "key_file", "wrapped_secret_id_file")

_MAX_FILE_BYTES = 1 << 20
_ATTEMPTS = 3
"""Calls to the vault for which a refresh must leave room before expiry."""
_HAVE_NAMES = frozenset({"policies", "workloads", "credentials"})


def load(path: str) -> Config:
    """The configuration in `path` and in every `*.toml` of `conf.d` beside it, in order of name.

    Reads these files and nothing else; of the files that it names, it looks at who may write them, and who may read the
    keys among them. Raises ConfigError with all mistakes.
    """
    problems: list[Problem] = []
    documents: dict[str, str] = {}
    for file in [path, *_drop_ins(path, problems)]:
        _verify_ours(file, "file", problems)
        text = _text(file, problems)
        if text is not None:
            documents[file] = text
    if problems:
        raise ConfigError(tuple(problems))
    config = parse(documents)
    for key, file in _files_of(config):
        _verify_ours(file, key, problems)
    if problems:
        raise ConfigError(tuple(problems))
    return replace(config, source=path)


def parse(documents: Mapping[str, str]) -> Config:
    """The configuration in `documents`, file name to text, the main file first. Raises ConfigError with all mistakes.

    Where a document is not TOML, only what is wrong with its form is raised: its meaning is not known.
    """
    root, is_toml = read(documents, unique_in=_HAVE_NAMES)
    config = _config(root) if is_toml else None
    if config is None or root.problems:
        files = list(documents)
        raise ConfigError(tuple(sorted(root.problems, key=lambda problem: (files.index(problem.file), problem.line))))
    return config


def _config(root: Table) -> Config | None:
    root.require("trust_domain")
    trust_domain = root.take("trust_domain", values.trust_domain, "")
    environment = fill(root.child("environment"), Environment)
    vault_table = root.child("vault")
    timeout_s = vault_table.take("timeout", values.duration(), DEFAULT_TIMEOUT_S)
    vault = fill(
        vault_table,
        Vault,
        timeout_s=timeout_s,
        login=_login(vault_table),
        signing=_signing(vault_table, trust_domain),
    )
    listen = _listen(root.child("listen"))
    reader = WorkloadReader(
        trust_domain=trust_domain or "unknown",
        environment=environment,
        margin_s=_ATTEMPTS * timeout_s,
        has_login="login" in vault_table,
        has_signing="signing" in vault_table,
    )
    policies, workloads = reader.read(root)
    if vault and isinstance(vault.login, CertLogin) and not all(one.startswith("https:") for one in vault.addresses):
        vault_table.child("login").report("method", "'cert' needs https:// addresses only")
    audit = fill(root.child("audit"), Audit) or Audit()
    leases = fill(root.child("leases"), Leases) or Leases()
    state = fill(root.child("state"), StateFile) or StateFile()
    log = fill(root.child("log"), Log) or Log()
    attestation = fill(root.child("attestation"), AttestationConfig) or AttestationConfig()
    limits = _limits(root.child("limits"))
    root.report_unknown()
    if environment is None or vault is None:
        return None
    return Config(
        trust_domain=trust_domain,
        environment=environment,
        listen=listen,
        vault=vault,
        audit=audit,
        leases=leases,
        state=state,
        log=log,
        attestation=attestation,
        limits=limits,
        policies=policies,
        workloads=workloads,
        warnings=(*_vault_warnings(vault_table, vault), *reader.warnings),
    )


def _listen(table: Table) -> Listen:
    socket = table.take("workload_socket", values.socket_path, Listen().workload_socket)
    beside = os.path.join(os.path.dirname(socket), "inner")
    runtime_dir = table.take("runtime_dir", values.socket_directory, beside)
    if socket.startswith(runtime_dir + "/"):
        table.report("workload_socket", "is inside of runtime_dir, which callers cannot enter")
    if runtime_dir == beside and len(beside.encode()) > values.MAX_SOCKET_DIRECTORY_BYTES:
        table.report("workload_socket", "leaves no room for the longer path of a socket beside it; set runtime_dir")
    admin = table.take("admin_socket", values.socket_path, "")
    if admin and os.path.dirname(admin) in {os.path.dirname(socket), runtime_dir}:
        table.report("admin_socket", "is where callers or the agent's own things are; give it a directory of its own")
    made = fill(table, Listen, workload_socket=socket, runtime_dir=runtime_dir, admin_socket=admin)
    return made or Listen()


def _limits(table: Table) -> Limits:
    limits = fill(table, Limits) or Limits()
    for key in ("connections", "streams", "requests"):
        most, most_of_one = getattr(limits, key), getattr(limits, f"{key}_per_uid")
        if most is not None and most_of_one is not None and most_of_one > most:
            table.report(f"{key}_per_uid", f"expected at most {key} ({most})")
    return limits


def _login(vault: Table) -> Login | None:
    if "login" not in vault:
        return None
    table = vault.child("login")
    chosen = choose(table, "method", LOGINS, keys=LOGIN_KEYS)
    if chosen is JwtLogin and "token_file" not in table and "signing" not in vault:
        table.report("token_file", "is required, or a table [vault.signing] with which the agent signs its own JWT")
    return None if chosen is None else fill(table, chosen)


def _signing(vault: Table, trust_domain: str) -> Signing | None:
    if "signing" not in vault:
        return None
    table = vault.child("signing")
    return fill(table, Signing, issuer=table.take("issuer", values.text, f"spiffe://{trust_domain}"))


def _vault_warnings(table: Table, vault: Vault) -> list[Problem]:
    warnings: list[Problem] = []
    if isinstance(vault.login, TokenLogin):
        why = "'token' is for development: a token in a file is a secret at rest that nobody renews"
        warnings.append(table.child("login").problem("method", why))
    if vault.signing and not vault.signing.key_file and any(one.startswith("https://") for one in vault.addresses):
        why = "is made in memory at each start, and a vault elsewhere cannot know it; set key_file"
        warnings.append(table.child("signing").problem("key_file", why))
    return warnings


def _files_of(config: Config) -> Iterator[tuple[str, str]]:
    """Every file that the agent reads because the configuration names it, with its key."""
    vault = config.vault
    named = {"vault.ca_file": vault.ca_file, "vault.signing.key_file": vault.signing.key_file if vault.signing else ""}
    named |= {f"vault.login.{key}": getattr(vault.login, key, "") for key in _LOGIN_FILES}
    for name, workload in config.workloads.items():
        if isinstance(workload.exchange, PlatformJwt):
            named[f"workloads.{name}.exchange.token_file"] = workload.exchange.token_file
        for credential, grant in workload.grants.items():
            key = f"workloads.{name}.credentials.{credential}.validate.ca_file"
            named[key] = grant.validate.ca_file if grant.validate is not None else ""
    return ((key, file) for key, file in named.items() if file)


def _verify_ours(file: str, key: str, problems: list[Problem]) -> None:
    """Notes when others than root and we may change `file`, or read it where it is a key. What is not there passes."""
    flaw = flaw_of(file, is_secret=key.endswith(".key_file"))
    if flaw is None:
        return
    problem = Problem(flaw.place, 1, key, flaw.why)
    if problem not in problems:
        problems.append(problem)


def _drop_ins(path: str, problems: list[Problem]) -> list[str]:
    directory = os.path.join(os.path.dirname(path), "conf.d")
    try:
        found = sorted(os.listdir(directory))
        _verify_ours(directory, "file", problems)
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(Problem(directory, 1, "file", f"cannot be read: {error.strerror}"))
        return []
    return [os.path.join(directory, one) for one in found if one.endswith(".toml") and not one.startswith(".")]


def _text(file: str, problems: list[Problem]) -> str | None:
    data = b""
    try:
        with open(file, "rb") as opened:
            data = opened.read(_MAX_FILE_BYTES + 1)
        if len(data) <= _MAX_FILE_BYTES:
            return data.decode()
        problems.append(Problem(file, 1, "file", f"is larger than {_MAX_FILE_BYTES >> 20} MiB"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(Problem(file, line, "syntax", "expected UTF-8"))
    except OSError as error:
        problems.append(Problem(file, 1, "file", f"cannot be read: {error.strerror}"))
    return None
