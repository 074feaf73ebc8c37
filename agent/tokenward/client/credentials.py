"""The values that applications get: credentials and what is around them, frozen, secrets hidden from repr.

Owns their shape and their making from the wire's messages. Leaves the talking to `connection` and the keeping current
to `watcher`. Invariant: no repr, str, format or pickle of anything here shows a secret; a field is a plain `str` once
it is asked for by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn

from google.protobuf.timestamp_pb2 import Timestamp

from tokenward.errors import TokenwardError
from tokenward.v1 import credentials_pb2 as pb


class Values(Mapping[str, str]):
    """The fields of one credential by name: `values["password"]` is the text, `**values` passes them on.

    A read-only mapping whose repr shows the names only. It is not a dict so that no JSON encoder takes it by accident.
    """

    __slots__ = ("__fields",)

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.__fields = dict(fields)

    def __getitem__(self, field: str) -> str:
        try:
            return self.__fields[field]
        except KeyError:
            there = ", ".join(sorted(self.__fields)) or "none"
            raise KeyError(f"the credential has no field {field!r}; it has: {there}") from None

    def __contains__(self, field: object) -> bool:
        return field in self.__fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.__fields)

    def __len__(self) -> int:
        return len(self.__fields)

    def __repr__(self) -> str:
        return f"Values({', '.join(f'{name}=***' for name in self.__fields)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the values of a credential are never pickled; give the other process its own client")

    __getstate__ = __reduce__  # object's own hands out the slots, for whoever copies by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousValues:
    """The value before the current one, while it stays valid."""

    version: int
    values: Values
    retire_at: datetime | None
    """When it ends, in UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """One version of one credential. Times are in UTC, None where there is none."""

    name: str
    kind: str
    """`kv`, `leased`, `vault_token`, `jwt` or `x509`; a newer agent may have more."""
    version: int
    """+1 for each new value."""
    values: Values
    issued_at: datetime | None = None
    expires_at: datetime | None = None
    """From here on the values are worth nothing; None for what never expires."""
    refresh_at: datetime | None = None
    """When the agent plans to replace the values."""
    stale: bool = False
    """True when the planned refresh failed; the values stay good until `expires_at`."""
    previous: PreviousValues | None = None
    audience: str = ""
    """For kind `jwt`: whom it is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one credential: its new state, or the reason why there is none now. One of the two is None."""

    name: str
    credential: Credential | None = None
    error: TokenwardError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantInfo:
    """A credential that the caller may ask for."""

    name: str
    kind: str
    scopes: tuple[str, ...] = ()
    audiences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who the agent says the caller is."""

    spiffe_id: str
    workload: str
    selectors: tuple[str, ...]
    """What attestation saw of the caller, each as `type:key:value`."""


def credential_from(message: pb.Credential) -> Credential:
    """The credential in `message`."""
    previous = None
    if message.HasField("previous"):
        old = message.previous
        previous = PreviousValues(
            version=old.version,
            values=Values(old.values),
            retire_at=_instant(old.retire_at) if old.HasField("retire_at") else None,
        )
    return Credential(
        name=message.name,
        kind=message.kind,
        version=message.version,
        values=Values(message.values),
        issued_at=_instant(message.issued_at) if message.HasField("issued_at") else None,
        expires_at=_instant(message.expires_at) if message.HasField("expires_at") else None,
        refresh_at=_instant(message.refresh_at) if message.HasField("refresh_at") else None,
        stale=message.stale,
        previous=previous,
        audience=message.audience,
    )


def grant_from(message: pb.GrantInfo) -> GrantInfo:
    """The grant in `message`."""
    return GrantInfo(
        name=message.name, kind=message.kind, scopes=tuple(message.scopes), audiences=tuple(message.audiences)
    )


def identity_from(message: pb.GetIdentityResponse) -> Identity:
    """The identity in `message`."""
    return Identity(spiffe_id=message.spiffe_id, workload=message.workload, selectors=tuple(message.selectors))


def _instant(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
