"""What holds of every SVID: each mistake is found whatever else is wrong, and no altered byte gets through."""

from __future__ import annotations

import warnings

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.authority import Authority, ca_form, ec_key, leaf_form, uri
from tokenward.core.identity import SpiffeId
from tokenward.core.svid import BACKDATE_S, Rule, is_root, jwt_faults, leaf_faults, path_to_root, signer_faults

unhurried = settings(deadline=None)  # a certificate takes a busy machine a while
NOW = 1_800_000_000.0
ID = SpiffeId.parse("spiffe://example.org/billing")
KEY = ec_key()
SOUND = leaf_form(str(ID), now=NOW)
ROOT = Authority.root(ca_form("root", now=NOW))
MIDDLE = ROOT.below(ca_form("middle", now=NOW))
LEAF = MIDDLE.sign(SOUND, KEY.public_key())
SIGNED_BYTES = len(LEAF.tbs_certificate_bytes)
ROOT_BYTES = len(ROOT.certificate.public_bytes(serialization.Encoding.DER))

MISTAKES: dict[Rule, dict[str, object]] = {
    Rule.SPIFFE_ID: {"names": (uri("spiffe://example.org/admin"),)},
    Rule.NO_OTHER_NAME: {"common_name": "admin"},
    Rule.NOT_A_CA: {"ca": True},
    Rule.KEY_USAGE: {"usages_critical": False},
    Rule.DIGITAL_SIGNATURE: {"usages": ("key_agreement",)},
    Rule.EXTENDED_KEY_USAGE: {"purposes": (ExtendedKeyUsageOID.CLIENT_AUTH,)},
    Rule.EXPIRED: {"ends": NOW - 1},
}
"""Mistakes in different fields, so that any of them can be made together."""


def faults_of(leaf: x509.Certificate, *, ttl_s: float = 3600.0, now: float = NOW) -> tuple[Rule, ...]:
    return leaf_faults(leaf, spiffe_id=ID, public_key=KEY.public_key(), ttl_s=ttl_s, now_wall=now)


@unhurried
@given(mistakes=st.sets(st.sampled_from(sorted(MISTAKES))), own_key=st.booleans())
def test_any_set_of_mistakes_is_told_as_that_set(mistakes: set[Rule], own_key: bool) -> None:
    form = SOUND
    for mistake in mistakes:
        form = form.but(**MISTAKES[mistake])
    leaf = MIDDLE.sign(form, (KEY if own_key else ec_key()).public_key())
    assert set(faults_of(leaf)) == mistakes | (set() if own_key else {Rule.OUR_KEY})


@unhurried
@given(
    backdate_s=st.integers(0, 120),
    ttl_s=st.integers(1, 86_400),
    lives_s=st.integers(1, 86_400),
    after_s=st.floats(0, 2e5),
)
def test_a_leaf_is_served_only_within_its_time_and_only_if_that_is_short(
    backdate_s: int, ttl_s: int, lives_s: int, after_s: float
) -> None:
    leaf = MIDDLE.sign(SOUND.but(begins=NOW - backdate_s, ends=NOW + lives_s), KEY.public_key())
    expected = {
        Rule.EXPIRED: after_s >= lives_s,
        Rule.LIFETIME: backdate_s + lives_s > ttl_s + BACKDATE_S,
    }
    assert set(faults_of(leaf, ttl_s=ttl_s, now=NOW + after_s)) == {rule for rule, told in expected.items() if told}


def with_a_byte_changed(certificate: x509.Certificate, position: int, flipped: int) -> x509.Certificate | None:
    """The certificate with another byte at `position`, or None when it cannot be loaded at all."""
    changed = bytearray(certificate.public_bytes(serialization.Encoding.DER))
    changed[position] ^= flipped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)  # a serial number that became negative
        try:
            return x509.load_der_x509_certificate(bytes(changed))
        except (ValueError, x509.InvalidVersion):
            return None


@unhurried
@given(position=st.integers(0, SIGNED_BYTES - 1), flipped=st.integers(1, 255))
def test_a_leaf_with_any_signed_byte_changed_is_not_served(position: int, flipped: int) -> None:
    leaf = with_a_byte_changed(LEAF, 4 + position, flipped)  # behind the outer tag and length
    if leaf is not None:
        path = path_to_root(leaf, [MIDDLE.certificate], [ROOT.certificate], now_wall=NOW)
        assert not path or faults_of(leaf)


@unhurried
@given(position=st.integers(0, ROOT_BYTES - 1), flipped=st.integers(1, 255))
def test_no_certificate_that_can_be_loaded_makes_a_judgement_raise(position: int, flipped: int) -> None:
    changed = with_a_byte_changed(ROOT.certificate, position, flipped)
    if changed is not None:
        is_root(changed)
        faults_of(changed)
        signer_faults([changed])
        path_to_root(ROOT.sign(SOUND, KEY.public_key()), [changed], [changed, ROOT.certificate], now_wall=NOW)


TEXT = st.text("aeghs:/.{}", max_size=8)
JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    TEXT,
    st.lists(TEXT),
)
HEADER_NAMES, CLAIM_NAMES = ("alg", "kid", "typ", "crit"), ("sub", "aud", "iat", "nbf", "exp", "iss")


@unhurried
@given(
    header=st.dictionaries(st.sampled_from(HEADER_NAMES), JSON),
    claims=st.dictionaries(st.sampled_from(CLAIM_NAMES), JSON),
)
def test_no_header_and_claims_make_a_judgement_raise_or_pass_by_chance(
    header: dict[str, object], claims: dict[str, object]
) -> None:
    assert jwt_faults(
        header, claims, spiffe_id=ID, audience="https://a.example", algorithm="ES256", ttl_s=300, now_wall=NOW
    )


@unhurried
@given(ttl_s=st.integers(1, 86_400), after_s=st.floats(0, 1e5), backdate_s=st.integers(0, 60))
def test_a_token_is_served_exactly_until_its_exp(ttl_s: int, after_s: float, backdate_s: int) -> None:
    claims = {
        "sub": str(ID),
        "aud": ["https://a.example"],
        "iat": int(NOW),
        "nbf": int(NOW) - backdate_s,
        "exp": int(NOW) + ttl_s,
    }
    faults = jwt_faults(
        {"alg": "ES256", "kid": "k", "typ": "JWT"},
        claims,
        spiffe_id=ID,
        audience="https://a.example",
        algorithm="ES256",
        ttl_s=ttl_s,
        now_wall=NOW + after_s,
    )
    assert faults == ((Rule.EXPIRED,) if after_s >= ttl_s else ())
