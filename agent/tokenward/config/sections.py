"""The sections of the configuration, as the daemon hands them to the components.

Frozen values only: `load` makes them, and whoever holds one need check nothing again. A key of the file is the field's
name without its unit: `timeout_s` is read from `timeout = "2s"`. Whether the files that are named exist is left to who
opens them. Absent texts are empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from tokenward.core.model import Policy, Workload
from tokenward.errors import Problem

DEFAULT_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What this agent serves. Nothing outside of `vault_paths` is ever asked of the vault."""

    name: str
    vault_paths: tuple[str, ...]

    def covers(self, path: str) -> bool:
        """Whether `path` is one of `vault_paths` or below one."""
        return any(path == allowed or path.startswith(allowed + "/") for allowed in self.vault_paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where callers connect, and the directory, closed to them, of the socket behind the front door."""

    workload_socket: str = "/run/tokenward/workload.sock"
    workload_socket_mode: int = 0o666
    workload_socket_owner: str = ""
    workload_socket_group: str = ""
    runtime_dir: str = "/run/tokenward/inner"
    admin_socket: str = ""
    """Where operators connect; nowhere, if empty. Its directory must be another one, that callers cannot enter."""
    admin_socket_mode: int = 0o660
    admin_socket_group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtLogin:
    """By a JWT: the one in `token_file`, read at each login, or else one that the agent signs ([vault.signing])."""

    method: ClassVar[str] = "jwt"
    role: str
    mount: str = "jwt"
    token_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesLogin:
    """By the pod's service account token, through the vault's kubernetes auth method."""

    method: ClassVar[str] = "kubernetes"
    role: str
    mount: str = "kubernetes"
    token_file: str = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 -- a path, no secret


@dataclass(frozen=True, slots=True, kw_only=True)
class CertLogin:
    """By a TLS client certificate."""

    method: ClassVar[str] = "cert"
    role: str
    cert_file: str
    key_file: str
    mount: str = "cert"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppRoleLogin:
    """By a role id and a secret id that arrives response-wrapped in a file and is unwrapped once."""

    method: ClassVar[str] = "approle"
    role_id: str
    wrapped_secret_id_file: str
    mount: str = "approle"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogin:
    """By a vault token in a file: for development."""

    method: ClassVar[str] = "token"
    token_file: str


Login = JwtLogin | KubernetesLogin | CertLogin | AppRoleLogin | TokenLogin


@dataclass(frozen=True, slots=True, kw_only=True)
class Signing:
    """How the agent signs JWTs for the vault. Without `key_file` the key is made in memory at start."""

    issuer: str
    audience: str = "openbao"
    key_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vault:
    """Where the vault is and how the agent proves itself to it."""

    addresses: tuple[str, ...]
    namespace: str = ""
    ca_file: str = ""
    timeout_s: float = DEFAULT_TIMEOUT_S
    inline_auth: bool = True
    max_reply_bytes: int = 1 << 20
    login: Login | None = None
    signing: Signing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Where the audit records go."""

    file: str = "/var/log/tokenward/audit.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leases:
    """How the agent manages what it holds at the vault."""

    refresh_rate: float = 10.0
    """Budget of vault calls per second that refreshes keep to."""
    linger_s: float = 30.0
    """How long a workload's credentials outlive its last process."""
    on_stop: str = "revoke"
    """`revoke`, or `keep`: then they end by their TTL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile:
    """Where the agent remembers what an operator revoked. It holds no secret."""

    file: str = "/var/lib/tokenward/state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What the agent says on standard error, and how."""

    level: str = "info"
    format: str = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationConfig:
    """How long an attestation holds before the process is looked at again."""

    reattest_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What callers may take of the agent. A number that is None follows from the machine, see `serve.limits`."""

    connections: int | None = None
    connections_per_uid: int | None = None
    streams: int | None = None
    streams_per_uid: int | None = None
    requests: int | None = None
    """In progress at a time, streams not counted."""
    requests_per_uid: int | None = None
    request_rate: float = 500.0
    """Requests per second of one uid; two seconds' worth may come at once."""
    accept_rate: float = 100.0
    """Connections per second of one uid, beyond the first `connections_per_uid`."""
    attestations: int = 4
    """At a time; one uid has at most half of them."""
    preface_s: float = 5.0
    """Time to say what one speaks."""
    idle_s: float = 300.0
    max_head_bytes: int = 8 << 10
    max_message_bytes: int = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole. The daemon hands each component its own section, never this."""

    source: str = ""
    """The file that it was loaded from, to load it again."""
    trust_domain: str
    environment: Environment
    vault: Vault
    policies: Mapping[str, Policy]
    workloads: Mapping[str, Workload]
    listen: Listen = field(default_factory=Listen)
    audit: Audit = field(default_factory=Audit)
    leases: Leases = field(default_factory=Leases)
    state: StateFile = field(default_factory=StateFile)
    log: Log = field(default_factory=Log)
    attestation: AttestationConfig = field(default_factory=AttestationConfig)
    limits: Limits = field(default_factory=Limits)
    warnings: tuple[Problem, ...] = ()
    """What can be used but is probably not meant, for `check`."""
