"""The domain's values: workloads and their grants, what attestation saw, and the versions of a credential.

Frozen values only. `config` makes workloads and grants, `attest` makes attestations, `issuers` make what was issued,
and `core.store` numbers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from tokenward.core.identity import Selector, SpiffeId
from tokenward.core.secret import Secret


@dataclass(frozen=True, slots=True)
class Instant:
    """One reading of both clocks: `wall` in seconds since the epoch, `mono` on a clock that never steps back."""

    wall: float
    mono: float


# -- who is calling -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What the kernel said of a caller, for the record; `path` and `sha256` are empty when they were not read."""

    pid: int
    uid: int
    gid: int
    path: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """Every selector that holds for a process, and for each selector type that could not be read, why."""

    process: Process
    selectors: frozenset[Selector]
    unreadable: Mapping[str, str] = field(default_factory=dict)


# -- what it may have -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The template that a grant builds on; times in seconds."""

    refresh_at: float = 0.67
    """Share of the lifetime after which a value is replaced, before the +-10 % draw."""
    overlap_s: float = 120.0
    """How long the value before the current one stays valid."""
    max_ttl_s: float = 3600.0
    """The longest that one value is used, whatever its lease says."""
    rate: float | None = field(default=None, compare=False)
    """How often a second one workload may ask, None for as often as its user may; no part of what a value is."""


@dataclass(frozen=True, slots=True)
class Template:
    """A text with fields of a value in it: text, field, text, ..., text. `texts` has one more element than `fields`."""

    texts: tuple[str, ...]
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpValidation:
    """A value is good when a request to `url` that has it in one header is answered with the status `expect`."""

    url: str
    value: Template
    header: str = "Authorization"
    method: str = "GET"
    expect: int = 200
    timeout_s: float = 5.0
    ca_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresqlValidation:
    """A value is good when its fields `username` and `password` log in. `host` is a directory for a Unix socket."""

    host: str
    port: int
    database: str
    sslmode: str = "verify-full"
    ca_file: str = ""
    timeout_s: float = 5.0


AnyValidation = HttpValidation | PostgresqlValidation


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Lets one workload have one credential. `path` is what is asked of the vault, empty where the kind needs none."""

    kind: ClassVar[str]
    name: str
    path: str = ""
    policy: Policy = field(default_factory=Policy)
    scopes: tuple[str, ...] = ()
    validate: AnyValidation | None = None
    """How a new value is tried before it is current; None for not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGrant(Grant):
    """Fields of a KV v2 secret: `path` is `<mount>/<secret>`, looked at again every `poll_s` seconds."""

    kind: ClassVar[str] = "kv"
    mount: str
    poll_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedGrant(Grant):
    """A dynamic secret with a lease: `path` is read to make one, such as `database/creds/ledger-rw`."""

    kind: ClassVar[str] = "leased"


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultTokenGrant(Grant):
    """A vault token with the workload's own policies."""

    kind: ClassVar[str] = "vault_token"


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtGrant(Grant):
    """A JWT for one of `audiences`, signed by the transit key that `path` names: `<mount>/keys/<key>`."""

    kind: ClassVar[str] = "jwt"
    audiences: tuple[str, ...]
    ttl_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class X509Grant(Grant):
    """An X509-SVID: `path` is the PKI role that signs, `<mount>/sign/<role>`."""

    kind: ClassVar[str] = "x509"
    ttl_s: float = 3600.0


AnyGrant = KvGrant | LeasedGrant | VaultTokenGrant | JwtGrant | X509Grant


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedJwt:
    """Exchange by a JWT that the agent signs for the workload, for role `role` of the JWT auth method at `mount`."""

    method: ClassVar[str] = "signed_jwt"
    role: str
    mount: str = "jwt"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformJwt:
    """Exchange by the token that the platform projects into the pod, read from `token_file` at each use."""

    method: ClassVar[str] = "platform_jwt"
    role: str
    token_file: str
    mount: str = "jwt"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRole:
    """Exchange by a child of the agent's own token, made through the token role `role` that fixes its policies."""

    method: ClassVar[str] = "token_role"
    role: str


AnyExchange = SignedJwt | PlatformJwt | TokenRole


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A configured identity that processes can have. All of `selectors` must hold for a process to be it."""

    name: str
    spiffe_id: SpiffeId
    selectors: frozenset[Selector]
    exchange: AnyExchange
    grants: Mapping[str, AnyGrant]
    owner: str = ""
    purpose: str = ""


# -- what it got ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What the store is indexed by: two callers with one key share one value. `audience` is for JWTs, else empty."""

    workload: str
    credential: str
    audience: str = ""

    def __str__(self) -> str:
        return f"{self.workload}/{self.credential}" + (f" for {self.audience}" if self.audience else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultToken:
    """A vault token that we hold. `expires_mono` is on the monotonic clock of `Instant`, None when it never ends."""

    token: Secret
    accessor: str
    expires_mono: float | None
    renewable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to a dynamic secret. Revoking `token` revokes everything made with it; `lease_id` is empty when the
    token itself is the secret."""

    token: VaultToken
    lease_id: str = ""
    renewable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """How the workload was proved to the vault for one call, for the record."""

    method: str
    role: str
    vault_request_id: str
    accessor: str = ""
    """Accessor of the vault token that the exchange made; empty where it made none (inline auth)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """One value as an issuer obtained it, valid until `expires` on the clock that `wall_bound` names."""

    values: Mapping[str, Secret]
    issued: Instant
    expires: Instant
    renewed: Instant | None = None
    """When the lease was last prolonged; None before the first time."""
    new_s: float | None = None
    """How long it lived when it was new, once it was prolonged."""
    wall_bound: bool = False
    """True when the expiry is written into the credential (JWT, certificate): the wall clock then ends it too."""
    refresh_s: float | None = None
    """Seconds after which to look again where that is not a share of the lifetime (KV polling)."""
    kv_version: int = 0
    """The secret's version at the vault, for kind `kv`; not the number of our own version."""
    lease: Lease | None = None
    exchanged: Exchanged | None = None
    vault_request_id: str = ""

    @property
    def full_life_s(self) -> float:
        """How long it lives when it is new."""
        return self.expires.mono - self.issued.mono if self.new_s is None else self.new_s

    def is_live(self, now: Instant) -> bool:
        """Whether the value may be served at `now`."""
        return now.mono < self.expires.mono and not (self.wall_bound and now.wall >= self.expires.wall)


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What was issued, with its number: +1 for each new value of one key."""

    number: int
    issued: Issued
    since: Instant
    """When this value was first there; `issued.issued` moves on when the same value is read again."""
    draw: float
    """The random fraction in [0, 1) that spreads this version's refreshes, drawn once."""
    due: Instant
    """When to replace or renew it."""
    fingerprint: str
    """Keyed hash of the values, for the record; never the values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the store answers: the current version, the one before while it overlaps, and whether we are late."""

    key: Key
    kind: str
    current: Version
    previous: Version | None = None
    retire: Instant | None = None
    """When `previous` ends; None exactly when there is no previous."""
    stale: bool = False
    """True when the planned refresh failed and the value is served from before it."""
