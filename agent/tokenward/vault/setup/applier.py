"""Makes a vault hold what a plan says, or writes the plan down for an operator.

Owns the comparison of what is there with what must be, and the writing. Leaves to `planner` what must be. Invariants:
what is right already is only read; what somebody widened or narrowed by hand is put right; nothing is deleted; the
administrator's token is used for these calls and kept nowhere.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from tokenward.core.secret import Secret
from tokenward.errors import NotFoundError, Reason, TokenwardError, VaultBadReplyError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.setup.steps import ByHand, Step

_Data = dict[str, Any]
_ACCESSOR: Final = re.compile(r"<accessor of auth/([^>]+)/>")
_ACL: Final = "sys/policies/acl/"


class Change(StrEnum):
    """What became of a step."""

    CREATED = "created"
    CORRECTED = "corrected"
    UNCHANGED = "unchanged"
    BY_HAND = "by hand"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step, and what became of it; `differed` names the fields that were not as they must be."""

    step: Step | ByHand
    change: Change
    differed: tuple[str, ...] = ()

    def __str__(self) -> str:
        fields = f" ({', '.join(self.differed)})" if self.differed else ""
        return f"{self.change}: {self.step.what}{fields}"


async def apply(client: VaultClient, admin_token: Secret, steps: Iterable[Step | ByHand]) -> tuple[Outcome, ...]:
    """Makes each step so, in order, and says what that took. A second time, every outcome is `unchanged` or `by hand`.

    Raises TokenwardError when something else stands where a mount or a key must be, and the vault's errors; what was
    done before that stays, and the next time goes on from there.
    """
    return tuple([await _apply(client, admin_token, step) for step in steps])


async def revoke_admin(client: VaultClient, admin_token: Secret) -> None:
    """Ends the token that set the vault up. Raises the vault's errors."""
    await client.call(VaultRequest("POST", "auth/token/revoke-self", {}), into=_Data, auth=admin_token)


def render(steps: Iterable[Step | ByHand]) -> str:
    """The steps as commands of `bao` (`vault` reads them too) that an operator can review, and run."""
    return "\n".join(_by_hand(step) if isinstance(step, ByHand) else _command(step) for step in steps)


# -- within ---------------------------------------------------------------------------------------------------------


async def _apply(client: VaultClient, token: Secret, step: Step | ByHand) -> Outcome:
    if isinstance(step, ByHand):
        return Outcome(step, Change.BY_HAND)
    found = await _found(client, token, step)
    accessors = await _accessors(client, token, step.body)
    if found is not None:
        wanted = _resolved(step.fields, accessors)
        differed = tuple(name for name, value in wanted.items() if _plain(value) != _plain(found.get(name)))
        if not differed:
            return Outcome(step, Change.UNCHANGED)
        if step.is_fixed:
            text = f"{step.at or step.path} is there, but not as {step.what} ({', '.join(differed)}): use another place"
            raise TokenwardError(Reason.INVALID_CONFIG, text)
    request = VaultRequest("POST", step.path, _resolved(step.body, accessors))
    await client.call(request, into=_Data, auth=token)
    return Outcome(step, Change.CREATED) if found is None else Outcome(step, Change.CORRECTED, differed)


async def _found(client: VaultClient, token: Secret, step: Step) -> _Data | None:
    """What is in the place of `step`; None when there is nothing."""
    try:
        reply = await client.call(VaultRequest(step.read_method, step.read), into=_Data, auth=token)
    except NotFoundError:
        return None
    data = reply.require_data()
    if not step.at:
        return data
    found = data.get(step.at)
    return found if isinstance(found, dict) else None


async def _accessors(client: VaultClient, token: Secret, body: Mapping[str, object]) -> dict[str, str]:
    """The accessors that `body` speaks of, by auth mount."""
    mounts = _ACCESSOR.findall(json.dumps(body))
    if not mounts:
        return {}
    table = (await client.call(VaultRequest("GET", "sys/auth"), into=_Data, auth=token)).require_data()
    try:
        return {mount: str(table[f"{mount}/"]["accessor"]) for mount in mounts}
    except (KeyError, TypeError) as error:
        raise VaultBadReplyError("the vault's table of auth methods lacks one that was just made") from error


def _resolved(body: Mapping[str, object], accessors: Mapping[str, str]) -> dict[str, object]:
    """`body` with real accessors, in the lists that hold templates."""
    if not accessors:
        return dict(body)
    return {
        name: [_ACCESSOR.sub(lambda found: accessors[found[1]], each) for each in value]
        if isinstance(value, list)
        else value
        for name, value in body.items()
    }


def _plain(value: object) -> object:
    """`value` as it compares: the vault sorts lists, and answers nothing, null or zero for "not set"."""
    match value:
        case list():
            return sorted(map(_plain, value), key=str) or None
        case dict():
            return {key: _plain(each) for key, each in value.items()} or None
        case _:
            return value or None


def _command(step: Step) -> str:
    if step.path.startswith(_ACL):
        command = ["bao", "policy", "write", step.path.removeprefix(_ACL), "-"]
        return _here(step.what, command, str(step.body["policy"]))
    text = json.dumps(step.body, indent=2) + "\n"
    hints = [f"{step.what}\n# unless `bao list {step.read}` has one"] if step.read_method == "LIST" else [step.what]
    hints += [
        f"<accessor of auth/{mount}/> is: bao read -field=accessor sys/auth/{mount}"
        for mount in sorted(set(_ACCESSOR.findall(text)))
    ]
    return _here("\n# ".join(hints), ["bao", "write", step.path, "-"], text)


def _here(what: str, command: list[str], text: str) -> str:
    return f"# {what}\n{shlex.join(command)} <<'END'\n{text}END\n"


def _by_hand(step: ByHand) -> str:
    return f"# BY HAND: {step.what}\n"
