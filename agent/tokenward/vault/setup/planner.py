"""`plan`: all that the vault must hold for a configuration. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tokenward.config import Config, JwtLogin
from tokenward.core.model import KvGrant, TokenRole, Workload
from tokenward.vault.setup.mounts import auth_mounts, certificates, jwt_mounts, secret_mounts
from tokenward.vault.setup.rights import policies
from tokenward.vault.setup.roles import agent_login, workload_login
from tokenward.vault.setup.steps import ByHand, Plan, agent_spiffe_id, each, of, unusable


def plan(config: Config, *, public_key_pem: str) -> Plan:
    """All that `config` needs, in the order in which it can be made.

    `public_key_pem` is the public half of the key with which the agent signs; several of them, one after the other,
    during its rotation. Raises TokenwardError when two workloads cannot be told apart at the vault.
    """
    _verify_apart(config)
    workloads = list(config.workloads.values())
    return (
        *secret_mounts(workloads),
        *policies(config),
        *auth_mounts(config, public_key_pem),
        *agent_login(config),
        *(step for workload in workloads for step in workload_login(config, workload)),
        *certificates(config),
        *_values(workloads),
    )


def _values(workloads: Iterable[Workload]) -> Iterator[ByHand]:
    for path in each(g.path for one in workloads for g in of(KvGrant, one.grants.values())):
        yield ByHand(f"the fields of the secret {path}, unless they are there")


def _verify_apart(config: Config) -> None:
    """Raises TokenwardError when a role would have to let in two, or a mount to believe two."""
    signed, platform = jwt_mounts(config)
    if both := sorted(set(signed) & set(platform)):
        raise unusable(f"auth/{both[0]} cannot believe both the agent's key and the platform: use two mounts")
    names = [agent_spiffe_id(config), *(str(workload.spiffe_id) for workload in config.workloads.values())]
    if twice := _twice(name.lower() for name in names):  # the vault's identities do not know upper case
        raise unusable(f"{twice} is the SPIFFE ID of two workloads, or of the agent, if case is not looked at")
    roles: list[str] = []
    for workload in config.workloads.values():
        proof = workload.exchange
        roles.append(
            f"auth/token/roles/{proof.role}"
            if isinstance(proof, TokenRole)
            else f"auth/{proof.mount}/role/{proof.role}"
        )
    if isinstance(config.vault.login, JwtLogin):
        roles.append(f"auth/{config.vault.login.mount}/role/{config.vault.login.role}")
    if twice := _twice(roles):
        raise unusable(f"{twice} is used twice: give each workload, and the agent, a role of its own")


def _twice(texts: Iterable[str]) -> str:
    """The first text that is there more than once, or nothing."""
    return next((text for text, count in Counter(texts).items() if count > 1), "")
