"""The values of a plan: what the vault must hold, what a human must provide, and how things are named there.

Names are `tokenward:<trust domain>:<environment>:<workload>`: no part may hold the colon, so no two of them can meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tokenward.config import Config
from tokenward.core.model import AnyGrant
from tokenward.errors import Reason, TokenwardError

Body = Mapping[str, object]
G = TypeVar("G", bound=AnyGrant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that the vault must hold. `path` is written unless what `read` answers has all of `fields` already."""

    what: str
    path: str
    body: Body
    read: str
    read_method: str = "GET"
    at: str = ""
    """Where in the answer the fields are: the key of a mount in the table of mounts."""
    fields: Body = field(default_factory=dict)
    is_fixed: bool = False
    """Whether it can only be made, not changed: something else in its place is then an error."""


@dataclass(frozen=True, slots=True)
class ByHand:
    """One thing that a human must provide, because the configuration does not say it."""

    what: str


Plan = tuple[Step | ByHand, ...]


def agent_spiffe_id(config: Config) -> str:
    """Whom the agent is when it signs a JWT for itself."""
    return f"spiffe://{config.trust_domain}/tokenward/agent"


def policy_name(config: Config, workload: str = "") -> str:
    """The name of the policy of `workload`, or of the agent's own."""
    environment = re.sub(r"[^a-z0-9.-]+", "-", config.environment.name.lower()).strip("-")
    return ":".join(("tokenward", config.trust_domain, environment, *([workload] if workload else [])))


def written(what: str, path: str, body: Body) -> Step:
    """The step that writes all of `body` to `path`, where it can be read again."""
    return Step(what=what, path=path, body=body, read=path, fields=body)


def accessor_of(mount: str) -> str:
    """Stands for the accessor of `auth/<mount>`, which is known when the mount is there."""
    return f"<accessor of auth/{mount}/>"


def of(kind: type[G], grants: Iterable[AnyGrant]) -> Iterator[G]:
    """Those of one kind."""
    return (grant for grant in grants if isinstance(grant, kind))


def each(texts: Iterable[str]) -> list[str]:
    """Each text once, in order."""
    return sorted(set(texts))


def split(path: str, verb: str) -> tuple[str, str]:
    """Mount and name of `<mount><verb><name>`."""
    mount, _, name = path.rpartition(verb)
    return mount, name


def unusable(public: str) -> TokenwardError:
    """The error for a configuration that cannot be set up."""
    return TokenwardError(Reason.INVALID_CONFIG, public)
