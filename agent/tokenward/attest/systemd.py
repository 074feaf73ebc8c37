"""Which systemd unit and slice a process belongs to, from its cgroups. Pure.

Follows systemd's own rule: the leading parts of the path are slices, and the first one that is no slice is the unit.
Everything below belongs to the unit, which may have been delegated: a user names what is below `user@1000.service`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenward.attest.cgroup import Membership, Reading
from tokenward.core.identity import Selector

KINDS = frozenset({"systemd:unit", "systemd:slice"})

_NAME = r"[A-Za-z0-9:_.\\@-]+"
_SLICE = re.compile(rf"{_NAME}\.slice")
_UNIT = re.compile(rf"{_NAME}\.(?:service|scope|socket|mount|swap)")
_ROOT_SLICE = "-.slice"


def read(memberships: Iterable[Membership], *, private: bool) -> Reading:
    """`systemd:unit` and `systemd:slice`, spelled as systemctl does: `\\x2d` stays as it is.

    The slice is the one that the unit is directly in. `private` says that the reader is in a cgroup namespace.
    """
    tracked = [m for m in memberships if not m.controllers or "name=systemd" in m.controllers]
    placed = [m.parts for m in tracked if m.parts]  # in the root of a hierarchy that systemd does not use
    if any(parts[0] == ".." for parts in placed) or (private and tracked and not placed):
        return Reading.failed(
            KINDS, "the agent's cgroup namespace hides which unit the process is in; run the agent in the host's"
        )
    places = {_place(parts) for parts in placed}
    if len(places) > 1:
        return Reading.failed(KINDS, "the cgroup hierarchies of the process contradict each other")
    return Reading(frozenset(selector for place in places for selector in place))


def _place(parts: tuple[str, ...]) -> frozenset[Selector]:
    slice_name = _ROOT_SLICE
    for depth, part in enumerate(parts):
        name = part.removeprefix("_")  # systemd's escape for names that the kernel uses itself
        if _SLICE.fullmatch(name):
            slice_name = name
        elif _UNIT.fullmatch(name):
            return frozenset({Selector("systemd:unit", name), Selector("systemd:slice", slice_name)})
        elif depth == 0:
            return frozenset()  # not systemd's
        else:
            break
    return frozenset({Selector("systemd:slice", slice_name)})
