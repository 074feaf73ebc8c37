"""Domain values for tests, with defaults for what a test does not care about."""

from __future__ import annotations

from collections.abc import Mapping

from tokenward.core.identity import Selector, SpiffeId
from tokenward.core.model import AnyGrant, Instant, Issued, KvGrant, Lease, Policy, SignedJwt, VaultToken, Workload
from tokenward.core.secret import Secret

_EPOCH = 1_800_000_000.0


def instant(mono: float) -> Instant:
    """The instant at which the monotonic clock stands at `mono` and the wall clock agrees with it."""
    return Instant(_EPOCH + mono, mono)


def issued(
    *, lifetime_s: float = 100.0, at: float = 0.0, value: str = "s3cret", wall_bound: bool = False, leased: bool = False
) -> Issued:
    """What an issuer obtained at `at`, valid for `lifetime_s`."""
    return Issued(
        values={"password": Secret(value)},
        issued=instant(at),
        expires=instant(at + lifetime_s),
        wall_bound=wall_bound,
        lease=lease(value) if leased else None,
    )


def lease(name: str = "lease") -> Lease:
    token = VaultToken(token=Secret(f"token-{name}"), accessor=name, expires_mono=None, renewable=True)
    return Lease(token=token, lease_id=f"database/creds/app/{name}")


def kv_grant(name: str = "api", *, policy: Policy | None = None) -> KvGrant:
    return KvGrant(name=name, path=f"secret/{name}", mount="secret", policy=policy or Policy())


def workload(name: str = "app", *selectors: str, grants: Mapping[str, AnyGrant] | None = None) -> Workload:
    if grants is None:
        grants = {"api": kv_grant()}
    return Workload(
        name=name,
        spiffe_id=SpiffeId.of("example.org", f"/{name}"),
        selectors=frozenset(map(Selector.parse, selectors or ("unix:uid:1000",))),
        exchange=SignedJwt(role=name),
        grants=grants,
    )
