"""The mounts: where secrets, keys and certificates are, where logins arrive, and what those are believed for. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Final

from tokenward.config import Config, JwtLogin
from tokenward.core.model import JwtGrant, KvGrant, LeasedGrant, PlatformJwt, SignedJwt, TokenRole, Workload, X509Grant
from tokenward.vault.setup.steps import Body, ByHand, Step, accessor_of, each, of, split, unusable, written

_ROOT_TTL_S: Final = 10 * 365 * 24 * 3600
_PEM: Final = re.compile(r"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


def secret_mounts(workloads: Iterable[Workload]) -> Iterator[Step | ByHand]:
    """The engines behind all grants, and the keys that sign JWTs."""
    grants = [grant for workload in workloads for grant in workload.grants.values()]
    for mount in each(grant.mount for grant in of(KvGrant, grants)):
        yield _mount("secrets", mount, {"type": "kv", "options": {"version": "2"}})
    keys = each(grant.path for grant in of(JwtGrant, grants))
    for mount in each(split(path, "/keys/")[0] for path in keys):
        yield _mount("signing keys", mount, {"type": "transit"})
    for path in keys:
        yield Step(
            what=f"the key {path} that signs JWTs",
            path=path,
            body={"type": "ecdsa-p256"},
            read=path,
            fields={"supports_signing": True},
            is_fixed=True,
        )
    for mount in each(split(grant.path, "/sign/")[0] for grant in of(X509Grant, grants)):
        yield _mount("certificates", mount, {"type": "pki"}, {"max_lease_ttl": f"{_ROOT_TTL_S}s"})
    for path in each(grant.path for grant in of(LeasedGrant, grants)):
        yield ByHand(
            f"the engine and the role behind {path}: its connection, its creation statements and its own"
            " revocation_statements (the default ones fail for an administrator who is no superuser)"
        )


def _mount(what: str, mount: str, kind: Body, config: Body | None = None) -> Step:
    return Step(
        what=f"{what} at {mount}/",
        path=f"sys/mounts/{mount}",
        body={**kind, **({"config": config} if config else {})},
        read="sys/mounts",
        at=f"{mount}/",
        fields=kind,
        is_fixed=True,
    )


def auth_mounts(config: Config, public_key_pem: str) -> Iterator[Step | ByHand]:
    """Where JWTs log in, and whose are believed."""
    signed, platform = jwt_mounts(config)
    for mount in each((*signed, *platform)):
        yield Step(
            what=f"logins by JWT at auth/{mount}/",
            path=f"sys/auth/{mount}",
            body={"type": "jwt", "config": {"audit_non_hmac_request_keys": ["role"]}},
            read="sys/auth",
            at=f"{mount}/",
            fields={"type": "jwt"},
            is_fixed=True,
        )
    for mount in each(signed):
        yield written(
            f"whom auth/{mount} believes: the agents that hold the private key",
            f"auth/{mount}/config",
            {
                "jwt_validation_pubkeys": _public_keys(public_key_pem),
                "jwt_supported_algs": ["ES256"],
                "bound_issuer": config.vault.signing.issuer if config.vault.signing else "",
                "default_role": "",
            },
        )
    for mount in each(platform):
        yield ByHand(
            f"whom auth/{mount} believes: write auth/{mount}/config with the platform's jwks_url (or"
            " jwt_validation_pubkeys) and bound_issuer"
        )


def jwt_mounts(config: Config) -> tuple[list[str], list[str]]:
    """The JWT auth mounts that believe the agent's key, and those that believe the platform."""
    proofs = [workload.exchange for workload in config.workloads.values()]
    signed = [proof.mount for proof in proofs if isinstance(proof, SignedJwt)]
    platform = [proof.mount for proof in proofs if isinstance(proof, PlatformJwt)]
    if isinstance(config.vault.login, JwtLogin):
        (platform if config.vault.login.token_file else signed).append(config.vault.login.mount)
    return signed, platform


def _public_keys(text: str) -> list[str]:
    found = _PEM.findall(text)
    if not found:
        raise unusable("the agent's public key is not in PEM: it begins with -----BEGIN PUBLIC KEY-----")
    return found


def certificates(config: Config) -> Iterator[Step]:
    """The root of each PKI mount, and the role of each path that signs."""
    users: dict[str, list[tuple[Workload, X509Grant]]] = {}
    for workload in config.workloads.values():
        for grant in of(X509Grant, workload.grants.values()):
            users.setdefault(grant.path, []).append((workload, grant))
    for mount in each(split(path, "/sign/")[0] for path in users):
        yield Step(
            what=f"a root certificate at {mount}/, if it has no issuer yet; its key never leaves the vault",
            path=f"{mount}/root/generate/internal",
            body={
                "common_name": f"{config.trust_domain} root",
                "key_type": "ec",
                "key_bits": 256,
                "ttl": f"{_ROOT_TTL_S}s",
                "uri_sans": f"spiffe://{config.trust_domain}",
            },
            read=f"{mount}/issuers",
            read_method="LIST",
        )
    for path, used_by in users.items():
        mount, role = split(path, "/sign/")
        ttl_s = math.ceil(max(grant.ttl_s for _, grant in used_by))
        is_shared = len({workload.name for workload, _ in used_by}) > 1
        names = sorted({_allowed_name(path, workload, is_shared=is_shared) for workload, _ in used_by})
        yield written(f"whose certificates {path} signs", f"{mount}/roles/{role}", _svid_role(names, ttl_s))


def _allowed_name(path: str, workload: Workload, *, is_shared: bool) -> str:
    """The URI that the role signs for a workload: the name under which the caller itself logged in."""
    match workload.exchange:
        case SignedJwt(mount=mount):
            return f"{{{{identity.entity.aliases.{accessor_of(mount)}.name}}}}"
        case TokenRole():
            return f"{{{{identity.entity.aliases.{accessor_of('token')}.name}}}}"
        case PlatformJwt():
            if is_shared:  # it logs in under the platform's name for it, so only a role of its own can tell
                raise unusable(f"{workload.name} needs a PKI role of its own: {path} is used by other workloads too")
            return str(workload.spiffe_id)


def _svid_role(names: list[str], ttl_s: int) -> Body:
    off = (
        "allow_any_name allow_bare_domains allow_glob_domains allow_globs_in_identity_templates allow_ip_sans"
        " allow_localhost allow_subdomains allow_token_displayname allowed_domains_template code_signing_flag"
        " email_protection_flag generate_lease require_cn use_csr_common_name"
    )
    none = "allowed_domains allowed_ip_sans_cidr allowed_other_sans allowed_serial_numbers allowed_user_ids"
    return {
        **dict.fromkeys(off.split(), False),
        **{name: list[str]() for name in none.split()},
        "allowed_uri_sans": names,
        "allowed_uri_sans_template": True,
        "basic_constraints_valid_for_non_ca": True,
        "client_flag": True,
        "cn_validations": ["disabled"],
        "ext_key_usage": [],
        "ext_key_usage_oids": [],
        "key_bits": 256,
        "key_type": "ec",
        "key_usage": ["DigitalSignature"],
        "max_ttl": ttl_s,
        "no_store": True,
        "not_after": "",
        "not_after_bound": "ttl-limited",
        "not_before_bound": "duration",
        "not_before_duration": 30,
        "server_flag": True,
        "ttl": ttl_s,
        "use_csr_sans": True,
    }
