"""Credentials of kind `x509`: an X509-SVID whose key is made here and whose certificate the vault's PKI engine signs.

Owns: the key, the request for a certificate, and the trust bundle of each PKI mount. Leaves to `core.svid`: every rule.
Invariant: a certificate is served only with the key that it is for, for the SPIFFE ID of the workload, and with a
bundle that it verifies against.

The bundle is not taken from the answer that it is to verify. It is read from what the mount publishes of all its
issuers, without any token, and then followed: a later reading must share a root with the one before, so an operator who
adds the new root before removing the old one is followed, while a mount that turns up with none of the known roots is
refused until the agent is restarted. That finds a mount made anew or another vault behind the address. It does
not help against the vault itself: whoever owns the PKI engine is the root of trust here, and the first reading is
believed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tokenward.core.identity import SpiffeId
from tokenward.core.model import Instant, Issued, Workload, X509Grant
from tokenward.core.secret import Secret
from tokenward.core.svid import Rule, is_root, leaf_faults, path_to_root, signer_faults
from tokenward.errors import VaultBadReplyError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.exchange import Exchange

_BUNDLE_AGE_S: Final = 300.0
"""How long a bundle is used before it is read again: SPIFFE's refresh hint where none is given."""
_MAX_CERTIFICATES: Final = 64
"""In one chain, or issuers of one mount: each costs a call or a signature check, and no sound mount has more."""

_log = logging.getLogger(__name__)


class Signed(msgspec.Struct, frozen=True):
    """What `POST <mount>/sign/<role>` answers with."""

    certificate: str
    ca_chain: list[str] = []


class IssuerIds(msgspec.Struct, frozen=True):
    """What `LIST <mount>/issuers` answers with."""

    keys: list[Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9-]+\Z")]]


class IssuerChain(msgspec.Struct, frozen=True):
    """What `GET <mount>/issuer/<id>/json` answers with: the issuer and everything above it that the mount has."""

    ca_chain: list[str]


class X509Issuer:
    """Each value is a new key and a new certificate, asked for with the workload's own rights."""

    def __init__(self, *, client: VaultClient, exchange: Exchange) -> None:
        self._exchange = exchange
        self._bundles = TrustBundles(client=client)

    async def issue(self, workload: Workload, grant: X509Grant, now: Instant) -> Issued:
        """Values `certificate_chain` (PEM, leaf first, without the root), `private_key` (PEM, PKCS#8), `bundle` (PEM).

        Raises VaultBadReplyError, naming the rule that the certificate breaks, and the vault's errors.
        """
        ttl_s = int(min(grant.ttl_s, grant.policy.max_ttl_s))
        key = ec.generate_private_key(ec.SECP256R1())
        reply, exchanged = await self._exchange.call(
            workload,
            VaultRequest("POST", grant.path, {"csr": _request_for(workload.spiffe_id, key), "ttl": f"{ttl_s}s"}),
            into=Signed,
            now=now,
        )
        signed = reply.require_data()
        leaf, *chain = _certificates([signed.certificate, *signed.ca_chain])
        _refuse(
            leaf_faults(leaf, spiffe_id=workload.spiffe_id, public_key=key.public_key(), ttl_s=ttl_s, now_wall=now.wall)
        )
        mount = grant.path.rpartition("/sign/")[0]
        path, bundle = await self._path(mount, leaf, chain, now)
        _refuse(signer_faults(path[1:]))
        ends = min(certificate.not_valid_after_utc.timestamp() for certificate in path)
        return Issued(
            values={
                "certificate_chain": Secret(_pem(path[:-1])),
                "private_key": Secret(_pkcs8(key)),
                "bundle": Secret(_pem(bundle)),
            },
            issued=now,
            expires=Instant(ends, now.mono + ends - now.wall),
            wall_bound=True,
            exchanged=exchanged,
            vault_request_id=reply.request_id,
        )

    async def _path(
        self, mount: str, leaf: x509.Certificate, chain: Sequence[x509.Certificate], now: Instant
    ) -> tuple[tuple[x509.Certificate, ...], tuple[x509.Certificate, ...]]:
        """The path from `leaf` to a root of the mount's bundle, and that bundle; read again when none leads there."""
        bundle = await self._bundles.of(mount, now)
        path = path_to_root(leaf, chain, bundle, now_wall=now.wall)
        if not path:
            bundle = await self._bundles.read(mount, now)
            path = path_to_root(leaf, chain, bundle, now_wall=now.wall)
        if not path:
            _refuse((Rule.PATH,))
        return path, bundle


@dataclass(frozen=True, slots=True)
class _Bundle:
    roots: tuple[x509.Certificate, ...]
    read_mono: float


class TrustBundles:
    """The roots of each PKI mount, as the mount publishes them, followed from the first reading on."""

    def __init__(self, *, client: VaultClient) -> None:
        self._client = client
        self._known: dict[str, _Bundle] = {}
        self._reading = asyncio.Lock()

    async def of(self, mount: str, now: Instant) -> tuple[x509.Certificate, ...]:
        """The roots of `mount`, read again when the last reading is old. Raises as `read` does."""
        async with self._reading:  # many workloads start at once; the first one reads
            known = self._known.get(mount)
            if known is not None and now.mono < known.read_mono + _BUNDLE_AGE_S:
                return known.roots
            return await self._read(mount, now)

    async def read(self, mount: str, now: Instant) -> tuple[x509.Certificate, ...]:
        """The roots of `mount` as they are published now.

        Raises VaultBadReplyError when it has none, or none of those that were known before, and the vault's errors.
        """
        async with self._reading:
            return await self._read(mount, now)

    async def _read(self, mount: str, now: Instant) -> tuple[x509.Certificate, ...]:
        roots = tuple(certificate for certificate in await self._published(mount) if is_root(certificate))
        if not roots:
            raise VaultBadReplyError(f"the PKI mount {mount} has no self-signed root: import the root's certificate")
        known = self._known.get(mount)
        if known is not None and not set(known.roots) & set(roots):
            raise VaultBadReplyError(
                f"the PKI mount {mount} has none of the roots it had before: restart the agent if it was made anew"
            )
        if known is not None and set(known.roots) != set(roots):
            _log.warning("the trust bundle of %s changed: %d roots, %d before", mount, len(roots), len(known.roots))
        self._known[mount] = _Bundle(roots, now.mono)
        return roots

    async def _published(self, mount: str) -> list[x509.Certificate]:
        """The certificates of all issuers of `mount` and of those above them, each once, in the mount's order."""
        listed = await self._client.call(VaultRequest("LIST", f"{mount}/issuers"), into=IssuerIds)
        issuer_ids = listed.require_data().keys
        if len(issuer_ids) > _MAX_CERTIFICATES:
            raise VaultBadReplyError(
                f"the PKI mount {mount} has more than {_MAX_CERTIFICATES} issuers: remove old ones"
            )
        found: dict[x509.Certificate, None] = {}
        for issuer_id in issuer_ids:
            chain = await self._client.call(VaultRequest("GET", f"{mount}/issuer/{issuer_id}/json"), into=IssuerChain)
            found.update(dict.fromkeys(_certificates(chain.require_data().ca_chain)))
        return list(found)


def _request_for(spiffe_id: SpiffeId, key: ec.EllipticCurvePrivateKey) -> str:
    """A certificate request (PEM) for exactly one name, the SPIFFE ID: the engine copies what is in it, or nothing."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id))])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _certificates(texts: Sequence[str]) -> list[x509.Certificate]:
    if len(texts) > _MAX_CERTIFICATES:
        raise VaultBadReplyError(f"the PKI engine answered with more than {_MAX_CERTIFICATES} certificates")
    try:
        return [x509.load_pem_x509_certificate(text.encode()) for text in texts]
    except (ValueError, x509.InvalidVersion) as error:
        raise VaultBadReplyError("the PKI engine answered with a certificate that cannot be read") from error


def _refuse(faults: Sequence[Rule]) -> None:
    """Raises VaultBadReplyError when there are any."""
    if faults:
        raise VaultBadReplyError(
            "the PKI engine's certificate was refused: it " + "; it ".join(faults) + " (see the role's settings)"
        )


def _pem(certificates: Iterable[x509.Certificate]) -> str:
    return "".join(certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in certificates)


def _pkcs8(key: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
