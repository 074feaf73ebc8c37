"""Each rule of an X509-SVID and of a JWT-SVID: a document that keeps all is served, one that breaks one is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.fakes.authority import BOTH, AnyKey, Authority, Form, ca_form, ec_key, leaf_form, rsa_key, uri
from tokenward.core.identity import SpiffeId
from tokenward.core.svid import JWT_ALGORITHMS, Rule, is_root, jwt_faults, leaf_faults, path_to_root, signer_faults

NOW = 1_800_000_000.0
ID = SpiffeId.parse("spiffe://example.org/billing")
KEY = ec_key()
SOUND = leaf_form(str(ID), now=NOW)
ROOT = Authority.root(ca_form("root", now=NOW))
INTERMEDIATE = ROOT.below(ca_form("intermediate", now=NOW).but(path_length=0))


def faults_of(leaf: x509.Certificate, *, ttl_s: float = 3600.0, now: float = NOW) -> tuple[Rule, ...]:
    return leaf_faults(leaf, spiffe_id=ID, public_key=KEY.public_key(), ttl_s=ttl_s, now_wall=now)


# -- the leaf -------------------------------------------------------------------------------------------------------

SERVED: dict[str, Form] = {
    "as the vault makes it": SOUND,
    "without basic constraints": SOUND.but(ca=None),
    "without extended key usage": SOUND.but(purposes=None),
    "with a further extended key usage": SOUND.but(purposes=(*BOTH, ExtendedKeyUsageOID.CODE_SIGNING)),
    "with key encipherment and agreement": SOUND.but(usages=("digital_signature", "key_encipherment", "key_agreement")),
    "for less than was asked": SOUND.but(ends=NOW + 60),
    "begun just now": SOUND.but(begins=NOW),
    "begun as early as is allowed": SOUND.but(begins=NOW - 60),
}

REFUSED: dict[str, tuple[Form, set[Rule]]] = {
    "no name at all": (SOUND.but(names=()), {Rule.ONE_URI}),
    "two URI names, ours among them": (
        SOUND.but(names=(uri(str(ID)), uri("spiffe://example.org/admin"))),
        {Rule.ONE_URI},
    ),
    "our URI twice": (SOUND.but(names=(uri(str(ID)), uri(str(ID)))), {Rule.ONE_URI}),
    "another workload": (SOUND.but(names=(uri("spiffe://example.org/admin"),)), {Rule.SPIFFE_ID}),
    "another trust domain": (SOUND.but(names=(uri("spiffe://example.com/billing"),)), {Rule.SPIFFE_ID}),
    "another case of the path": (SOUND.but(names=(uri("spiffe://example.org/Billing"),)), {Rule.SPIFFE_ID}),
    "a longer path": (SOUND.but(names=(uri(f"{ID}/admin"),)), {Rule.SPIFFE_ID}),
    "a DNS name besides": (SOUND.but(names=(uri(str(ID)), x509.DNSName("bank.example"))), {Rule.NO_OTHER_NAME}),
    "a common name": (SOUND.but(common_name="admin"), {Rule.NO_OTHER_NAME}),
    "an uncritical name below an empty subject": (SOUND.but(names_critical=False), {Rule.CRITICAL_NAME}),
    "a CA certificate": (SOUND.but(ca=True), {Rule.NOT_A_CA}),
    "no key usage": (SOUND.but(usages=None), {Rule.KEY_USAGE}),
    "an uncritical key usage": (SOUND.but(usages_critical=False), {Rule.KEY_USAGE}),
    "no digital signature": (SOUND.but(usages=("key_encipherment",)), {Rule.DIGITAL_SIGNATURE}),
    "signs certificates": (SOUND.but(usages=("digital_signature", "key_cert_sign")), {Rule.NO_SIGNING_OF_OTHERS}),
    "signs revocation lists": (SOUND.but(usages=("digital_signature", "crl_sign")), {Rule.NO_SIGNING_OF_OTHERS}),
    "for servers alone": (SOUND.but(purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)), {Rule.EXTENDED_KEY_USAGE}),
    "for clients alone": (SOUND.but(purposes=(ExtendedKeyUsageOID.CLIENT_AUTH,)), {Rule.EXTENDED_KEY_USAGE}),
    "begins in a second": (SOUND.but(begins=NOW + 1), {Rule.NOT_YET}),
    "ends at this second": (SOUND.but(ends=NOW), {Rule.EXPIRED}),
    "ends long after what was asked": (SOUND.but(ends=NOW + 86_400), {Rule.LIFETIME}),
    "begun a second too early": (SOUND.but(begins=NOW - 61), {Rule.LIFETIME}),
    "wrong in two ways": (SOUND.but(ca=True, ends=NOW), {Rule.NOT_A_CA, Rule.EXPIRED}),
}


@pytest.mark.parametrize("form", SERVED.values(), ids=SERVED)
def test_a_sound_leaf_is_served(form: Form) -> None:
    assert faults_of(INTERMEDIATE.sign(form, KEY.public_key())) == ()


@pytest.mark.parametrize(("form", "broken"), REFUSED.values(), ids=REFUSED)
def test_a_leaf_that_breaks_a_rule_is_told_by_exactly_that_rule(form: Form, broken: set[Rule]) -> None:
    faults = faults_of(INTERMEDIATE.sign(form, KEY.public_key()))
    assert set(faults) == broken
    assert len(faults) == len(broken)


def test_a_leaf_for_a_key_that_is_not_ours_is_refused() -> None:
    assert faults_of(INTERMEDIATE.sign(SOUND, ec_key().public_key())) == (Rule.OUR_KEY,)
    assert faults_of(INTERMEDIATE.sign(SOUND, rsa_key().public_key())) == (Rule.OUR_KEY,)


def test_a_leaf_whose_extensions_cannot_be_read_is_refused() -> None:
    whole = INTERMEDIATE.sign(SOUND, KEY.public_key()).public_bytes(serialization.Encoding.DER)
    key_usage = bytes.fromhex("0603551d0f0101ff040403020780")
    assert key_usage in whole
    broken = whole.replace(key_usage, key_usage[:-4] + b"\x05\x02\x07\x80")  # a NULL where a BIT STRING belongs
    assert faults_of(x509.load_der_x509_certificate(broken)) == (Rule.READABLE,)


def test_the_lifetime_is_judged_by_what_was_asked_for() -> None:
    leaf = INTERMEDIATE.sign(SOUND, KEY.public_key())
    assert faults_of(leaf, ttl_s=600) == (Rule.LIFETIME,)


def test_the_time_is_the_one_that_is_given() -> None:
    leaf = INTERMEDIATE.sign(SOUND, KEY.public_key())
    assert faults_of(leaf, now=NOW + 3599.9) == ()
    assert faults_of(leaf, now=NOW + 3600) == (Rule.EXPIRED,)
    assert faults_of(leaf, now=NOW - 31) == (Rule.NOT_YET,)


def test_no_rule_of_x509_is_without_a_leaf_that_breaks_it() -> None:
    told = {rule for _, broken in REFUSED.values() for rule in broken} | {Rule.OUR_KEY, Rule.READABLE}
    others = {Rule.PATH, Rule.SIGNER_ID, Rule.ALGORITHM, Rule.HEADER, Rule.SUBJECT, Rule.AUDIENCE, Rule.TIMES}
    assert told | others == set(Rule)


# -- the path -------------------------------------------------------------------------------------------------------


def path_of(
    signer: Authority, *intermediates: Authority, roots: tuple[Authority, ...] = (ROOT,), now: float = NOW
) -> tuple[x509.Certificate, ...]:
    leaf = signer.sign(SOUND, KEY.public_key())
    return path_to_root(
        leaf, [each.certificate for each in intermediates], [each.certificate for each in roots], now_wall=now
    )


def test_the_path_goes_from_the_leaf_to_the_root_in_order() -> None:
    found = path_of(INTERMEDIATE, INTERMEDIATE)
    assert found[1:] == (INTERMEDIATE.certificate, ROOT.certificate)
    assert found[0].public_key() == KEY.public_key()


def test_what_is_not_on_the_path_is_left_out() -> None:
    stranger = Authority.root(ca_form("stranger", now=NOW))
    assert path_of(INTERMEDIATE, ROOT, stranger, INTERMEDIATE)[1:] == (INTERMEDIATE.certificate, ROOT.certificate)


@pytest.mark.parametrize("make", [ec_key, lambda: ec_key(ec.SECP384R1()), rsa_key], ids=["P-256", "P-384", "RSA-2048"])
def test_a_path_of_any_usual_kind_of_key_is_found(make: Callable[[], AnyKey]) -> None:
    root = Authority.root(ca_form("root", now=NOW), make())
    middle = root.below(ca_form("middle", now=NOW), make())
    assert len(path_of(middle, middle, roots=(root,))) == 3


def test_a_leaf_signed_by_the_root_itself_has_a_path() -> None:
    assert path_of(ROOT)[1:] == (ROOT.certificate,)


def test_a_leaf_without_extended_key_usage_has_a_path() -> None:
    leaf = ROOT.sign(SOUND.but(purposes=None), KEY.public_key())
    assert path_to_root(leaf, [], [ROOT.certificate], now_wall=NOW)


def test_there_is_no_path_without_a_root() -> None:
    assert path_of(INTERMEDIATE, INTERMEDIATE, roots=()) == ()


def test_there_is_no_path_to_a_foreign_root_of_the_same_name() -> None:
    foreign = Authority.root(ca_form("root", now=NOW))
    assert path_of(INTERMEDIATE, INTERMEDIATE, foreign, roots=(foreign,)) == ()


def test_a_root_that_only_the_answer_has_ends_no_path() -> None:
    foreign = Authority.root(ca_form("foreign", now=NOW))
    middle = foreign.below(ca_form("middle", now=NOW))
    assert path_of(middle, middle, foreign) == ()


def test_there_is_no_path_without_its_intermediate() -> None:
    assert path_of(INTERMEDIATE) == ()


BROKEN_SIGNERS: dict[str, Form] = {
    "not a CA": ca_form("broken", now=NOW).but(ca=False),
    "no basic constraints": ca_form("broken", now=NOW).but(ca=None),
    "no right to sign certificates": ca_form("broken", now=NOW).but(usages=("digital_signature", "crl_sign")),
    "no key usage": ca_form("broken", now=NOW).but(usages=None),
    "expired": ca_form("broken", now=NOW).but(ends=NOW - 1),
    "not yet valid": ca_form("broken", now=NOW).but(begins=NOW + 10),
    "an extension that is critical and unknown": ca_form("broken", now=NOW).but(
        more={x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"): True}
    ),
}


@pytest.mark.parametrize("form", BROKEN_SIGNERS.values(), ids=BROKEN_SIGNERS)
def test_there_is_no_path_through_a_signer_that_may_not_sign(form: Form) -> None:
    broken = ROOT.below(form)
    assert path_of(broken, broken) == ()


def test_there_is_no_path_to_a_root_that_has_expired() -> None:
    root = Authority.root(ca_form("root", now=NOW).but(ends=NOW - 1))
    assert path_of(root, roots=(root,)) == ()


def test_there_is_no_path_longer_than_a_signer_allows() -> None:
    below = INTERMEDIATE.below(ca_form("below", now=NOW))
    assert path_of(below, below, INTERMEDIATE) == ()
    allowed = ROOT.below(ca_form("allowed", now=NOW).but(path_length=1)).below(ca_form("below", now=NOW))
    assert path_of(allowed, allowed) == ()


def test_there_is_no_path_over_a_signature_by_another_key() -> None:
    forged = Authority(INTERMEDIATE.certificate, ec_key())
    assert path_of(forged, INTERMEDIATE) == ()


def test_the_path_is_judged_at_the_time_that_is_given() -> None:
    assert path_of(INTERMEDIATE, INTERMEDIATE, now=NOW + 4000) == ()


def test_a_leaf_with_an_unknown_critical_extension_has_no_path() -> None:
    unknown = {x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"): True}
    leaf = ROOT.sign(SOUND.but(more=unknown), KEY.public_key())
    assert path_to_root(leaf, [], [ROOT.certificate], now_wall=NOW) == ()


@pytest.mark.parametrize("spiffe_id", ["spiffe://example.org/ca", "SPIFFE://example.org/ca", "spiffe://example.org/"])
def test_a_signer_whose_spiffe_id_has_a_path_is_told(spiffe_id: str) -> None:
    workload = ROOT.below(ca_form("workload", now=NOW, spiffe_id=spiffe_id))
    assert signer_faults([workload.certificate, ROOT.certificate]) == (Rule.SIGNER_ID,)


@pytest.mark.parametrize("names", [(), (uri("spiffe://example.org"),), (uri("https://pki.example/ca"),)])
def test_a_signer_without_a_path_in_its_spiffe_id_is_fine(names: tuple[x509.GeneralName, ...]) -> None:
    signer = ROOT.below(ca_form("signer", now=NOW).but(names=names))
    assert signer_faults([signer.certificate]) == ()


# -- roots ----------------------------------------------------------------------------------------------------------


def test_a_root_is_a_ca_certificate_that_signed_itself() -> None:
    assert is_root(ROOT.certificate)
    assert is_root(Authority.root(ca_form("rsa", now=NOW), rsa_key()).certificate)


def test_an_intermediate_is_no_root() -> None:
    assert not is_root(INTERMEDIATE.certificate)


def test_a_certificate_that_signed_itself_but_is_no_ca_is_no_root() -> None:
    assert not is_root(Authority.root(ca_form("self", now=NOW).but(ca=False)).certificate)
    assert not is_root(Authority.root(ca_form("self", now=NOW).but(ca=None)).certificate)


def test_a_certificate_of_the_roots_name_signed_by_another_key_is_no_root() -> None:
    impostor = Authority(ROOT.certificate, ec_key()).below(ca_form("root", now=NOW))
    assert impostor.certificate.subject == impostor.certificate.issuer
    assert not is_root(impostor.certificate)


# -- JWT-SVID -------------------------------------------------------------------------------------------------------

AUDIENCE = "https://api.partner.example"
HEADER: dict[str, object] = {"alg": "ES256", "kid": "jwt-v1", "typ": "JWT"}
CLAIMS: dict[str, object] = {
    "iss": "https://agent.example.org",
    "sub": str(ID),
    "aud": [AUDIENCE],
    "iat": int(NOW),
    "nbf": int(NOW) - 30,
    "exp": int(NOW) + 300,
    "jti": "x",
}


def jwt_faults_of(header: Mapping[str, object], claims: Mapping[str, object], algorithm: str = "ES256") -> set[Rule]:
    told = jwt_faults(header, claims, spiffe_id=ID, audience=AUDIENCE, algorithm=algorithm, ttl_s=300.0, now_wall=NOW)
    assert len(set(told)) == len(told)
    return set(told)


def without(fields: dict[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize("algorithm", sorted(JWT_ALGORITHMS))
def test_a_sound_token_is_served(algorithm: str) -> None:
    assert jwt_faults_of(HEADER | {"alg": algorithm}, CLAIMS, algorithm) == set()


HEADERS: dict[str, tuple[dict[str, object], Rule]] = {
    "another algorithm": (HEADER | {"alg": "RS256"}, Rule.ALGORITHM),
    "no algorithm": (without(HEADER, "alg") | {"x": 1}, Rule.ALGORITHM),
    "no kid": (without(HEADER, "kid"), Rule.HEADER),
    "an empty kid": (HEADER | {"kid": ""}, Rule.HEADER),
    "another typ": (HEADER | {"typ": "at+jwt"}, Rule.HEADER),
    "a further header": (HEADER | {"jku": "https://evil.example"}, Rule.HEADER),
    "a critical header": (HEADER | {"crit": ["b64"]}, Rule.HEADER),
}


@pytest.mark.parametrize(("header", "broken"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_breaks_a_rule_is_told(header: dict[str, object], broken: Rule) -> None:
    assert broken in jwt_faults_of(header, CLAIMS)
    assert jwt_faults_of(header, CLAIMS) <= {Rule.ALGORITHM, Rule.HEADER}


@pytest.mark.parametrize("algorithm", ["none", "HS256", "EdDSA", ""])
def test_an_algorithm_that_the_standard_does_not_allow_is_told_even_if_it_was_asked_for(algorithm: str) -> None:
    assert jwt_faults_of(HEADER | {"alg": algorithm}, CLAIMS, algorithm) == {Rule.ALGORITHM}


REFUSED_CLAIMS: dict[str, tuple[dict[str, object], Rule]] = {
    "another subject": (CLAIMS | {"sub": "spiffe://example.org/admin"}, Rule.SUBJECT),
    "no subject": (without(CLAIMS, "sub"), Rule.SUBJECT),
    "another audience": (CLAIMS | {"aud": ["https://bank.example"]}, Rule.AUDIENCE),
    "a second audience": (CLAIMS | {"aud": [AUDIENCE, "https://bank.example"]}, Rule.AUDIENCE),
    "no audience": (without(CLAIMS, "aud"), Rule.AUDIENCE),
    "an empty audience": (CLAIMS | {"aud": []}, Rule.AUDIENCE),
    "no expiry": (without(CLAIMS, "exp"), Rule.TIMES),
    "no issue time": (without(CLAIMS, "iat"), Rule.TIMES),
    "no begin": (without(CLAIMS, "nbf"), Rule.TIMES),
    "an expiry in words": (CLAIMS | {"exp": str(int(NOW) + 300)}, Rule.TIMES),
    "an expiry that is a flag": (CLAIMS | {"exp": True}, Rule.TIMES),
    "expires at this second": (CLAIMS | {"exp": int(NOW)}, Rule.EXPIRED),
    "begins in a second": (CLAIMS | {"nbf": int(NOW) + 1}, Rule.NOT_YET),
    "issued in a second": (CLAIMS | {"iat": int(NOW) + 1}, Rule.NOT_YET),
    "lives too long": (CLAIMS | {"exp": int(NOW) + 331}, Rule.LIFETIME),
}


@pytest.mark.parametrize(("claims", "broken"), REFUSED_CLAIMS.values(), ids=REFUSED_CLAIMS)
def test_claims_that_break_a_rule_are_told_by_exactly_that_rule(claims: dict[str, object], broken: Rule) -> None:
    assert jwt_faults_of(HEADER, claims) == {broken}
