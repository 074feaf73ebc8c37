"""core.handover: what one agent leaves to the next, and what the next one makes of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tests.making import instant, issued, kv_grant, workload
from tokenward.core.handover import Held, State, alive, decode, digest_of, encode
from tokenward.core.model import Instant, Issued, Key, LeasedGrant, Policy, TokenRole, Version

KEY = Key("app", "db")
DIGESTS = {("app", "db"): "same"}


def version(value: Issued, number: int = 7) -> Version:
    return Version(
        number=number, issued=value, since=value.issued, draw=0.5, due=instant(60), fingerprint=f"f-{number}"
    )


def held(
    current: Issued, *, previous: Issued | None = None, key: Key = KEY, digest: str = "same", number: int = 7
) -> Held:
    return Held(
        key=key,
        grant_digest=digest,
        current=version(current, number),
        previous=version(previous, number - 1) if previous is not None else None,
        retire=instant(30) if previous is not None else None,
        used_mono=5.0,
    )


def state(
    *credentials: Held,
    numbers: Mapping[Key, int] | None = None,
    pending: tuple[tuple[Key, Issued], ...] = (),
) -> State:
    return State(
        credentials=credentials,
        numbers=numbers or {},
        pending=pending,
        fingerprint_key=bytes(range(32)),
        written=instant(10),
    )


# -- bytes ------------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was() -> None:
    forever = replace(issued(leased=True), expires=Instant(float("inf"), float("inf")))
    written = state(
        held(issued(leased=True, value="new"), previous=issued(leased=True, value="old")),
        numbers={Key("app", "api", "https://api.example"): 3},
        pending=((KEY, forever),),
    )
    assert decode(encode(written)) == written


def test_the_bytes_can_be_wiped() -> None:
    assert isinstance(encode(state()), bytearray)


def test_what_is_no_state_is_refused() -> None:
    for data in (b"", b"x", b"tokenward", bytes(encode(state()))[1:]):
        with pytest.raises(ValueError, match="no state of an agent"):
            decode(data)


def test_another_format_is_refused() -> None:
    data = bytes(encode(state())).replace(b"tokenward-handover 1\n", b"tokenward-handover 2\n")
    with pytest.raises(ValueError, match="another version of the agent"):
        decode(data)


def test_a_damaged_state_is_refused_without_a_word_of_it() -> None:
    data = bytes(encode(state(held(issued(value="s3cret-value")))))
    for damaged in (
        data[:-1],
        data + b"\0",
        data.replace(b"s3cret-value", b"s3cret-\xff\xff\xff\xff\xff"),
        data.replace(b"\xacs3cret-value", b"\xc4\x0bs3cret-valu"),  # bytes where there must be a text
    ):
        assert damaged != data
        with pytest.raises(ValueError, match="is damaged") as refused:
            decode(damaged)
        assert "s3cret" not in str(refused.value)
        assert refused.value.__cause__ is None


def test_a_state_that_no_agent_can_be_in_is_refused() -> None:
    good = held(issued(), previous=issued(value="old"))
    for wrong in (
        state(good, good),
        state(replace(good, retire=None)),
        state(replace(good, previous=None)),
        state(held(issued(), number=0)),
        state(numbers={KEY: -1}),
    ):
        with pytest.raises(ValueError, match="contradicts itself"):
            decode(encode(wrong))


def test_two_numbers_for_one_key_are_refused() -> None:
    data = bytes(encode(state(numbers={Key("app", "a"): 1, Key("app", "b"): 2})))
    with pytest.raises(ValueError, match="contradicts itself"):
        decode(data.replace(b"\xa1b", b"\xa1a"))


def test_a_text_that_is_no_unicode_is_refused_without_a_word_of_it() -> None:
    with pytest.raises(ValueError, match="no Unicode") as refused:
        encode(state(held(issued(value="s3cret-\ud800"))))
    assert refused.value.__cause__ is None
    assert not isinstance(refused.value, UnicodeError)


def test_only_secrets_are_written_in_clear() -> None:
    odd = replace(held(issued()), grant_digest=object())  # type: ignore[arg-type]  # what must not be written
    with pytest.raises(TypeError, match="no part of a state"):
        encode(state(odd))


# -- digests ----------------------------------------------------------------------------------------------------------


def test_equal_grants_have_equal_digests_in_every_process() -> None:
    """The hash seed, and with it the order of a set, differs from process to process."""
    program = """
from tests.making import kv_grant, workload
from tokenward.core.handover import digest_of
print(digest_of(kv_grant(), workload("app", *(f"unix:gid:{n}" for n in range(20)))))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_whatever_makes_a_grant_what_it_is_changes_its_digest() -> None:
    grant, its = kv_grant(), workload()
    leased = LeasedGrant(name="api", path=grant.path)
    digests = [
        digest_of(grant, its),
        digest_of(grant, its, vault="https://other.example"),
        digest_of(replace(grant, path="secret/other"), its),
        digest_of(replace(grant, policy=Policy(max_ttl_s=60)), its),
        digest_of(replace(grant, scopes=("read",)), its),
        digest_of(replace(grant, poll_s=5.0), its),
        digest_of(leased, its),
        digest_of(grant, workload("other")),
        digest_of(grant, workload("app", "unix:uid:1001")),
        digest_of(grant, replace(its, exchange=TokenRole(role="app"))),
        digest_of(grant, replace(its, exchange=replace(its.exchange, role="other"))),
    ]
    assert len(set(digests)) == len(digests)


def test_the_owner_and_the_purpose_may_change() -> None:
    its = workload()
    assert digest_of(kv_grant(), its) == digest_of(kv_grant(), replace(its, owner="payments", purpose="payouts"))


# -- what is good -----------------------------------------------------------------------------------------------------


def test_what_lives_for_an_unchanged_grant_is_kept() -> None:
    before = state(held(issued(leased=True), previous=issued(leased=True, value="old")), numbers={Key("app", "x"): 2})
    assert alive(before, instant(20), DIGESTS) == before


def test_what_has_expired_is_left_out_and_its_number_kept() -> None:
    after = alive(state(held(issued(leased=True, lifetime_s=100))), instant(100), DIGESTS)
    assert (after.credentials, after.pending) == ((), ())
    assert after.numbers == {KEY: 7}


def test_a_previous_version_that_has_expired_is_left_out() -> None:
    before = held(issued(lifetime_s=100), previous=issued(lifetime_s=15, value="old"))
    (kept,) = alive(state(before), instant(20), DIGESTS).credentials
    assert (kept.previous, kept.retire) == (None, None)
    assert (kept.current, kept.used_mono, kept.grant_digest) == (before.current, 5.0, "same")


def test_an_expired_current_version_leaves_the_lease_before_it_to_be_revoked() -> None:
    old = issued(lifetime_s=100, value="old", leased=True)
    after = alive(state(held(issued(lifetime_s=15), previous=old)), instant(20), DIGESTS)
    assert (after.credentials, after.pending) == ((), ((KEY, old),))


@pytest.mark.parametrize("digests", [{}, {("app", "db"): "other"}], ids=["removed", "changed"])
def test_leases_of_a_grant_that_is_gone_or_another_are_to_be_revoked(digests: dict[tuple[str, str], str]) -> None:
    new, old = issued(leased=True, value="new"), issued(leased=True, value="old")
    after = alive(state(held(new, previous=old)), instant(20), digests)
    assert after.credentials == ()
    assert after.pending == ((KEY, old), (KEY, new))
    assert after.numbers == {KEY: 7}


def test_what_has_no_lease_needs_no_revocation() -> None:
    assert alive(state(held(issued())), instant(20), {}).pending == ()


def test_revocations_go_on_until_the_lease_has_ended() -> None:
    long, short = issued(leased=True, lifetime_s=100), issued(leased=True, lifetime_s=15, value="short")
    after = alive(state(pending=((KEY, long), (KEY, short))), instant(20), {})
    assert after.pending == ((KEY, long),)


def test_a_later_number_of_the_same_key_is_kept() -> None:
    after = alive(state(held(issued(), number=7), numbers={KEY: 9}), instant(20), {})
    assert after.numbers == {KEY: 9}


def test_audiences_of_one_grant_stand_and_fall_with_it() -> None:
    keys = (Key("app", "db", "one"), Key("app", "db", "two"))
    before = state(*(held(issued(), key=key) for key in keys))
    assert len(alive(before, instant(20), DIGESTS).credentials) == 2
    assert alive(before, instant(20), {}).credentials == ()


def test_a_state_shows_no_secret() -> None:
    shown = repr(state(held(issued(value="s3cret-value"))))
    assert "s3cret-value" not in shown
    assert "fingerprint_key" not in shown
