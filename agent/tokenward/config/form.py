"""Reads a table into a dataclass: which keys a section has, and how each is written.

A key is its field's name without the unit (`timeout_s` is `timeout = "2s"`), and the field's name decides how it is
read, here and in the domain's own grants and exchanges. A walk over the dataclass is all that this takes: cattrs and
pydantic add 6 to 9 MiB of memory, take `true` for a number and know no lines; msgspec stops at the first mistake.

Invariant: a section comes out whole and valid, or not at all; whatever is wrong with it has been reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from types import MappingProxyType
from typing import Any, TypeVar

from tokenward.config import values
from tokenward.config.toml_lines import Each, Parse, Table

S = TypeVar("S")

_SECONDS = values.duration()
_RULES: Mapping[str, Parse[Any] | Each[Any]] = MappingProxyType(
    {
        "accept_rate": values.rate,
        "addresses": Each(values.vault_address, least=1),
        "attestations": values.count,
        "audiences": Each(values.text, least=1),
        "connections": values.count,
        "connections_per_uid": values.count,
        "file": values.absolute_path,
        "format": values.one_of(("text", "json")),
        "linger_s": values.duration(least_s=0),
        "level": values.one_of(("debug", "info", "warning", "error")),
        "max_head_bytes": values.head_size,
        "mount": values.vault_path,
        "namespace": values.vault_path,
        "on_stop": values.one_of(("revoke", "keep")),
        "overlap_s": values.duration(least_s=0),
        "idle_s": values.duration(least_s=1),
        "poll_s": values.duration(least_s=1),
        "reattest_s": values.duration(least_s=1),
        "refresh_at": values.refresh_share,
        "rate": values.rate,
        "refresh_rate": values.rate,
        "request_rate": values.rate,
        "requests": values.count,
        "requests_per_uid": values.count,
        "role": values.segment,
        "scopes": Each(values.scope),
        "streams": values.count,
        "streams_per_uid": values.count,
        "vault_paths": Each(values.vault_path, least=1),
        "admin_socket_mode": values.file_mode,
        "workload_socket_mode": values.file_mode,
    }
)


def fill(table: Table, cls: type[S], **given: object) -> S | None:
    """A `cls` from the keys of `table`, except for the fields in `given`, which are taken as they are.

    None when a field without default is missing or wrong, or None was given for one that cannot be None.
    """
    filled = dict(given)
    whole = True
    for one in _fields(cls):
        default = _default(one)
        if one.name not in given:
            filled[one.name] = _value(table, one, default)
        whole = whole and (filled[one.name] is not None or default is None)
    return cls(**filled) if whole else None


def choose(
    table: Table, tag: str, members: Iterable[type[S]], *, keys: Mapping[type[S], frozenset[str]]
) -> type[S] | None:
    """The member of a closed union that `tag` names. Its class attribute `tag` is its name.

    `keys` has the keys of each member: one that only others have is reported with their names.
    """
    by_name: dict[str, type[S]] = {getattr(member, tag): member for member in members}
    table.require(tag)
    chosen = table.take(tag, values.one_of(by_name), None)
    if chosen is None:
        table.ignore_rest()
        return None
    owners: dict[str, list[str]] = {}
    for name, member in by_name.items():
        for key in keys[member]:
            owners.setdefault(key, []).append(repr(name))
    table.elsewhere = {
        key: f"is a key of {tag} {' and '.join(names)}, not of {chosen!r}" for key, names in owners.items()
    }
    return by_name[chosen]


def keys_of(cls: type[object]) -> frozenset[str]:
    """The keys that `fill` reads for `cls` when nothing is given."""
    return frozenset(key_of(one.name) for one in _fields(cls))


def key_of(field_name: str) -> str:
    """The key of a field: its name without the unit."""
    return field_name.removesuffix("_s").removesuffix("_bytes")


def _fields(cls: type[Any]) -> tuple[Field[Any], ...]:
    return fields(cls)


def _default(one: Field[Any]) -> object:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _value(table: Table, one: Field[Any], default: object) -> object:
    key, rule = key_of(one.name), _rule(one)
    if default is MISSING:
        table.require(key)
        default = None
    return table.take_each(key, rule, default) if isinstance(rule, Each) else table.take(key, rule, default)


def _rule(one: Field[Any]) -> Parse[Any] | Each[Any]:
    if one.name in _RULES:
        return _RULES[one.name]
    if one.name.endswith("_file"):
        return values.absolute_path
    if one.name.endswith("_s"):
        return _SECONDS
    if one.name.endswith("_bytes"):
        return values.size
    return values.flag if one.type == "bool" else values.text
