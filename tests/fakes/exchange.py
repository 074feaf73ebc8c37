"""A vault's PKI and transit engines in memory, behind stand-ins for `Exchange` and `VaultClient`.

They sign as OpenBao's do, remember who asked for what, and lie on demand: `lie` is given each honest answer's data and
the request, and what it returns goes out instead.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.fakes.authority import AnyKey, Authority, Form, ca_form, ec_key, leaf_form, pem
from tokenward.core.model import Exchanged, Instant, Workload
from tokenward.errors import NotFoundError, Reason, VaultDeniedError, VaultUnavailableError
from tokenward.vault import reply as replies
from tokenward.vault.client import Auth, Reply, VaultClient, VaultRequest
from tokenward.vault.exchange import Exchange

T = TypeVar("T")
Data = dict[str, Any]

NOBODY = "nobody"
AGENT = "the agent"


@dataclass
class FakePki:
    """The mount `pki`: role `self` signs a request's key for its one URI name; `issuers` are what it publishes."""

    now: float
    root: Authority = field(init=False)
    signer: Authority = field(init=False)
    issuers: dict[str, list[Authority]] = field(init=False)
    reform: Callable[[Form], Form] = lambda form: form
    """What the leaf's form becomes before it is signed."""

    def __post_init__(self) -> None:
        self.root = Authority.root(ca_form("root", now=self.now))
        self.signer = self.root.below(ca_form("intermediate", now=self.now).but(path_length=0))
        self.issuers = {"aaaa-1": [self.signer, self.root], "aaaa-2": [self.root]}

    def answer(self, request: VaultRequest) -> Data:
        match request.method, request.path.split("/"):
            case "POST", ["pki", "sign", "self"]:
                return self._sign(dict(request.body or {}))
            case "LIST", ["pki", "issuers"]:
                return {"keys": list(self.issuers), "key_info": {}}
            case "GET", ["pki", "issuer", issuer_id, "json"] if issuer_id in self.issuers:
                return {"ca_chain": [pem(each.certificate) for each in self.issuers[issuer_id]]}
        raise NotFoundError(Reason.SECRET_NOT_FOUND, f"the fake has no {request}")

    def _sign(self, body: Data) -> Data:
        asked = x509.load_pem_x509_csr(body["csr"].encode())
        assert asked.is_signature_valid
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        (uri,) = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        assert names.critical
        assert len(names.value) == 1
        assert not list(asked.subject)
        form = leaf_form(uri, now=self.now, ttl_s=float(body["ttl"].removesuffix("s")))
        leaf = self.signer.sign(self.reform(form), asked.public_key())
        chain = [self.signer, self.root] if self.signer is not self.root else [self.root]
        return {
            "certificate": pem(leaf),
            "issuing_ca": pem(chain[0].certificate),
            "ca_chain": [pem(each.certificate) for each in chain],
            "serial_number": "00:01",
        }


@dataclass
class FakeTransit:
    """The mount `transit` with one key, `jwt`: `keys` are its versions, from 1 on."""

    keys: list[AnyKey] = field(default_factory=lambda: [ec_key()])
    kind: str = "ecdsa-p256"
    oldest: int = 1
    """The lowest version that may still sign."""

    def rotate(self, key: AnyKey | None = None) -> None:
        self.keys.append(key or ec_key())

    def answer(self, request: VaultRequest) -> Data:
        match request.method, request.path.split("/"):
            case "GET", ["transit", "keys", "jwt"]:
                versions = {str(number): {"public_key": _public(key)} for number, key in enumerate(self.keys, start=1)}
                return {"type": self.kind, "latest_version": len(self.keys), "keys": versions, "name": "jwt"}
            case "POST", ["transit", "sign", "jwt", "sha2-256"]:
                return self._sign(dict(request.body or {}))
        raise NotFoundError(Reason.SECRET_NOT_FOUND, f"the fake has no {request}")

    def _sign(self, body: Data) -> Data:
        version = body.get("key_version") or len(self.keys)
        if not self.oldest <= version <= len(self.keys):
            raise VaultUnavailableError(Reason.VAULT_ERROR, "the vault failed (HTTP 500)")
        assert body["marshaling_algorithm"] == "jws"
        key, signed_part = self.keys[version - 1], base64.b64decode(body["input"])
        if isinstance(key, ec.EllipticCurvePrivateKey):
            r, s = decode_dss_signature(key.sign(signed_part, ec.ECDSA(hashes.SHA256())))
            size = (key.curve.key_size + 7) // 8
            signature = r.to_bytes(size, "big") + s.to_bytes(size, "big")
        elif body.get("signature_algorithm") == "pkcs1v15":
            signature = key.sign(signed_part, padding.PKCS1v15(), hashes.SHA256())
        else:
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
            signature = key.sign(signed_part, pss, hashes.SHA256())
        encoded = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
        return {"signature": f"vault:v{version}:{encoded}", "key_version": version}


def _public(key: AnyKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


@dataclass
class FakeEngines:
    """Both engines, who asked them for what, and the lie that they tell, if any."""

    pki: FakePki
    transit: FakeTransit = field(default_factory=FakeTransit)
    lie: Callable[[VaultRequest, Data], Data | None] = lambda _, honest: honest
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Who asked, and for what: `("billing", "POST pki/sign/self")`."""

    def answer(self, who: str, request: VaultRequest, into: type[T]) -> Reply[T]:
        self.asked.append((who, str(request)))
        may_not = {"sign": AGENT, "keys": AGENT} if request.path.startswith("transit/") else {}
        if may_not.get(request.path.split("/")[1], who) != who:
            raise VaultDeniedError(Reason.VAULT_DENIED, f"{who} may not {request}")
        engine = self.pki if request.path.startswith("pki/") else self.transit
        body = {"request_id": f"request-{len(self.asked)}", "data": self.lie(request, engine.answer(request))}
        return replies.decode(msgspec.json.encode(body), into)

    def asked_for(self, what: str) -> list[str]:
        """Who asked for `what`, in order."""
        return [who for who, request in self.asked if request == what]

    def tell(self, of: str, lie: Mapping[str, Any] | Callable[[Data], Data | None] | None) -> None:
        """From now on, answers to requests whose text ends with `of` are changed by `lie` (a dict is merged in)."""

        def told(request: VaultRequest, honest: Data) -> Data | None:
            if not str(request).endswith(of) or lie is None:
                return honest
            return lie(honest) if callable(lie) else {**honest, **lie}

        self.lie = told


class FakeExchange(Exchange):
    """Calls `engines` as the workload or as the agent."""

    def __init__(self, engines: FakeEngines) -> None:
        self._engines = engines

    async def call(
        self, workload: Workload, request: VaultRequest, *, into: type[T], now: Instant
    ) -> tuple[Reply[T], Exchanged]:
        await asyncio.sleep(0)  # a real call lets others run, too
        reply = self._engines.answer(workload.name, request, into)
        return reply, Exchanged(method="signed_jwt", role=workload.name, vault_request_id=reply.request_id)

    async def agent_call(self, request: VaultRequest, *, into: type[T], now: Instant) -> Reply[T]:
        await asyncio.sleep(0)
        return self._engines.answer(AGENT, request, into)


class FakeClient(VaultClient):
    """Calls `engines` without any token."""

    def __init__(self, engines: FakeEngines) -> None:
        self._engines = engines

    async def call(self, request: VaultRequest, *, into: type[T], auth: Auth = None) -> Reply[T]:
        assert auth is None
        await asyncio.sleep(0)
        return self._engines.answer(NOBODY, request, into)
