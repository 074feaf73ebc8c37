"""`X509Issuer` against a PKI engine that tells the truth, and against one that does not."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.fakes.authority import Authority, Form, ca_form, ec_key, leaf_form, pem, uri
from tests.fakes.exchange import NOBODY, Data, FakeClient, FakeEngines, FakeExchange, FakePki
from tests.making import instant, workload
from tokenward.core.model import Instant, Policy, X509Grant
from tokenward.errors import VaultBadReplyError
from tokenward.issuers.x509 import X509Issuer

NOW = instant(0)
BILLING = workload("billing")
ID = str(BILLING.spiffe_id)
GRANT = X509Grant(name="svid", path="pki/sign/self", ttl_s=900)


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines(pki=FakePki(now=NOW.wall))


@pytest.fixture
def issuer(engines: FakeEngines) -> X509Issuer:
    return X509Issuer(client=FakeClient(engines), exchange=FakeExchange(engines))


def certificates(text: str) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(text.encode())


async def test_the_chain_begins_with_a_leaf_for_the_key_and_ends_before_the_root(
    engines: FakeEngines, issuer: X509Issuer
) -> None:
    issued = await issuer.issue(BILLING, GRANT, NOW)
    values = {name: secret.reveal() for name, secret in issued.values.items()}
    leaf, *rest = certificates(values["certificate_chain"])
    key = serialization.load_pem_private_key(values["private_key"].encode(), password=None)
    assert values["private_key"].startswith("-----BEGIN PRIVATE KEY-----")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert leaf.public_key() == key.public_key()
    assert rest == [engines.pki.signer.certificate]
    assert certificates(values["bundle"]) == [engines.pki.root.certificate]


async def test_it_ends_with_the_certificate_on_both_clocks(issuer: X509Issuer) -> None:
    issued = await issuer.issue(BILLING, GRANT, NOW)
    assert issued.wall_bound
    assert issued.expires == Instant(NOW.wall + 900, NOW.mono + 900)
    assert not issued.is_live(issued.expires)


async def test_it_ends_with_the_first_certificate_of_its_path_that_does(
    engines: FakeEngines, issuer: X509Issuer
) -> None:
    engines.pki.signer = engines.pki.root.below(ca_form("brief", now=NOW.wall).but(ends=NOW.wall + 60))
    assert (await issuer.issue(BILLING, GRANT, NOW)).expires == Instant(NOW.wall + 60, NOW.mono + 60)


async def test_it_is_asked_for_as_the_workload_and_the_bundle_as_nobody(
    engines: FakeEngines, issuer: X509Issuer
) -> None:
    issued = await issuer.issue(BILLING, GRANT, NOW)
    assert engines.asked_for("POST pki/sign/self") == ["billing"]
    assert engines.asked_for("LIST pki/issuers") == [NOBODY]
    assert issued.exchanged is not None
    assert issued.vault_request_id == issued.exchanged.vault_request_id == "request-1"


async def test_no_more_is_asked_for_than_the_policy_lets_a_value_live(issuer: X509Issuer) -> None:
    brief = X509Grant(name="svid", path="pki/sign/self", ttl_s=900, policy=Policy(max_ttl_s=300))
    assert (await issuer.issue(BILLING, brief, NOW)).expires.wall == NOW.wall + 300


async def test_each_value_has_a_new_key(issuer: X509Issuer) -> None:
    one, other = await asyncio.gather(issuer.issue(BILLING, GRANT, NOW), issuer.issue(BILLING, GRANT, NOW))
    assert one.values["private_key"] != other.values["private_key"]


async def test_a_mount_whose_root_signs_leaves_itself_is_fine(engines: FakeEngines, issuer: X509Issuer) -> None:
    engines.pki.signer = engines.pki.root
    issued = await issuer.issue(BILLING, GRANT, NOW)
    assert len(certificates(issued.values["certificate_chain"].reveal())) == 1


REFUSED: dict[str, tuple[Callable[[Form], Form], str]] = {
    "another workload": (lambda form: form.but(names=(uri("spiffe://example.org/admin"),)), "SPIFFE ID"),
    "a second URI": (lambda form: form.but(names=(*form.names, uri("spiffe://example.org/x"))), "exactly one URI"),
    "no name": (lambda form: form.but(names=()), "exactly one URI"),
    "a common name": (lambda form: form.but(common_name="admin"), "no other name"),
    "a CA": (lambda form: form.but(ca=True), "CA certificate"),
    "a signer of others": (lambda form: form.but(usages=("digital_signature", "key_cert_sign")), "sign certificates"),
    "expired": (lambda form: form.but(ends=NOW.wall - 1), "expired"),
    "of tomorrow": (lambda form: form.but(begins=NOW.wall + 60), "valid already"),
    "for a month": (lambda form: form.but(ends=NOW.wall + 30 * 86_400), "live longer"),
}


@pytest.mark.parametrize(("reform", "said"), REFUSED.values(), ids=REFUSED)
async def test_a_certificate_that_was_not_asked_for_is_refused_by_its_rule(
    engines: FakeEngines, issuer: X509Issuer, reform: Callable[[Form], Form], said: str
) -> None:
    engines.pki.reform = reform
    with pytest.raises(VaultBadReplyError, match=said) as caught:
        await issuer.issue(BILLING, GRANT, NOW)
    assert "admin" not in caught.value.public
    assert "BEGIN" not in caught.value.public


async def test_every_broken_rule_is_named_at_once(engines: FakeEngines, issuer: X509Issuer) -> None:
    engines.pki.reform = lambda form: form.but(ca=True, common_name="x")
    with pytest.raises(VaultBadReplyError, match=r"no other name .*; it must not be a CA"):
        await issuer.issue(BILLING, GRANT, NOW)


async def test_a_certificate_for_another_key_is_refused(engines: FakeEngines, issuer: X509Issuer) -> None:
    other = engines.pki.signer.sign(leaf_form(ID, now=NOW.wall, ttl_s=900), ec_key().public_key())
    engines.tell("pki/sign/self", {"certificate": pem(other)})
    with pytest.raises(VaultBadReplyError, match="public key that was sent"):
        await issuer.issue(BILLING, GRANT, NOW)


def of_version_4(text: str) -> str:
    """The certificate with a version that no X.509 has: `cryptography` has an error of its own for it."""
    der = x509.load_pem_x509_certificate(text.encode()).public_bytes(serialization.Encoding.DER)
    version_3 = b"\xa0\x03\x02\x01\x02"
    assert version_3 in der
    encoded = base64.b64encode(der.replace(version_3, version_3[:-1] + b"\x03", 1)).decode()
    return f"-----BEGIN CERTIFICATE-----\n{encoded}\n-----END CERTIFICATE-----\n"


LIES: dict[str, Callable[[Data], Data | None]] = {
    "not PEM": lambda _: {"certificate": "hello"},
    "PEM of nothing": lambda _: {"certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
    "of version 4": lambda honest: honest | {"certificate": of_version_4(honest["certificate"])},
    "a chain that is no PEM": lambda honest: honest | {"ca_chain": ["hello"]},
    "a chain of a hundred": lambda honest: honest | {"ca_chain": honest["ca_chain"] * 50},
    "no chain": lambda honest: honest | {"ca_chain": []},
    "another type": lambda _: {"certificate": 7},
    "other fields": lambda _: {"username": "x"},
    "nothing": lambda _: None,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_an_answer_that_is_no_chain_is_refused(
    engines: FakeEngines, issuer: X509Issuer, lie: Callable[[Data], Data | None]
) -> None:
    engines.tell("pki/sign/self", lie)
    with pytest.raises(VaultBadReplyError):
        await issuer.issue(BILLING, GRANT, NOW)


async def test_a_signer_whose_spiffe_id_is_a_workloads_is_refused(engines: FakeEngines, issuer: X509Issuer) -> None:
    engines.pki.signer = engines.pki.root.below(ca_form("x", now=NOW.wall, spiffe_id="spiffe://example.org/admin"))
    with pytest.raises(VaultBadReplyError, match="has no path"):
        await issuer.issue(BILLING, GRANT, NOW)


# -- the bundle -----------------------------------------------------------------------------------------------------


def new_root(engines: FakeEngines, name: str = "new root") -> Authority:
    """Another root with an intermediate that signs from now on; what the mount publishes stays as it was."""
    root = Authority.root(ca_form(name, now=NOW.wall))
    engines.pki.root, engines.pki.signer = root, root.below(ca_form("new intermediate", now=NOW.wall))
    return root


async def test_a_chain_to_a_root_that_only_its_own_answer_has_is_refused(
    engines: FakeEngines, issuer: X509Issuer
) -> None:
    new_root(engines)
    with pytest.raises(VaultBadReplyError, match="root that its mount publishes"):
        await issuer.issue(BILLING, GRANT, NOW)


async def test_the_bundle_is_read_once_for_many_certificates(engines: FakeEngines, issuer: X509Issuer) -> None:
    await asyncio.gather(*(issuer.issue(BILLING, GRANT, NOW) for _ in range(5)))
    assert engines.asked_for("LIST pki/issuers") == [NOBODY]


async def test_a_bundle_older_than_five_minutes_is_read_again(engines: FakeEngines, issuer: X509Issuer) -> None:
    await issuer.issue(BILLING, GRANT, NOW)
    await issuer.issue(BILLING, GRANT, instant(299))
    assert len(engines.asked_for("LIST pki/issuers")) == 1
    await issuer.issue(BILLING, GRANT, instant(300))
    assert len(engines.asked_for("LIST pki/issuers")) == 2


async def test_a_root_that_is_added_before_it_signs_is_followed(engines: FakeEngines, issuer: X509Issuer) -> None:
    """The way to replace a root: publish the new one, let it sign, then take the old one away."""
    old = engines.pki.root
    await issuer.issue(BILLING, GRANT, NOW)
    new = new_root(engines)
    engines.pki.issuers["bbbb-1"] = [engines.pki.signer, new]
    both = await issuer.issue(BILLING, GRANT, instant(10))
    assert set(certificates(both.values["bundle"].reveal())) == {old.certificate, new.certificate}

    engines.pki.issuers = {"bbbb-1": [engines.pki.signer, new]}
    alone = await issuer.issue(BILLING, GRANT, instant(400))
    assert certificates(alone.values["bundle"].reveal()) == [new.certificate]


async def test_a_mount_that_lost_every_root_it_had_is_refused(engines: FakeEngines, issuer: X509Issuer) -> None:
    await issuer.issue(BILLING, GRANT, NOW)
    new = new_root(engines)
    engines.pki.issuers = {"cccc-1": [engines.pki.signer, new]}
    for later in (10.0, 400.0):
        with pytest.raises(VaultBadReplyError, match="none of the roots it had before: restart the agent"):
            await issuer.issue(BILLING, GRANT, instant(later))


async def test_a_mount_without_a_self_signed_root_says_what_to_do(engines: FakeEngines, issuer: X509Issuer) -> None:
    engines.pki.issuers = {"aaaa-1": [engines.pki.signer]}
    with pytest.raises(VaultBadReplyError, match="import the root's certificate"):
        await issuer.issue(BILLING, GRANT, NOW)


async def test_a_mount_with_more_issuers_than_any_sound_one_is_refused(
    engines: FakeEngines, issuer: X509Issuer
) -> None:
    engines.tell("pki/issuers", {"keys": ["aaaa-1"] * 65})
    with pytest.raises(VaultBadReplyError, match="more than 64"):
        await issuer.issue(BILLING, GRANT, NOW)


@pytest.mark.parametrize("issuer_id", ["../../sys/seal", "a/b", "", "a\n"])
async def test_an_issuer_whose_id_leads_elsewhere_is_not_asked_for(
    engines: FakeEngines, issuer: X509Issuer, issuer_id: str
) -> None:
    engines.tell("pki/issuers", {"keys": [issuer_id]})
    with pytest.raises(VaultBadReplyError):
        await issuer.issue(BILLING, GRANT, NOW)
    assert not [what for _, what in engines.asked if what.startswith("GET")]
