"""The agent's signing key, and the JWTs that it vouches with."""

from __future__ import annotations

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from tests.making import instant
from tokenward.vault.signer import Signer

NOW = instant(0)


def pem(key: PrivateKeyTypes, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def claims_in(token: str, signer: Signer) -> dict[str, object]:
    claims: dict[str, object] = jwt.decode(
        token,
        signer.public_pem(),
        algorithms=["ES256"],
        audience="openbao",
        issuer="https://agent",
        options={"verify_exp": False, "verify_nbf": False, "verify_iat": False},
    )
    return claims


def test_a_jwt_states_the_subject_and_the_claims_under_the_public_key() -> None:
    signer = Signer.generate(issuer="https://agent")
    made = signer.sign(subject="spiffe://a/b", audience="openbao", claims={"unix_uid": "7"}, now=NOW, ttl_s=30)
    claims = claims_in(made.reveal(), signer)
    assert (claims["sub"], claims["unix_uid"]) == ("spiffe://a/b", "7")
    assert jwt.get_unverified_header(made.reveal())["alg"] == "ES256"


def test_a_jwt_lives_as_long_as_asked_and_begins_a_little_before_now() -> None:
    signer = Signer.generate(issuer="https://agent")
    claims = claims_in(signer.sign(subject="s", audience="openbao", claims={}, now=NOW, ttl_s=30).reveal(), signer)
    assert claims["iat"] == claims["nbf"] == int(NOW.wall) - 5
    assert claims["exp"] == int(NOW.wall) + 25


def test_two_jwts_of_one_second_differ() -> None:
    signer = Signer.generate(issuer="https://agent")
    one, other = (
        claims_in(signer.sign(subject="s", audience="openbao", claims={}, now=NOW).reveal(), signer) for _ in range(2)
    )
    assert one["jti"] != other["jti"]


@pytest.mark.parametrize("ttl_s", [61, 5, 0, -1])
def test_a_lifetime_over_a_minute_or_already_over_is_refused(ttl_s: int) -> None:
    with pytest.raises(ValueError, match="ttl_s"):
        Signer.generate(issuer="i").sign(subject="s", audience="a", claims={}, now=NOW, ttl_s=ttl_s)


def test_a_claim_cannot_replace_what_the_signer_states() -> None:
    with pytest.raises(ValueError, match="sub cannot be set"):
        Signer.generate(issuer="i").sign(subject="s", audience="a", claims={"sub": "other"}, now=NOW)


def test_a_key_from_pem_signs_for_its_own_public_half() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    signer = Signer.from_pem(pem(key), issuer="https://agent")
    made = signer.sign(subject="s", audience="openbao", claims={}, now=NOW)
    assert claims_in(made.reveal(), Signer(key=key, issuer="x"))["sub"] == "s"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "unencrypted private key"),
        (b"-----BEGIN PRIVATE KEY-----\ns3cret\n-----END PRIVATE KEY-----\n", "unencrypted private key"),
        (pem(ec.generate_private_key(ec.SECP256R1()), b"password"), "unencrypted private key"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)), "P-256"),
    ],
    ids=["empty", "garbage", "encrypted", "P-384", "RSA"],
)
def test_another_key_is_refused_without_its_content(content: bytes, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        Signer.from_pem(content, issuer="i")
    assert "s3cret" not in str(caught.value)
