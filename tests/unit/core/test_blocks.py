"""core.blocks: what an operator's revocation covers."""

from __future__ import annotations

import pytest

from tokenward.core.blocks import Block, Blocks, Scope
from tokenward.core.model import Key
from tokenward.errors import Reason, RevokedError

ONE, WORKLOAD, ALL = Scope(workload="app", credential="api"), Scope(workload="app"), Scope()


def block(scope: Scope, reason: str = "leaked") -> Block:
    return Block(scope=scope, reason=reason, by="uid 0", since=1.0)


@pytest.mark.parametrize(
    ("scope", "covered", "spared"),
    [
        (ONE, Key("app", "api"), Key("app", "db")),
        (ONE, Key("app", "api", "aud"), Key("other", "api")),
        (WORKLOAD, Key("app", "db"), Key("other", "api")),
        (ALL, Key("other", "db"), None),
    ],
)
def test_a_scope_covers_what_its_names_say(scope: Scope, covered: Key, spared: Key | None) -> None:
    blocks = Blocks([block(scope)])
    with pytest.raises(RevokedError) as caught:
        blocks.verify(covered)
    assert caught.value.reason is Reason.REVOKED
    assert "leaked" in caught.value.public
    if spared is not None:
        blocks.verify(spared)


def test_a_wider_block_goes_on_when_a_narrower_one_is_lifted() -> None:
    blocks = Blocks()
    blocks.add(block(ONE))
    blocks.add(block(WORKLOAD))
    assert blocks.lift(ONE)
    assert not blocks.lift(ONE)
    with pytest.raises(RevokedError):
        blocks.verify(Key("app", "api"))
    assert blocks.lift(WORKLOAD)
    blocks.verify(Key("app", "api"))


def test_the_first_reason_stays() -> None:
    blocks = Blocks()
    blocks.add(block(ONE, "first"))
    blocks.add(block(ONE, "second"))
    assert [each.reason for each in blocks] == ["first"]


def test_scopes_read_as_people_say_them() -> None:
    assert [str(scope) for scope in (ONE, WORKLOAD, ALL)] == ["app/api", "workload app", "everything"]
