"""Which workload a process is, and which grant it may use. Decides only; every reason comes back as data.

Deny in doubt: no match, two matches, and a type that a workload needs but nobody could read are three different
answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenward.core.model import AnyGrant, Attestation, JwtGrant, Workload


@dataclass(frozen=True, slots=True)
class Matched:
    """Exactly one workload fits."""

    workload: Workload


@dataclass(frozen=True, slots=True)
class Unmatched:
    """No workload fits, and everything that any of them needs was read."""


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """More than one workload fits: a mistake in the configuration, and no identity."""

    workloads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CouldNotTell:
    """Some workload could fit if these selector types had been readable; each has its cause."""

    unreadable: Mapping[str, str]


Decision = Matched | Unmatched | Ambiguous | CouldNotTell


def decide(workloads: Iterable[Workload], seen: Attestation) -> Decision:
    """The workload that `seen` proves.

    A workload fits when all of its selectors were seen. One that lacks only selectors of unreadable types might fit, so
    then nobody can tell, not even when another one fits: it could be the second match.
    """
    fits: list[Workload] = []
    in_doubt: dict[str, str] = {}
    for workload in workloads:
        missing = workload.selectors - seen.selectors
        if not missing and workload.selectors:
            fits.append(workload)
        elif missing and all(selector.kind in seen.unreadable for selector in missing):
            in_doubt.update({selector.kind: seen.unreadable[selector.kind] for selector in missing})
    if len(fits) > 1:
        return Ambiguous(tuple(sorted(workload.name for workload in fits)))
    if in_doubt:
        return CouldNotTell(in_doubt)
    if fits:
        return Matched(fits[0])
    return Unmatched()


def granted(workload: Workload, credential: str, audience: str) -> AnyGrant | None:
    """The grant that lets `workload` have `credential` for `audience`, or None.

    None says nothing of whether the name exists elsewhere. An audience is asked for exactly where the kind is `jwt`;
    a JWT grant with one audience needs none to be named (see `audience_of`).
    """
    grant = workload.grants.get(credential)
    if grant is None:
        return None
    if isinstance(grant, JwtGrant):
        return grant if audience_of(grant, audience) in grant.audiences else None
    return grant if not audience else None


def audience_of(grant: AnyGrant, asked: str) -> str:
    """The audience that `asked` means for this grant: the only one there is when none was named."""
    if isinstance(grant, JwtGrant) and not asked and len(grant.audiences) == 1:
        return grant.audiences[0]
    return asked
