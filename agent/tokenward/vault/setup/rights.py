"""The policies: what each workload, and the agent itself, may do at the vault. Pure.

Invariants: a policy names only what the grants name, with no wildcard and no template; what only the agent may do (sign
with transit, make child tokens) is in no workload's policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import assert_never

from tokenward.config import Config
from tokenward.core.model import JwtGrant, KvGrant, LeasedGrant, TokenRole, VaultTokenGrant, Workload, X509Grant
from tokenward.vault.setup.steps import Step, each, of, policy_name, split, written


def policies(config: Config) -> Iterator[Step]:
    """One per workload, and the agent's own where it logs in itself."""
    for workload in config.workloads.values():
        yield _policy(f"what {workload.name} may do", policy_name(config, workload.name), _workload_rules(workload))
    if config.vault.login is not None:
        yield _policy("what the agent may do itself", policy_name(config), _agent_rules(config))


def _policy(what: str, name: str, rules: Iterable[str]) -> Step:
    body = {"policy": "".join(rules), "allow_slashes_in_identity_templates": False}
    return written(what, f"sys/policies/acl/{name}", body)


def _workload_rules(workload: Workload) -> Iterator[str]:
    """Nothing for `jwt` and `vault_token`: the agent signs the one, the other is the token with these rules."""
    paths: dict[str, str] = {}
    for grant in workload.grants.values():
        match grant:
            case KvGrant():
                secret = grant.path.removeprefix(grant.mount).strip("/")
                paths[f"{grant.mount}/data/{secret}"] = _rule(f"{grant.mount}/data/{secret}", "read")
                paths[f"{grant.mount}/metadata/{secret}"] = _rule(f"{grant.mount}/metadata/{secret}", "read")
            case LeasedGrant():
                paths[grant.path] = _rule(grant.path, "read")
                paths["sys/leases/renew"] = _rule("sys/leases/renew", "update")
            case X509Grant():
                only = {"csr": (), "ttl": ()}  # above all no not_after, which goes beyond max_ttl
                paths[grant.path] = _rule(grant.path, "update", only, required=("csr",))
            case JwtGrant() | VaultTokenGrant():
                pass
            case _:
                assert_never(grant)
    yield from paths.values()
    yield from _own_token_rules()


def _agent_rules(config: Config) -> Iterator[str]:
    workloads = config.workloads.values()
    for path in each(grant.path for one in workloads for grant in of(JwtGrant, one.grants.values())):
        mount, key = split(path, "/keys/")
        only = {"input": (), "key_version": (), "marshaling_algorithm": ("jws",), "signature_algorithm": ("pkcs1v15",)}
        yield _rule(f"{mount}/sign/{key}/sha2-256", "update", only, required=("input", "marshaling_algorithm"))
        yield _rule(path, "read")
    for one in workloads:
        if isinstance(one.exchange, TokenRole):
            only = {"entity_alias": (str(one.spiffe_id),), "display_name": (), "meta": ()}
            yield _rule(f"auth/token/create/{one.exchange.role}", "update", only, required=("entity_alias",))
    # What an agent before this one could not revoke any more: it left the accessors, which nobody can list.
    yield _rule("auth/token/revoke-accessor", "update", {"accessor": ()}, required=("accessor",))
    yield from _own_token_rules()


def _own_token_rules() -> Iterator[str]:
    """Leases end with the token that made them. There is no right to revoke by lease id: it would do for any lease."""
    yield _rule("auth/token/lookup-self", "read")
    yield _rule("auth/token/renew-self", "update")
    yield _rule("auth/token/revoke-self", "update")


def _rule(
    path: str, capability: str, only: Mapping[str, Iterable[str]] | None = None, required: Iterable[str] = ()
) -> str:
    lines = [f'path "{path}" {{', f'  capabilities = ["{capability}"]']
    if required:
        lines.append(f"  required_parameters = [{_quoted(required)}]")
    if only:
        lines += ["  allowed_parameters = {", *(f'    "{name}" = [{_quoted(v)}]' for name, v in only.items()), "  }"]
    return "\n".join([*lines, "}", ""])


def _quoted(texts: Iterable[str]) -> str:
    return ", ".join(f'"{text}"' for text in texts)
