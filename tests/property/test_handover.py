"""core.handover: every state survives the way through bytes, and no bytes do harm."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tokenward.core.handover import Held, State, alive, decode, encode
from tokenward.core.model import Exchanged, Instant, Issued, Key, Lease, VaultToken, Version
from tokenward.core.secret import Secret

TIMES = st.floats(allow_nan=False)
INSTANTS = st.builds(Instant, TIMES, TIMES)
TEXTS = st.text(max_size=20)
SECRETS = st.builds(Secret, TEXTS)
KEYS = st.builds(Key, TEXTS, TEXTS, TEXTS)
TOKENS = st.builds(VaultToken, token=SECRETS, accessor=TEXTS, expires_mono=st.none() | TIMES, renewable=st.booleans())
ISSUED = st.builds(
    Issued,
    values=st.dictionaries(TEXTS, SECRETS, max_size=3),
    issued=INSTANTS,
    expires=INSTANTS,
    renewed=st.none() | INSTANTS,
    wall_bound=st.booleans(),
    refresh_s=st.none() | TIMES,
    lease=st.none() | st.builds(Lease, token=TOKENS, lease_id=TEXTS, renewable=st.booleans()),
    exchanged=st.none() | st.builds(Exchanged, method=TEXTS, role=TEXTS, vault_request_id=TEXTS, accessor=TEXTS),
    vault_request_id=TEXTS,
)
NUMBERS = st.integers(1, 2**63 - 1)
VERSIONS = st.builds(
    Version,
    number=NUMBERS,
    issued=ISSUED,
    since=INSTANTS,
    draw=st.floats(0, 1, exclude_max=True),
    due=INSTANTS,
    fingerprint=TEXTS,
)
ALONE = st.builds(Held, key=KEYS, grant_digest=TEXTS, current=VERSIONS, used_mono=TIMES)
OVERLAPPING = st.builds(
    Held, key=KEYS, grant_digest=TEXTS, current=VERSIONS, previous=VERSIONS, retire=INSTANTS, used_mono=TIMES
)
STATES = st.builds(
    State,
    credentials=st.lists(ALONE | OVERLAPPING, max_size=4, unique_by=lambda held: held.key).map(tuple),
    numbers=st.dictionaries(KEYS, NUMBERS, max_size=3),
    pending=st.lists(st.tuples(KEYS, ISSUED), max_size=3).map(tuple),
    fingerprint_key=st.binary(max_size=32),
    written=INSTANTS,
)


@given(STATES)
def test_a_state_comes_back_as_it_was(state: State) -> None:
    assert decode(encode(state)) == state


@given(st.binary(), st.booleans())
def test_bytes_are_a_state_or_a_value_error(data: bytes, ours: bool) -> None:
    head = b"tokenward-handover 1\n" if ours else b""
    accepts(head + data)


@given(STATES, st.integers(0), st.binary(min_size=1, max_size=4))
def test_a_damaged_state_is_a_state_or_a_value_error(state: State, at: int, instead: bytes) -> None:
    data = encode(state)
    at %= len(data)
    data[at : at + len(instead)] = instead
    accepts(data)


@given(STATES, INSTANTS, st.data())
def test_every_lease_is_served_or_revoked_or_over(state: State, now: Instant, data: st.DataObject) -> None:
    known = {(held.key.workload, held.key.credential): held.grant_digest for held in state.credentials}
    digests = {pair: digest for pair, digest in known.items() if data.draw(st.booleans())}
    after = alive(state, now, digests)

    assert all(held.current.issued.is_live(now) for held in after.credentials)
    assert {held.key for held in after.credentials} <= {held.key for held in state.credentials}
    counted = dict(after.numbers) | {held.key: held.current.number for held in after.credentials}
    assert all(counted[held.key] >= held.current.number for held in state.credentials)
    live = [value for _, value in leases(state) if value.is_live(now)]
    assert len([value for _, value in leases(after)]) == len(live)
    assert replace(after, credentials=(), numbers={}, pending=()) == replace(
        state, credentials=(), numbers={}, pending=()
    )


def accepts(data: bytes | bytearray) -> None:
    """Whatever it is, it is refused by a ValueError or can be written again."""
    try:
        state = decode(data)
    except ValueError:
        return
    encode(state)


def leases(state: State) -> list[tuple[Key, Issued]]:
    versions = [
        (held.key, version.issued)
        for held in state.credentials
        for version in (held.previous, held.current)
        if version is not None
    ]
    return [(key, value) for key, value in (*versions, *state.pending) if value.lease is not None]
