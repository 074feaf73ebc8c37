"""core.audit: a chain of lines that shows any change."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tokenward.core.audit import GENESIS, BrokenChainError, Chain, Peer, Record, verify
from tokenward.core.model import Process


def lines(count: int) -> list[bytes]:
    chain = Chain()
    made = []
    for number in range(count):
        line = chain.line(Record(event="get", credential=f"c{number}"), 1_800_000_000.5 + number)
        chain.advance(line)
        made.append(line + b"\n")
    return made


def test_a_line_has_number_time_record_and_the_hash_of_the_line_before() -> None:
    first, second = lines(2)
    entry = json.loads(first)
    assert (entry["seq"], entry["prev"], entry["time"]) == (0, GENESIS, "2027-01-15T08:00:00.500000+00:00")
    assert entry["record"] == {"event": "get", "credential": "c0"}
    assert json.loads(second)["seq"] == 1


def test_an_untouched_chain_verifies_and_says_where_it_ends() -> None:
    made = lines(5)
    end = verify(made)
    assert end.seq == 5
    assert verify(made[3:], verify(made[:3])).head == end.head
    assert verify([]).head == GENESIS


def test_a_chain_goes_on_after_its_last_line() -> None:
    made = lines(3)
    chain = Chain.after(made[-1].rstrip())
    follow = chain.line(Record(event="stop"), 0.0)
    assert verify([*made, follow]).seq == 4


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        (lambda made: [made[0], made[1].replace(b'"c1"', b'"cX"'), *made[2:]], 3),
        (lambda made: [made[0], *made[2:]], 2),
        (lambda made: [made[0], made[2], made[1], *made[3:]], 2),
        (lambda made: [*made[:2], made[1], *made[2:]], 3),
        (lambda made: [*made[:2], b"garbage\n", *made[2:]], 3),
        (lambda made: [made[0], made[1][:-9], *made[2:]], 2),
        (lambda made: made[1:], 1),
    ],
    ids=["changed", "removed", "reordered", "repeated", "inserted", "cut", "first removed"],
)
def test_any_damage_is_found_at_the_first_line_that_does_not_follow(
    damage: Callable[[list[bytes]], list[bytes]], number: int
) -> None:
    with pytest.raises(BrokenChainError) as caught:
        verify(damage(lines(5)))
    assert caught.value.number == number


def test_something_else_is_not_a_chain_to_go_on_from() -> None:
    with pytest.raises(ValueError, match="not an audit line"):
        Chain.after(b'{"seq": 1}')


def test_a_peer_is_what_the_kernel_said() -> None:
    assert Peer.of(Process(pid=1, uid=2, gid=3, path="/bin/x")) == Peer(1, 2, 3, "/bin/x")
