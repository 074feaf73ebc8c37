"""`Signer`: the one key with which the agent vouches for its workloads to a vault that holds the public half.

Owns the key and the form of the JWTs: ES256, at most 60 seconds long, each with its own `jti`. Leaves to `exchange`
whom to vouch for. Invariant: the private key leaves this object in no form; it is made in memory or given as PEM bytes
(a systemd credential), and nothing here writes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Self

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tokenward.core.model import Instant
from tokenward.core.secret import Secret

MAX_TTL_S = 60
BACKDATED_S = 5
_RESERVED = frozenset({"iss", "sub", "aud", "iat", "nbf", "exp", "jti"})


class Signer:
    """Signs as `issuer`. Whoever holds its key is every workload of the JWT mount that trusts it."""

    def __init__(self, *, key: ec.EllipticCurvePrivateKey, issuer: str) -> None:
        self._key = key
        self.issuer = issuer

    @classmethod
    def generate(cls, *, issuer: str) -> Self:
        """With a new key that lives as long as this process."""
        return cls(key=ec.generate_private_key(ec.SECP256R1()), issuer=issuer)

    @classmethod
    def from_pem(cls, pem: bytes, *, issuer: str) -> Self:
        """With the P-256 private key in `pem`, unencrypted PKCS#8 or SEC1. Raises ValueError, without the content."""
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ValueError("expected an unencrypted private key in PEM") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError(  # noqa: TRY004 -- the content is wrong, not the argument's type
                "expected a P-256 (prime256v1) key, the one that ES256 signs with"
            )
        return cls(key=key, issuer=issuer)

    def public_pem(self) -> str:
        """The public key in PEM: what the vault's `jwt_validation_pubkeys` holds."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()

    def sign(
        self, *, subject: str, audience: str, claims: Mapping[str, str], now: Instant, ttl_s: int = MAX_TTL_S
    ) -> Secret:
        """A JWT that says `claims` of `subject` to `audience`; `exp` is `ttl_s` after `iat`.

        Dated back five seconds, since the vault allows no leeway and its clock may be a little behind ours. Raises
        ValueError for a lifetime over 60 seconds and for a claim that is not the caller's to set.
        """
        if not BACKDATED_S < ttl_s <= MAX_TTL_S:
            raise ValueError(f"ttl_s is more than {BACKDATED_S} and at most {MAX_TTL_S}")
        if reserved := _RESERVED & claims.keys():
            raise ValueError(f"{', '.join(sorted(reserved))} cannot be set as a claim")
        issued = int(now.wall) - BACKDATED_S
        payload = {
            **claims,
            "iss": self.issuer,
            "sub": subject,
            "aud": audience,
            "iat": issued,
            "nbf": issued,
            "exp": issued + ttl_s,
            "jti": secrets.token_hex(16),
        }
        return Secret(jwt.encode(payload, self._key, algorithm="ES256"))
