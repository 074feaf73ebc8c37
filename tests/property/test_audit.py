"""core.audit: no edit of a chain goes unseen."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenward.core.audit import BrokenChainError, Chain, Record, verify

texts = st.text(st.characters(codec="utf-8"), max_size=20)


def chain_of(names: list[str]) -> list[bytes]:
    chain, lines = Chain(), []
    for name in names:
        lines.append(chain.line(Record(event="get", credential=name), 0.0))
        chain.advance(lines[-1])
    return lines


@given(st.lists(texts, max_size=8))
def test_whatever_is_recorded_verifies_and_is_one_line(names: list[str]) -> None:
    lines = chain_of(names)
    assert verify(lines).seq == len(names)
    assert not any(b"\n" in line for line in lines)


@given(st.lists(texts, min_size=2, max_size=6), st.data())
def test_any_changed_byte_before_the_last_line_is_found(names: list[str], data: st.DataObject) -> None:
    lines = chain_of(names)
    number = data.draw(st.integers(0, len(lines) - 2))
    position = data.draw(st.integers(0, len(lines[number]) - 1))
    byte = data.draw(st.integers(0, 255))
    assume(lines[number][position] != byte)
    assume(byte != 10)
    lines[number] = lines[number][:position] + bytes([byte]) + lines[number][position + 1 :]
    with pytest.raises(BrokenChainError):
        verify(lines)


@given(st.lists(texts, min_size=3, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_any_other_order_is_found(names: list[str], random: Random) -> None:
    lines = chain_of(names)
    shuffled = random.sample(lines, len(lines))
    assume(shuffled != lines)
    with pytest.raises(BrokenChainError):
        verify(shuffled)
