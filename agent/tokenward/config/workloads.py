"""Reads [policies] and [workloads]: who processes can be, and what each of them may have.

Owns: the rules between the keys of a workload, between workloads, and between a grant and its surroundings (the
environment's paths, the policies, the vault's timeout). Leaves single values to `values` and plain sections to `form`.

Invariant: no two workloads have selectors of which one set holds the other, so a process that is one of them by its
configuration is not the other as well; and no grant names a path outside of the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tokenward.config import values
from tokenward.config.form import choose, fill, keys_of
from tokenward.config.sections import Environment
from tokenward.config.toml_lines import Each, Parse, Table, nearest
from tokenward.core.identity import Selector, SpiffeId
from tokenward.core.model import (
    AnyExchange,
    AnyGrant,
    AnyValidation,
    HttpValidation,
    JwtGrant,
    KvGrant,
    LeasedGrant,
    PlatformJwt,
    Policy,
    PostgresqlValidation,
    SignedJwt,
    Template,
    TokenRole,
    VaultTokenGrant,
    Workload,
    X509Grant,
)
from tokenward.errors import Problem

DEFAULT_POLICY = "default"

EXCHANGES: tuple[type[AnyExchange], ...] = (SignedJwt, PlatformJwt, TokenRole)
GRANTS: tuple[type[AnyGrant], ...] = (KvGrant, LeasedGrant, VaultTokenGrant, JwtGrant, X509Grant)

EXCHANGE_KEYS: Mapping[type[AnyExchange], frozenset[str]] = {cls: keys_of(cls) | {"method"} for cls in EXCHANGES}
_NOT_KEYS: Mapping[type[AnyGrant], frozenset[str]] = {
    VaultTokenGrant: frozenset({"name", "path"}),
    X509Grant: frozenset({"name", "validate"}),
}
GRANT_KEYS: Mapping[type[AnyGrant], frozenset[str]] = {
    cls: (keys_of(cls) | {"kind"}) - _NOT_KEYS.get(cls, frozenset({"name"})) for cls in GRANTS
}
VALIDATION_KEYS: Mapping[str, frozenset[str]] = {
    "http": frozenset({"http", "header", "value", "method", "expect", "timeout", "ca_file"}),
    "postgresql": frozenset({"postgresql", "sslmode", "timeout", "ca_file"}),
}

_PATHS: Mapping[type[AnyGrant], Parse[str]] = {
    KvGrant: values.path_in_mount,
    LeasedGrant: values.path_in_mount,
    JwtGrant: values.vault_path_under("keys", "transit/keys/NAME"),
    X509Grant: values.vault_path_under("sign", "pki/sign/ROLE"),
}
_FIELDS: Mapping[type[AnyGrant], tuple[str, ...]] = {VaultTokenGrant: ("token", "accessor"), JwtGrant: ("token",)}
"""The fields of a value, for kinds whose fields are always the same."""
_BEARER = Template(("Bearer ", ""), ("token",))
_VALIDATION_TIMEOUT_S = 5.0
_MAX_VALIDATION_TIMEOUT_S = 30.0
_MANY_VALUED = frozenset({"unix:supplementary_gid"})
"""Selector types of which one process can have several values."""
_ROOT = frozenset(map(Selector.parse, ("unix:uid:0", "unix:user:root", "unix:gid:0", "unix:group:root")))
_INTERPRETER = re.compile(
    r"(python|pypy|perl|ruby|php|lua|node|nodejs|java|dotnet|beam\.smp|deno|bun|(ba|da|z|k|fi|a)?sh|busybox|env)[0-9.]*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _NamedPolicy:
    policy: Policy
    require: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Identity:
    """What decides which process a workload is, kept for the comparison between workloads."""

    name: str
    table: Table
    selectors: frozenset[Selector]
    single_valued: Mapping[str, str]
    """Those of the selectors of whose type a process has one value."""
    spiffe_id: SpiffeId | None


@dataclass(slots=True, kw_only=True)
class WorkloadReader:
    """Reads the two tables against what the rest of the configuration says; `warnings` gathers on the way."""

    trust_domain: str
    environment: Environment | None
    margin_s: float
    """The shortest life that leaves room to refresh."""
    has_login: bool
    has_signing: bool
    warnings: list[Problem] = field(default_factory=list)
    _policies: dict[str, _NamedPolicy] = field(default_factory=dict)
    _identities: list[_Identity] = field(default_factory=list)

    def read(self, root: Table) -> tuple[Mapping[str, Policy], Mapping[str, Workload]]:
        """Policies and workloads by name: all of them, if nothing was reported."""
        table = root.child("policies")
        self._policies = {name: self._policy(one) for name, one in _named(table)}
        if DEFAULT_POLICY not in self._policies:
            self._policies[DEFAULT_POLICY] = self._policy(table.child(DEFAULT_POLICY))
        read = {name: self._workload(name, one) for name, one in _named(root.child("workloads"))}
        self._compare()
        return (
            MappingProxyType({name: one.policy for name, one in self._policies.items()}),
            MappingProxyType({name: one for name, one in read.items() if one is not None}),
        )

    def _policy(self, table: Table) -> _NamedPolicy:
        policy = fill(table, Policy) or Policy()
        if policy.max_ttl_s <= self.margin_s:
            table.report("max_ttl", self._too_short())
        elif policy.overlap_s >= policy.max_ttl_s:
            table.report("overlap", f"is {policy.overlap_s:g}s, expected less than max_ttl ({policy.max_ttl_s:g}s)")
        return _NamedPolicy(
            policy=policy, require=table.take_each("require", Each(values.one_of(("owner", "purpose"))), ())
        )

    def _workload(self, name: str, table: Table) -> Workload | None:
        table.require("selectors")
        selectors = frozenset(table.take_each("selectors", Each(values.selector, least=1), ()))
        self._check_selectors(table, selectors)
        spiffe_id = table.take("spiffe_path", self._spiffe_id, None)
        if "spiffe_path" not in table:
            spiffe_id = SpiffeId(self.trust_domain, f"/{name}")
        single_valued = {one.kind: one.value for one in selectors if one.kind not in _MANY_VALUED}
        self._identities.append(
            _Identity(name=name, table=table, selectors=selectors, single_valued=single_valued, spiffe_id=spiffe_id)
        )
        exchange = self._exchange(table, name)
        used = set[str]()
        read = {key: self._grant(key, one, used) for key, one in _named(table.child("credentials"))}
        owner, purpose = table.take("owner", values.text, ""), table.take("purpose", values.text, "")
        for policy in sorted(used or {DEFAULT_POLICY}):
            for key in self._policies[policy].require:
                if key not in table:
                    table.report(key, f"is required by policy {policy!r}")
        if exchange is None or spiffe_id is None:
            return None
        return Workload(
            name=name,
            spiffe_id=spiffe_id,
            selectors=selectors,
            exchange=exchange,
            grants=MappingProxyType({key: grant for key, grant in read.items() if grant is not None}),
            owner=owner,
            purpose=purpose,
        )

    def _spiffe_id(self, value: object) -> SpiffeId:
        return SpiffeId.of(self.trust_domain, values.text(value))

    def _exchange(self, workload: Table, name: str) -> AnyExchange | None:
        table = workload.child("exchange")
        if "exchange" not in workload:
            workload.report("exchange", 'is required, such as { method = "signed_jwt" }')
            return None
        chosen = choose(table, "method", EXCHANGES, keys=EXCHANGE_KEYS)
        if chosen is SignedJwt and not self.has_signing:
            table.report("method", "'signed_jwt' needs a table [vault.signing]")
        if chosen is TokenRole and not self.has_login:
            table.report("method", "'token_role' needs a table [vault.login]: the agent's own token makes the child")
        return None if chosen is None else fill(table, chosen, role=table.take("role", values.segment, name))

    def _grant(self, name: str, table: Table, used: set[str]) -> AnyGrant | None:
        policy = table.take("policy", values.text, DEFAULT_POLICY)
        if policy in self._policies:
            used.add(policy)
        else:
            table.report("policy", f"there is no such policy; {nearest(policy, self._policies)}")
        chosen = choose(table, "kind", GRANTS, keys=GRANT_KEYS)
        if chosen is None:
            return None
        given: dict[str, Any] = {"name": name, "path": self._path(table, chosen)}
        given["policy"] = self._policies.get(policy, self._policies[DEFAULT_POLICY]).policy
        given["validate"] = _validation(table, chosen)
        if chosen is KvGrant:
            given["mount"] = _mount(table, given["path"] or "")
        grant = fill(table, chosen, **given)
        if isinstance(grant, JwtGrant | X509Grant) and grant.ttl_s <= self.margin_s:
            table.report("ttl", self._too_short())
        return grant

    def _path(self, table: Table, kind: type[AnyGrant]) -> str | None:
        """What is asked of the vault; empty for the kind that asks for nothing."""
        if kind not in _PATHS:
            return ""
        table.require("path")
        path = table.take("path", _PATHS[kind], None)
        if path is not None and self.environment is not None and not self.environment.covers(path):
            allowed = ", ".join(self.environment.vault_paths)
            table.report("path", f"is outside of environment.vault_paths ({allowed})")
        return path

    def _too_short(self) -> str:
        return (
            f"expected more than {self.margin_s:g}s, the refresh margin: three attempts of vault.timeout each"
            " must fit in before expiry"
        )

    def _check_selectors(self, table: Table, selectors: frozenset[Selector]) -> None:
        kinds = [selector.kind for selector in selectors]
        for kind in sorted(set(kinds) - _MANY_VALUED):
            if kinds.count(kind) > 1:
                table.report("selectors", f"no process can have two of {kind}")
        if selectors and selectors <= _ROOT:
            self._warn(table, "selectors", "every process of root is this workload; add what tells it from the others")
        if kinds == ["unix:path"]:
            program = next(iter(selectors)).value.rpartition("/")[2]
            if _INTERPRETER.fullmatch(program):
                self._warn(
                    table, "selectors", f"whatever {program} runs is this workload; add its user, unit or container"
                )

    def _compare(self) -> None:
        """Reports each workload that some process would be together with an earlier one, warns where one could be."""
        for index, later in enumerate(self._identities):
            warned = False
            for earlier in self._identities[:index]:
                if later.spiffe_id is not None and later.spiffe_id == earlier.spiffe_id:
                    later.table.report("spiffe_path", f"workload {earlier.name!r} has the same SPIFFE ID")
                if not later.selectors or not earlier.selectors or _exclude(earlier, later):
                    continue
                if later.selectors <= earlier.selectors or earlier.selectors <= later.selectors:
                    where = earlier.table.problem("selectors", "")
                    why = f"a process can match both this and workload {earlier.name!r} ({where.file}:{where.line})"
                    later.table.report("selectors", f"{why}: one's selectors are among the other's")
                elif not warned:
                    warned = True
                    why = f"a process that has these and those of workload {earlier.name!r} would match both"
                    self._warn(
                        later.table, "selectors", f"{why} and get nothing; give them different values of one type"
                    )

    def _warn(self, table: Table, key: str, text: str) -> None:
        self.warnings.append(table.problem(key, text))


def _named(table: Table) -> Iterable[tuple[str, Table]]:
    """The tables of `table` whose names can be used; the others are reported."""
    for name, one in table.children():
        try:
            yield values.name(name), one
        except ValueError as error:
            table.report(name, str(error))
            one.ignore_rest()


def _mount(table: Table, path: str) -> str:
    """Where the KV engine is mounted: the first part of the path, if nothing else is said."""
    mount = table.take("mount", values.vault_path, path.partition("/")[0])
    if path and not path.startswith(mount + "/"):
        table.report("mount", "expected the beginning of path, up to a slash")
    return mount


# -- how a new value is tried -----------------------------------------------------------------------------------------


def _validation(grant: Table, kind: type[AnyGrant]) -> AnyValidation | None:
    """What `validate` of a grant asks for; None where it is not set, or reported as wrong."""
    if "validate" not in GRANT_KEYS[kind] or "validate" not in grant:
        return None
    table = grant.child("validate")
    named = [one for one in VALIDATION_KEYS if one in table]
    if len(named) != 1:
        what = "one of them, not both" if named else 'such as { http = "https://..." }'
        table.report("", f"expected the key {' or '.join(map(repr, VALIDATION_KEYS))}, {what}")
        table.ignore_rest()
        return None
    for other in VALIDATION_KEYS.keys() - set(named):
        table.elsewhere = dict.fromkeys(
            VALIDATION_KEYS[other], f"is a key of a check by {other!r}, not by {named[0]!r}"
        )
    timeout_s = table.take("timeout", _validation_timeout, _VALIDATION_TIMEOUT_S)
    ca_file = table.take("ca_file", values.absolute_path, "")
    if named == ["http"]:
        return _http_validation(table, kind, timeout_s=timeout_s, ca_file=ca_file)
    return _postgresql_validation(table, kind, timeout_s=timeout_s, ca_file=ca_file)


def _http_validation(table: Table, kind: type[AnyGrant], *, timeout_s: float, ca_file: str) -> HttpValidation | None:
    fields = _FIELDS.get(kind)
    if fields is None:
        table.require("value")
    url = table.take("http", values.url, None)
    value = table.take("value", values.header_template, _BEARER if fields else None)
    header = table.take("header", values.header_name, "Authorization")
    method = table.take("method", values.one_of(("GET", "HEAD")), "GET")
    expect = table.take("expect", values.status_code, 200)
    if url is None or value is None:
        return None
    if fields and not set(value.fields) <= set(fields):
        table.report("value", f"expected the fields of kind {kind.kind!r} only: {', '.join(fields)}")
    return HttpValidation(
        url=url, value=value, header=header, method=method, expect=expect, timeout_s=timeout_s, ca_file=ca_file
    )


def _postgresql_validation(
    table: Table, kind: type[AnyGrant], *, timeout_s: float, ca_file: str
) -> PostgresqlValidation | None:
    if kind in _FIELDS:
        table.report("postgresql", f"needs the fields username and password, which kind {kind.kind!r} has not")
    address = table.take("postgresql", values.database_address, None)
    on_socket = address is not None and address[0].startswith("/")
    modes = ("disable",) if on_socket else ("verify-full", "verify-ca", "disable")
    sslmode = table.take("sslmode", values.one_of(modes), modes[0])
    if address is None:
        return None
    host, port, database = address
    if sslmode == "disable" and not on_socket and not values.is_loopback(host):
        table.report("sslmode", "expected 'verify-full' or 'verify-ca': only a loopback address can do without TLS")
    elif sslmode != "disable" and not ca_file:
        table.report("ca_file", "is required: the CAs that may have signed the database's certificate")
    return PostgresqlValidation(
        host=host, port=port, database=database, sslmode=sslmode, ca_file=ca_file, timeout_s=timeout_s
    )


def _validation_timeout(value: object) -> float:
    seconds = values.duration()(value)
    if seconds > _MAX_VALIDATION_TIMEOUT_S:
        raise ValueError(f"expected a duration of at most {_MAX_VALIDATION_TIMEOUT_S:g}s")
    return seconds


def _exclude(this: _Identity, that: _Identity) -> bool:
    """Whether no process can have both: they name different values of one single-valued type."""
    return any(this.single_valued.get(kind, value) != value for kind, value in that.single_valued.items())
