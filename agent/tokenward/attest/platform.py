"""What holds for every caller because of where the agent runs: the pod's own namespace and service account.

Read from the token that the kubelet projects into the agent's pod. The agent trusts its own mount, not the caller, so
the signature is for the vault to judge; here the claims only name the pod.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import jwt
import msgspec

from tokenward.core.identity import Selector

_KINDS = ("k8s:ns", "k8s:sa")


@dataclass(frozen=True, slots=True)
class Platform:
    """Selectors that hold for all callers, and for those that could not be told, why."""

    selectors: frozenset[Selector] = frozenset()
    unreadable: Mapping[str, str] = field(default_factory=dict)


class _Named(msgspec.Struct):
    name: str


class _Pod(msgspec.Struct):
    namespace: str
    serviceaccount: _Named


class _Claims(msgspec.Struct):
    pod: _Pod = msgspec.field(name="kubernetes.io")


def platform_of(token: str) -> Platform:
    """The platform that the projected service account token `token` names."""
    try:
        claims = msgspec.convert(jwt.decode(token, options={"verify_signature": False}), _Claims)
    except (jwt.InvalidTokenError, msgspec.ValidationError):
        return unknown("the projected token is not a Kubernetes service account token")
    names = (claims.pod.namespace, claims.pod.serviceaccount.name)
    return Platform(frozenset(map(Selector, _KINDS, names)))


def unknown(cause: str) -> Platform:
    """No platform could be told, because of `cause`."""
    return Platform(unreadable=dict.fromkeys(_KINDS, cause))
