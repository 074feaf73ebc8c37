"""What becomes of a credential when the configuration is replaced. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenward.core.model import AnyGrant, Key, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The difference between two configurations, by names, for the record and for who must be told."""

    workloads: frozenset[str]
    """Those of which anything changed, and those that are new or gone."""
    ended: frozenset[tuple[str, str]]
    """(workload, credential) whose values must not be served any more: the grant is gone, or is another."""


def changes(before: Mapping[str, Workload], after: Mapping[str, Workload]) -> Changes:
    """What changed from `before` to `after`. A grant that is the same for the same proof keeps its value."""
    touched = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    ended = {
        (name, credential)
        for name in touched & before.keys()
        for credential in before[name].grants
        if not _same_grant(before[name], after.get(name), credential)
    }
    return Changes(workloads=frozenset(touched), ended=frozenset(ended))


def _same_grant(before: Workload, after: Workload | None, credential: str) -> bool:
    if after is None or _proof(before) != _proof(after):
        return False
    return before.grants.get(credential) == after.grants.get(credential)


def _proof(workload: Workload) -> object:
    """What the vault knows the workload by; owner and purpose are for people."""
    return workload.spiffe_id, workload.exchange, workload.selectors


def grant_of(workloads: Mapping[str, Workload], key: Key) -> tuple[Workload, AnyGrant] | None:
    """The workload and the grant that `key` stands for, or None where the configuration has them no more."""
    workload = workloads.get(key.workload)
    grant = workload.grants.get(key.credential) if workload is not None else None
    return None if workload is None or grant is None else (workload, grant)
