"""A certificate authority that signs what it is told to: the certificates of tests, each rule breakable alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

AnyKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def ec_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve or ec.SECP256R1())


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    """One RSA key for the whole run: making one takes as long as a hundred tests."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What stands in a certificate, besides its key and its signature. None leaves the extension out."""

    common_name: str = ""
    names: tuple[x509.GeneralName, ...] = ()
    names_critical: bool = True
    ca: bool | None = False
    path_length: int | None = None
    usages: tuple[str, ...] | None = ("digital_signature",)
    usages_critical: bool = True
    purposes: tuple[ObjectIdentifier, ...] | None = BOTH
    begins: float
    ends: float
    more: Mapping[x509.ExtensionType, bool] = field(default_factory=dict)

    def but(self, **changes: object) -> Self:
        return replace(self, **changes)  # type: ignore[arg-type]  # a test names fields of this very class


def leaf_form(spiffe_id: str, *, now: float, ttl_s: float = 3600.0) -> Form:
    """A sound X509-SVID, begun 30 s ago."""
    return Form(names=(uri(spiffe_id),), begins=now - 30, ends=now + ttl_s)


def ca_form(common_name: str, *, now: float, spiffe_id: str = "spiffe://example.org") -> Form:
    """A sound CA certificate."""
    return Form(
        common_name=common_name,
        names=(uri(spiffe_id),),
        names_critical=False,
        ca=True,
        usages=("key_cert_sign", "crl_sign"),
        purposes=None,
        begins=now - 86_400,
        ends=now + 86_400,
    )


@dataclass(frozen=True)
class Authority:
    """A CA certificate and its key."""

    certificate: x509.Certificate
    key: AnyKey

    @classmethod
    def root(cls, form: Form, key: AnyKey | None = None) -> Self:
        key = key or ec_key()
        name = _name(form)
        return cls(_signed(form, key.public_key(), issuer=name, issuer_key=key), key)

    def sign(self, form: Form, public_key: CertificatePublicKeyTypes) -> x509.Certificate:
        return _signed(form, public_key, issuer=self.certificate.subject, issuer_key=self.key)

    def below(self, form: Form, key: AnyKey | None = None) -> Authority:
        """An intermediate CA, or what `form` makes of it."""
        key = key or ec_key()
        return Authority(self.sign(form, key.public_key()), key)


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _name(form: Form) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, form.common_name)] if form.common_name else [])


def _signed(
    form: Form, public_key: CertificatePublicKeyTypes, *, issuer: x509.Name, issuer_key: AnyKey
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(form))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(form.begins, UTC))
        .not_valid_after(datetime.fromtimestamp(form.ends, UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for extension, critical in _extensions(form).items():
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())


def _extensions(form: Form) -> dict[x509.ExtensionType, bool]:
    made: dict[x509.ExtensionType, bool] = dict(form.more)
    if form.names:
        made[x509.SubjectAlternativeName(form.names)] = form.names_critical
    if form.ca is not None:
        made[x509.BasicConstraints(ca=form.ca, path_length=form.path_length)] = True
    if form.usages is not None:
        made[x509.KeyUsage(**{usage: usage in form.usages for usage in _USAGES})] = form.usages_critical
    if form.purposes is not None:
        made[x509.ExtendedKeyUsage(form.purposes)] = False
    return made
