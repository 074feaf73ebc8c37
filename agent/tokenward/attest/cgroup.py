"""The lines of /proc/<pid>/cgroup as values, and what a reader makes of them. Pure.

Every name on these lines was chosen by whoever made that directory. The kernel refuses a newline in one and nothing
else, so lines are split at newlines only, and `systemd` and `pods` believe a name as far as its parents vouch for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenward.core.identity import Selector


@dataclass(frozen=True, slots=True)
class Membership:
    """Where a process stands in one hierarchy. `controllers` is empty for cgroup v2, `parts` for its root.

    Leading parts `..` mean that the reader's cgroup namespace does not reach up to where both have a common parent.
    """

    controllers: frozenset[str]
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """Selectors that hold, and for each selector type that could not be told, why."""

    selectors: frozenset[Selector] = frozenset()
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def failed(cls, kinds: Iterable[str], cause: str) -> Reading:
        return cls(unreadable=dict.fromkeys(kinds, cause))


def parse_memberships(text: str) -> tuple[Membership, ...]:
    """Raises ValueError unless `text` is what the kernel writes for a process in a living cgroup."""
    lines = text.removesuffix("\n").split("\n")
    return tuple(_membership(line) for line in lines)


def _membership(line: str) -> Membership:
    number, _, rest = line.partition(":")
    controllers, separator, path = rest.partition(":")
    if not number.isdecimal() or not separator or not path.startswith("/"):
        raise ValueError("a line is not of the form number:controllers:/path")
    if path.endswith(" (deleted)"):
        raise ValueError("the cgroup of the process was removed")
    parts = tuple(path[1:].split("/")) if path != "/" else ()
    below = parts
    while below[:1] == ("..",):
        below = below[1:]
    if {"", ".", ".."} & set(below):
        raise ValueError("a path has an empty or relative part")
    return Membership(frozenset(controllers.split(",")) if controllers else frozenset(), parts)
