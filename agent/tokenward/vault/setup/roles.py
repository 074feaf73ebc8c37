"""The roles: who may log in as which workload, and as the agent. Pure.

Invariants: a role lets in one workload, and what cannot be bound that tightly is left to a human; a role is written
whole, with every field that could widen it, because the vault merges what it is given into what it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, assert_never

from tokenward.config import AppRoleLogin, CertLogin, Config, JwtLogin, KubernetesLogin, TokenLogin
from tokenward.core.model import PlatformJwt, SignedJwt, TokenRole, Workload
from tokenward.vault.exchange import claims_of
from tokenward.vault.setup.steps import ByHand, Step, agent_spiffe_id, policy_name, written

_TOKEN_TTL_S: Final = 900
"""How long a token outlives an agent that was killed; a live agent renews it."""
_DEFAULT_AUDIENCE: Final = "openbao"


def workload_login(config: Config, workload: Workload) -> Iterator[Step | ByHand]:
    """How `workload` is proved to the vault."""
    proof, policy = workload.exchange, policy_name(config, workload.name)
    match proof:
        case SignedJwt():
            bound: dict[str, object] = {
                "bound_subject": str(workload.spiffe_id),
                "bound_claims": claims_of(workload.selectors),
            }
            yield _jwt_role(config, workload.name, proof.mount, proof.role, bound | _life(workload, policy))
        case PlatformJwt():
            bound = _service_account(workload)
            if bound:
                yield _jwt_role(config, workload.name, proof.mount, proof.role, bound | _life(workload, policy))
            else:
                yield ByHand(
                    f"the role {proof.role} at auth/{proof.mount} for {workload.name}, with token_policies={policy}:"
                    " bind it to this workload's pods alone. With the selectors k8s:ns and k8s:sa it would be made here"
                )
            yield ByHand(
                f"a token for {workload.name} in {proof.token_file}, projected for audience {_audience(config)}"
            )
        case TokenRole():
            yield written(
                f"the children of the agent's token for {workload.name}",
                f"auth/token/roles/{proof.role}",
                {
                    "allowed_policies": [policy],
                    "allowed_policies_glob": [],
                    "disallowed_policies": [],
                    "disallowed_policies_glob": [],
                    "allowed_entity_aliases": [str(workload.spiffe_id).lower()],  # as the vault keeps it
                    "orphan": False,
                    "renewable": True,
                    "path_suffix": "",
                    "token_bound_cidrs": [],
                    "token_explicit_max_ttl": _max_ttl_s(workload),
                    "token_no_default_policy": True,
                    "token_num_uses": 0,
                    "token_period": 0,
                    "token_type": "service",
                },
            )
        case _:
            assert_never(proof)


def agent_login(config: Config) -> Iterator[Step | ByHand]:
    """How the agent itself logs in, where it does."""
    login, policy = config.vault.login, policy_name(config)
    match login:
        case None:
            return
        case JwtLogin(token_file=""):
            # Periodic: the tokens of `token_role` are children of the agent's, and end when it does.
            bound: dict[str, object] = {
                "bound_subject": agent_spiffe_id(config),
                "bound_claims": {},
                "token_policies": [policy],
            }
            life: dict[str, object] = {"token_period": _TOKEN_TTL_S, "token_ttl": 0, "token_max_ttl": 0}
            yield _jwt_role(config, "the agent", login.mount, login.role, bound | life)
        case JwtLogin() | KubernetesLogin() | CertLogin():
            yield ByHand(
                f"the role {login.role} at auth/{login.mount} for the agent, bound to it alone, with"
                f" token_policies={policy}, token_no_default_policy=true and token_period={_TOKEN_TTL_S}"
            )
        case AppRoleLogin():
            yield ByHand(
                f"an AppRole at auth/{login.mount} for the agent, with token_policies={policy},"
                f" token_no_default_policy=true, token_period={_TOKEN_TTL_S} and secret_id_num_uses=1"
            )
        case TokenLogin():
            yield ByHand(f"a token with the policy {policy} in {login.token_file}")
        case _:
            assert_never(login)


def _jwt_role(config: Config, who: str, mount: str, role: str, bound: dict[str, object]) -> Step:
    """A role with every field that widens it, so that none is left from before."""
    body: dict[str, object] = {
        "role_type": "jwt",
        "user_claim": "sub",
        "user_claim_json_pointer": False,
        "bound_audiences": [_audience(config)],
        "bound_claims_type": "string",
        "claim_mappings": {},
        "groups_claim": "",
        "expiration_leeway": -1,
        "not_before_leeway": -1,
        "clock_skew_leeway": -1,
        "max_age": 0,
        "verbose_oidc_logging": False,
        "token_policies_template_claims": False,
        "token_bound_cidrs": [],
        "token_strictly_bind_ip": False,
        "token_explicit_max_ttl": 0,
        "token_no_default_policy": True,
        "token_num_uses": 0,
        "token_period": 0,
        "token_type": "service",
    }
    return written(f"who may log in as {who}", f"auth/{mount}/role/{role}", body | bound)


def _life(workload: Workload, policy: str) -> dict[str, object]:
    longest_s = _max_ttl_s(workload)
    return {"token_policies": [policy], "token_ttl": min(_TOKEN_TTL_S, longest_s), "token_max_ttl": longest_s}


def _max_ttl_s(workload: Workload) -> int:
    """A lease ends with its token, so the token lives as long as the longest grant allows."""
    return math.ceil(max((grant.policy.max_ttl_s for grant in workload.grants.values()), default=_TOKEN_TTL_S))


def _service_account(workload: Workload) -> dict[str, object]:
    """What ties a Kubernetes token to the workload; empty when its selectors do not name a service account."""
    found = {selector.kind: selector.value for selector in workload.selectors}
    namespace, account = found.get("k8s:ns"), found.get("k8s:sa")
    if namespace is None or account is None:
        return {}
    return {
        "bound_subject": f"system:serviceaccount:{namespace}:{account}",
        "bound_claims": {
            "/kubernetes.io/namespace": namespace,
            "/kubernetes.io/serviceaccount/name": account,
        },
    }


def _audience(config: Config) -> str:
    return config.vault.signing.audience if config.vault.signing else _DEFAULT_AUDIENCE
