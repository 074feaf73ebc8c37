"""Credentials of kind `jwt`: a JWT-SVID for one audience, signed by a transit key that never leaves the vault.

Owns: the token's header and claims, and what is known of each transit key. Leaves to `core.svid`: the result's rules.
Invariant: a token is served only when the public key that its `kid` names verifies it.

Transit signs whatever it is given, so only the agent's own token may use it and the grant is checked here once more.
The key version is always named: a rotation between the making of the header and the signing would make the `kid`
wrong. The newest version signs, so verifiers must look for a `kid` they do not know.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from tokenward.core.model import Instant, Issued, JwtGrant, Workload
from tokenward.core.secret import Secret
from tokenward.core.svid import BACKDATE_S, jwt_faults
from tokenward.errors import DeniedError, Reason, TokenwardError, VaultBadReplyError
from tokenward.vault.client import VaultRequest
from tokenward.vault.exchange import Exchange

_KEY_AGE_S: Final = 60.0
"""How long what is known of a key is used: a rotation is followed within that time."""
_NBF_S: Final = int(BACKDATE_S / 2)
_ALGORITHMS: Final = {
    "ecdsa-p256": "ES256",
    "rsa-2048": "RS256",
    "rsa-3072": "RS256",
    "rsa-4096": "RS256",
}
_CURED_BY_READING: Final = frozenset({Reason.VAULT_BAD_REPLY, Reason.VAULT_ERROR, Reason.VAULT_DENIED})
_SIGNATURE: Final = re.compile(r"vault:v([0-9]+):([A-Za-z0-9_-]+)")


_JWS: Final = jwt.PyJWS()
"""Signatures alone: the claims are judged by `core.svid`, which is given the time."""


class KeyVersion(msgspec.Struct, frozen=True):
    """One version of an asymmetric transit key."""

    public_key: str


class TransitKey(msgspec.Struct, frozen=True):
    """What `GET <mount>/keys/<key>` answers with."""

    type: str
    latest_version: int
    keys: dict[str, KeyVersion | int]
    """By version; a number where the key is symmetric."""


class Signature(msgspec.Struct, frozen=True):
    """What `POST <mount>/sign/<key>/<hash>` answers with: `vault:v<version>:<signature>`."""

    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _SigningKey:
    version: int
    kid: str
    algorithm: str
    public_key: EllipticCurvePublicKey | RSAPublicKey
    read_mono: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signed:
    token: str = field(repr=False)
    key: _SigningKey
    header: Mapping[str, object]
    claims: Mapping[str, object]
    vault_request_id: str


class JwtIssuer:
    """Signs for any workload with the agent's own token; `issuer` is the `iss` of every token."""

    def __init__(self, *, exchange: Exchange, issuer: str) -> None:
        self._exchange = exchange
        self._issuer = issuer
        self._known: dict[str, _SigningKey] = {}
        self._reading = asyncio.Lock()

    async def issue(self, workload: Workload, grant: JwtGrant, audience: str, now: Instant) -> Issued:
        """Value `token`, a JWS in compact form.

        Raises DeniedError for an audience that is not granted, VaultBadReplyError for a signature by another key, and
        the vault's errors.
        """
        if audience not in grant.audiences:
            raise DeniedError(
                Reason.NOT_GRANTED,
                f"{grant.name} is not granted for this audience: ask for one of the grant's audiences",
            )
        begins, ttl_s = int(now.wall), int(min(grant.ttl_s, grant.policy.max_ttl_s))
        claims = {
            "iss": self._issuer,
            "sub": str(workload.spiffe_id),
            "aud": [audience],
            "iat": begins,
            "nbf": begins - _NBF_S,
            "exp": begins + ttl_s,
            "jti": secrets.token_urlsafe(16),
            **({"scope": " ".join(grant.scopes)} if grant.scopes else {}),  # RFC 8693 section 4.2
        }
        signed = await self._sign(grant.path, claims, now)
        faults = jwt_faults(
            signed.header,
            signed.claims,
            spiffe_id=workload.spiffe_id,
            audience=audience,
            algorithm=signed.key.algorithm,
            ttl_s=ttl_s,
            now_wall=now.wall,
        )
        if faults:
            raise VaultBadReplyError("the token was refused: it " + "; it ".join(faults))
        ends = begins + ttl_s
        return Issued(
            values={"token": Secret(signed.token)},
            issued=now,
            expires=Instant(ends, now.mono + ends - now.wall),
            wall_bound=True,
            vault_request_id=signed.vault_request_id,
        )

    async def _sign(self, path: str, claims: Mapping[str, object], now: Instant) -> _Signed:
        """A token of `claims`, signed by the newest version of the key at `path` and verified."""
        key, is_new = await self._key(path, now)
        try:
            return await self._sign_with(key, path, claims, now)
        except TokenwardError as error:
            # The key may have been rotated, trimmed or made anew since it was read: then reading it again helps.
            if is_new or error.reason not in _CURED_BY_READING:
                raise
        self._known.pop(path, None)
        key, _ = await self._key(path, now)
        return await self._sign_with(key, path, claims, now)

    async def _sign_with(self, key: _SigningKey, path: str, claims: Mapping[str, object], now: Instant) -> _Signed:
        mount, _, name = path.rpartition("/keys/")
        signed_part = _encoded({"alg": key.algorithm, "kid": key.kid, "typ": "JWT"}) + "." + _encoded(claims)
        body = {
            "input": b64encode(signed_part.encode()).decode(),
            "key_version": key.version,
            "marshaling_algorithm": "jws",
            "signature_algorithm": "pkcs1v15",  # of RSA keys, where the default is PSS; others ignore it
        }
        reply = await self._exchange.agent_call(
            VaultRequest("POST", f"{mount}/sign/{name}/sha2-256", body), into=Signature, now=now
        )
        found = _SIGNATURE.fullmatch(reply.require_data().signature)
        if found is None or int(found[1]) != key.version:
            raise VaultBadReplyError(f"transit key {name} answered with something else than a signature by {key.kid}")
        return _verified(f"{signed_part}.{found[2]}", key, reply.request_id)

    async def _key(self, path: str, now: Instant) -> tuple[_SigningKey, bool]:
        """The newest version of the key at `path`, and whether it was read just now."""
        async with self._reading:  # many tokens are asked for at once; the first one reads
            known = self._known.get(path)
            if known is not None and now.mono < known.read_mono + _KEY_AGE_S:
                return known, False
            reply = await self._exchange.agent_call(VaultRequest("GET", path), into=TransitKey, now=now)
            made = self._known[path] = _signing_key(path, reply.require_data(), now)
            return made, True


def _encoded(part: Mapping[str, object]) -> str:
    return urlsafe_b64encode(msgspec.json.encode(part)).rstrip(b"=").decode()


def _signing_key(path: str, key: TransitKey, now: Instant) -> _SigningKey:
    """The newest version of `key`. Raises VaultBadReplyError for a key that no JWT can be signed with."""
    name = path.rpartition("/keys/")[2]
    newest = key.keys.get(str(key.latest_version))
    if key.type not in _ALGORITHMS or not isinstance(newest, KeyVersion):
        raise VaultBadReplyError(f"transit key {name} cannot sign JWTs: make it one of {', '.join(_ALGORITHMS)}")
    try:
        public_key = load_pem_public_key(newest.public_key.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise VaultBadReplyError(f"the public key of transit key {name} cannot be read") from error
    if not isinstance(public_key, EllipticCurvePublicKey | RSAPublicKey):
        raise VaultBadReplyError(f"the public key of transit key {name} is not of the key's type")
    return _SigningKey(
        version=key.latest_version,
        kid=f"{name}-v{key.latest_version}",
        algorithm=_ALGORITHMS[key.type],
        public_key=public_key,
        read_mono=now.mono,
    )


def _verified(token: str, key: _SigningKey, vault_request_id: str) -> _Signed:
    """`token` as any verifier reads it. Raises VaultBadReplyError unless `key` verifies it."""
    try:
        read = _JWS.decode_complete(token, key.public_key, algorithms=[key.algorithm])
        claims = msgspec.json.decode(read["payload"], type=dict[str, object])
    except (jwt.PyJWTError, TypeError, ValueError) as error:
        raise VaultBadReplyError(f"the vault's signature does not verify with {key.kid}") from error
    return _Signed(token=token, key=key, header=read["header"], claims=claims, vault_request_id=vault_request_id)
