"""The rules that an identity document must keep before it is served: X509-SVIDs and JWT-SVIDs, judged without I/O.

Owns which rules there are and how each is told: a broken rule comes back as a `Rule`, all of them at once, and none
holds anything of the document. Leaves to `issuers.x509` and `issuers.jwt` where documents and keys come from, and to
the `cryptography` package the walk along a certification path (RFC 5280 section 6). The invariant: a leaf for which
`leaf_faults` is empty and `path_to_root` is not, with no `signer_faults` on that path, is an X509-SVID of exactly the
SPIFFE ID, key and lifetime that was asked for.

Followed are SPIFFE X509-SVID sections 2 to 5 and JWT-SVID sections 2 to 4. Stricter than they are: a leaf has no name
but the one asked for (no DNS name, no common name), since nobody checked a second one. URI name constraints, which the
path walk cannot read, make it refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from tokenward.core.identity import SpiffeId

BACKDATE_S = 60.0
"""How far before now a document may begin, so that a verifier whose clock is behind takes it too."""

JWT_ALGORITHMS = frozenset(family + size for family in ("RS", "ES", "PS") for size in ("256", "384", "512"))
"""What JWT-SVID section 2.1 allows: no symmetric algorithm, no `none`."""
_JWT_HEADER = frozenset({"alg", "kid", "typ"})

_Kind = TypeVar("_Kind", bound=x509.ExtensionType)
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)


class Rule(StrEnum):
    """One rule, worded so that `the certificate ...` or `the token ...` can stand before it."""

    READABLE = "must be readable: well-formed, each extension once"
    OUR_KEY = "must hold the public key that was sent"
    ONE_URI = "must have exactly one URI name"
    SPIFFE_ID = "must be for the SPIFFE ID that was asked for"
    NO_OTHER_NAME = "must have no other name than the SPIFFE ID"
    CRITICAL_NAME = "must have a critical subject alternative name when its subject is empty"
    NOT_A_CA = "must not be a CA certificate"
    KEY_USAGE = "must have a critical key usage extension"
    DIGITAL_SIGNATURE = "must be usable for digital signatures"
    NO_SIGNING_OF_OTHERS = "must not be usable to sign certificates or revocation lists"
    EXTENDED_KEY_USAGE = "must be usable for both TLS servers and TLS clients"
    NOT_YET = "must be valid already: compare the clocks of vault and agent"
    EXPIRED = "must not have expired: compare the clocks of vault and agent"
    LIFETIME = "must not live longer than was asked for"
    PATH = "must lead through CA certificates to a root that its mount publishes"
    SIGNER_ID = "must be signed by certificates whose SPIFFE ID, if any, has no path"

    ALGORITHM = "must be signed with the algorithm of its key, one of RS, ES or PS 256, 384 or 512"
    HEADER = "must have a header of alg, kid and typ JWT alone"
    SUBJECT = "must have the SPIFFE ID that was asked for as its sub"
    AUDIENCE = "must have the audience that was asked for, and no other, as its aud"
    TIMES = "must have whole numbers as its iat, nbf and exp"


# -- X509-SVID ------------------------------------------------------------------------------------------------------


def leaf_faults(
    leaf: x509.Certificate,
    *,
    spiffe_id: SpiffeId,
    public_key: CertificatePublicKeyTypes,
    ttl_s: float,
    now_wall: float,
) -> tuple[Rule, ...]:
    """Every rule that `leaf` breaks as the X509-SVID of `spiffe_id` for `public_key`; none when it may be served.

    `ttl_s` is the lifetime in seconds that was asked for, `now_wall` in seconds since the epoch.
    """
    try:
        extensions, subject = leaf.extensions, leaf.subject
        ours = leaf.public_key() == public_key
    except _UNREADABLE:
        return (Rule.READABLE,)
    broken = {
        Rule.OUR_KEY: not ours,
        **_name_faults(subject, extensions, spiffe_id),
        **_usage_faults(extensions),
        **_validity_faults(leaf, ttl_s, now_wall),
    }
    return tuple(rule for rule, is_broken in broken.items() if is_broken)


def _name_faults(subject: x509.Name, extensions: x509.Extensions, spiffe_id: SpiffeId) -> dict[Rule, bool]:
    """X509-SVID sections 2 and 3.1."""
    names = _extension(extensions, x509.SubjectAlternativeName)
    if names is None:
        return {Rule.ONE_URI: True}
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    return {
        Rule.ONE_URI: len(uris) != 1,
        Rule.SPIFFE_ID: str(spiffe_id) not in uris,
        Rule.NO_OTHER_NAME: len(uris) < len(names.value) or bool(subject.get_attributes_for_oid(NameOID.COMMON_NAME)),
        Rule.CRITICAL_NAME: not names.critical and not list(subject),
    }


def _usage_faults(extensions: x509.Extensions) -> dict[Rule, bool]:
    """X509-SVID sections 4.1, 4.3 and 4.4."""
    basic = _extension(extensions, x509.BasicConstraints)
    usage = _extension(extensions, x509.KeyUsage)
    extended = _extension(extensions, x509.ExtendedKeyUsage)
    both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    return {
        Rule.NOT_A_CA: basic is not None and basic.value.ca,
        Rule.KEY_USAGE: usage is None or not usage.critical,
        Rule.DIGITAL_SIGNATURE: usage is not None and not usage.value.digital_signature,
        Rule.NO_SIGNING_OF_OTHERS: usage is not None and (usage.value.key_cert_sign or usage.value.crl_sign),
        Rule.EXTENDED_KEY_USAGE: extended is not None and not both <= set(extended.value),
    }


def _validity_faults(leaf: x509.Certificate, ttl_s: float, now_wall: float) -> dict[Rule, bool]:
    """RFC 5280 section 4.1.2.5, where both ends belong to the validity; it ends one second earlier here."""
    begins, ends = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    return {
        Rule.NOT_YET: now_wall < begins,
        Rule.EXPIRED: ends <= now_wall,
        Rule.LIFETIME: ends - begins > ttl_s + BACKDATE_S,
    }


def path_to_root(
    leaf: x509.Certificate,
    intermediates: Iterable[x509.Certificate],
    roots: Sequence[x509.Certificate],
    *,
    now_wall: float,
) -> tuple[x509.Certificate, ...]:
    """The certificates from `leaf` to one of `roots`, both included; empty when no valid path leads there.

    Every signature, validity, CA flag, path length and `keyCertSign` on the way was checked at `now_wall`.
    """
    if not roots:
        return ()
    at = datetime.fromtimestamp(now_wall, UTC)
    verifier = PolicyBuilder().store(Store(list(roots))).time(at).build_client_verifier()
    try:
        return tuple(verifier.verify(leaf, list(intermediates)).chain)
    except (VerificationError, *_UNREADABLE):
        return ()


def signer_faults(signers: Iterable[x509.Certificate]) -> tuple[Rule, ...]:
    """`Rule.SIGNER_ID` when one of `signers` has a SPIFFE ID with a path (X509-SVID section 3.2)."""
    return tuple({fault for signer in signers for fault in _signer_faults(signer)})


def _signer_faults(signer: x509.Certificate) -> tuple[Rule, ...]:
    try:
        names = _extension(signer.extensions, x509.SubjectAlternativeName)
    except _UNREADABLE:
        return (Rule.READABLE,)
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    ids = [uri.lower().removeprefix("spiffe://") for uri in uris if uri.lower().startswith("spiffe://")]
    return (Rule.SIGNER_ID,) if any("/" in trust_domain for trust_domain in ids) else ()


def is_root(certificate: x509.Certificate) -> bool:
    """Whether `certificate` is a CA certificate signed by its own key, so that it can stand in a trust bundle."""
    try:
        basic = _extension(certificate.extensions, x509.BasicConstraints)
        certificate.verify_directly_issued_by(certificate)
    except (InvalidSignature, *_UNREADABLE):
        return False
    return basic is not None and basic.value.ca


def _extension(extensions: x509.Extensions, kind: type[_Kind]) -> x509.Extension[_Kind] | None:
    try:
        return extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


# -- JWT-SVID -------------------------------------------------------------------------------------------------------


def jwt_faults(
    header: Mapping[str, object],
    claims: Mapping[str, object],
    *,
    spiffe_id: SpiffeId,
    audience: str,
    algorithm: str,
    ttl_s: float,
    now_wall: float,
) -> tuple[Rule, ...]:
    """Every rule that a token breaks as the JWT-SVID of `spiffe_id` for `audience`; none when it may be served.

    `header` and `claims` are as decoded from the token, whose signature by `algorithm` is the caller's to verify.
    """
    broken = {
        **_time_faults(claims, ttl_s, now_wall),
        Rule.ALGORITHM: header.get("alg") != algorithm or algorithm not in JWT_ALGORITHMS,
        Rule.HEADER: header.keys() != _JWT_HEADER or header["typ"] != "JWT" or not header["kid"],
        Rule.SUBJECT: claims.get("sub") != str(spiffe_id),
        Rule.AUDIENCE: claims.get("aud") != [audience],
    }
    return tuple(rule for rule, is_broken in broken.items() if is_broken)


def _time_faults(claims: Mapping[str, object], ttl_s: float, now_wall: float) -> dict[Rule, bool]:
    """JWT-SVID section 3.3 and RFC 7519 section 4.1: expired at `exp`, not before `nbf`."""
    issued, begins, ends = (claims.get(name) for name in ("iat", "nbf", "exp"))
    if type(issued) is not int or type(begins) is not int or type(ends) is not int:  # a bool is an int, too
        return {Rule.TIMES: True}
    return {
        Rule.NOT_YET: now_wall < max(issued, begins),
        Rule.EXPIRED: ends <= now_wall,
        Rule.LIFETIME: ends - begins > ttl_s + BACKDATE_S,
    }
