"""`JwtIssuer` against a transit engine that tells the truth, and against one that does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.fakes.authority import ec_key, rsa_key
from tests.fakes.exchange import AGENT, Data, FakeEngines, FakeExchange, FakePki, FakeTransit
from tests.making import instant, workload
from tokenward.core.model import Instant, Issued, JwtGrant, Policy
from tokenward.errors import DeniedError, Reason, VaultBadReplyError, VaultUnavailableError
from tokenward.issuers.jwt import JwtIssuer
from tokenward.vault.client import VaultRequest

NOW = Instant(1_800_000_000.75, 50.0)
BILLING = workload("billing")
ISSUER = "https://tokenward.example.org"
PARTNER = "https://api.partner.example"
GRANT = JwtGrant(name="partner", path="transit/keys/jwt", audiences=(PARTNER, "https://other.example"))
SIGN = "POST transit/sign/jwt/sha2-256"
READ = "GET transit/keys/jwt"


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines(pki=FakePki(now=NOW.wall))


@pytest.fixture
def issuer(engines: FakeEngines) -> JwtIssuer:
    return JwtIssuer(exchange=FakeExchange(engines), issuer=ISSUER)


def read(issued: Issued, transit: FakeTransit, version: int, *, algorithm: str = "ES256") -> tuple[Data, Data]:
    """Header and claims, as a verifier with the public key of `version` gets them."""
    key: Any = transit.keys[version - 1].public_key()
    options: Any = {"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False}
    found = jwt.decode_complete(issued.values["token"].reveal(), key, algorithms=[algorithm], options=options)
    return found["header"], found["payload"]


async def test_the_token_says_who_for_whom_and_how_long(engines: FakeEngines, issuer: JwtIssuer) -> None:
    header, claims = read(await issuer.issue(BILLING, GRANT, PARTNER, NOW), engines.transit, 1)
    assert header == {"alg": "ES256", "kid": "jwt-v1", "typ": "JWT"}
    jti = claims.pop("jti")
    assert len(jti) >= 22
    assert claims == {
        "iss": ISSUER,
        "sub": "spiffe://example.org/billing",
        "aud": [PARTNER],
        "iat": 1_800_000_000,
        "nbf": 1_800_000_000 - 30,
        "exp": 1_800_000_000 + 300,
    }


async def test_scopes_of_the_grant_are_in_the_token(engines: FakeEngines, issuer: JwtIssuer) -> None:
    scoped = JwtGrant(name="partner", path="transit/keys/jwt", audiences=(PARTNER,), scopes=("a:read", "b:write"))
    _, claims = read(await issuer.issue(BILLING, scoped, PARTNER, NOW), engines.transit, 1)
    assert claims["scope"] == "a:read b:write"


async def test_it_ends_with_its_exp_on_both_clocks(issuer: JwtIssuer) -> None:
    issued = await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    assert issued.wall_bound
    assert issued.expires == Instant(1_800_000_300, 349.25)
    assert issued.issued == NOW


async def test_no_token_lives_longer_than_the_policy_allows(issuer: JwtIssuer) -> None:
    brief = JwtGrant(name="p", path="transit/keys/jwt", audiences=(PARTNER,), policy=Policy(max_ttl_s=60))
    assert (await issuer.issue(BILLING, brief, PARTNER, NOW)).expires.wall == 1_800_000_060


async def test_each_token_has_its_own_jti(engines: FakeEngines, issuer: JwtIssuer) -> None:
    issued = await asyncio.gather(*(issuer.issue(BILLING, GRANT, PARTNER, NOW) for _ in range(5)))
    assert len({read(each, engines.transit, 1)[1]["jti"] for each in issued}) == 5


async def test_an_rsa_key_signs_rs256(engines: FakeEngines, issuer: JwtIssuer) -> None:
    engines.transit = FakeTransit(keys=[rsa_key()], kind="rsa-2048")
    issued = await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    assert read(issued, engines.transit, 1, algorithm="RS256")[0]["alg"] == "RS256"


async def test_the_agent_signs_and_the_workload_is_never_asked_to(engines: FakeEngines, issuer: JwtIssuer) -> None:
    issued = await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    assert engines.asked == [(AGENT, READ), (AGENT, SIGN)]
    assert issued.vault_request_id == "request-2"


@pytest.mark.parametrize("audience", ["https://bank.example", "", PARTNER + "/", PARTNER.upper()])
async def test_an_audience_that_is_not_granted_is_denied_before_the_vault_is_asked(
    engines: FakeEngines, issuer: JwtIssuer, audience: str
) -> None:
    with pytest.raises(DeniedError) as caught:
        await issuer.issue(BILLING, GRANT, audience, NOW)
    assert caught.value.reason is Reason.NOT_GRANTED
    assert engines.asked == []


# -- the key --------------------------------------------------------------------------------------------------------


async def test_the_key_is_read_once_for_many_tokens(engines: FakeEngines, issuer: JwtIssuer) -> None:
    await asyncio.gather(*(issuer.issue(BILLING, GRANT, PARTNER, NOW) for _ in range(5)))
    assert engines.asked_for(READ) == [AGENT]


async def test_a_rotation_is_followed_within_a_minute(engines: FakeEngines, issuer: JwtIssuer) -> None:
    await issuer.issue(BILLING, GRANT, PARTNER, instant(0))
    engines.transit.rotate()
    before = await issuer.issue(BILLING, GRANT, PARTNER, instant(59))
    assert read(before, engines.transit, 1)[0]["kid"] == "jwt-v1"
    after = await issuer.issue(BILLING, GRANT, PARTNER, instant(60))
    assert read(after, engines.transit, 2)[0]["kid"] == "jwt-v2"


async def test_a_version_that_may_sign_no_more_is_replaced_at_once(engines: FakeEngines, issuer: JwtIssuer) -> None:
    await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    engines.transit.rotate()
    engines.transit.oldest = 2
    issued = await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    assert read(issued, engines.transit, 2)[0]["kid"] == "jwt-v2"


async def test_a_key_made_anew_under_the_same_version_is_found_out(engines: FakeEngines, issuer: JwtIssuer) -> None:
    await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    engines.transit.keys = [ec_key()]
    read(await issuer.issue(BILLING, GRANT, PARTNER, NOW), engines.transit, 1)


async def test_a_failure_with_a_key_just_read_is_not_tried_again(engines: FakeEngines, issuer: JwtIssuer) -> None:
    engines.transit.oldest = 9
    with pytest.raises(VaultUnavailableError):
        await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    assert engines.asked_for(SIGN) == [AGENT]


async def test_a_second_failure_is_the_last(engines: FakeEngines, issuer: JwtIssuer) -> None:
    await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    engines.transit.oldest = 9
    with pytest.raises(VaultUnavailableError):
        await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    assert len(engines.asked_for(SIGN)) == 3


ED25519_PEM = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=
-----END PUBLIC KEY-----
"""
KEYS: dict[str, Data] = {
    "symmetric": {"type": "aes256-gcm96", "keys": {"1": 1_700_000_000}},
    "of a type that is no JWT-SVID's": {"type": "ed25519"},
    "without its newest version": {"latest_version": 2},
    "with no public key": {"keys": {"1": {"public_key": ""}}},
    "with something else as public key": {"keys": {"1": {"public_key": "hello"}}},
    "with a public key of another kind": {"keys": {"1": {"public_key": ED25519_PEM}}},
    "without a type": {"type": None},
}


@pytest.mark.parametrize("lie", KEYS.values(), ids=KEYS)
async def test_a_key_that_cannot_sign_is_refused_before_it_does(
    engines: FakeEngines, issuer: JwtIssuer, lie: Data
) -> None:
    engines.tell(READ, lie)
    with pytest.raises(VaultBadReplyError):
        await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    assert engines.asked_for(SIGN) == []


# -- the signature --------------------------------------------------------------------------------------------------


def signature_of(change: Callable[[str], str]) -> Callable[[Data], Data]:
    return lambda honest: {"signature": change(honest["signature"])}


SIGNATURES: dict[str, Callable[[Data], Data | None]] = {
    "of another version": signature_of(lambda text: text.replace("vault:v1:", "vault:v2:")),
    "with another byte": signature_of(lambda text: text[:-6] + ("A" if text[-6] != "A" else "B") + text[-5:]),
    "cut short": signature_of(lambda text: text[:-8]),
    "with padding": signature_of(lambda text: text + "=="),
    "with a line break": signature_of(lambda text: text[:-4] + "\n" + text[-4:]),
    "with a line break at its end": signature_of(lambda text: text + "\n"),
    "with a fourth part": signature_of(lambda text: text + ".e30"),
    "without its version": signature_of(lambda text: text.removeprefix("vault:v1:")),
    "of huge version": signature_of(lambda text: text.replace("v1", "v" + "1" * 30)),
    "empty": signature_of(lambda _: ""),
    "in another field": lambda honest: {"value": honest["signature"]},
    "nothing": lambda _: None,
}


@pytest.mark.parametrize("lie", SIGNATURES.values(), ids=SIGNATURES)
async def test_another_signature_is_refused_and_not_quoted(
    engines: FakeEngines, issuer: JwtIssuer, lie: Callable[[Data], Data | None]
) -> None:
    engines.tell(SIGN, lie)
    with pytest.raises(VaultBadReplyError) as caught:
        await issuer.issue(BILLING, GRANT, PARTNER, NOW)
    assert "vault:v" not in caught.value.public


async def test_a_signature_by_another_key_is_refused(engines: FakeEngines, issuer: JwtIssuer) -> None:
    published, engines.transit = engines.transit.answer(VaultRequest("GET", "transit/keys/jwt")), FakeTransit()
    engines.tell(READ, published)
    with pytest.raises(VaultBadReplyError, match="does not verify with jwt-v1"):
        await issuer.issue(BILLING, GRANT, PARTNER, NOW)


async def test_a_key_of_another_curve_than_its_type_says_is_refused(engines: FakeEngines, issuer: JwtIssuer) -> None:
    engines.transit = FakeTransit(keys=[ec_key(ec.SECP384R1())])
    with pytest.raises(VaultBadReplyError):
        await issuer.issue(BILLING, GRANT, PARTNER, NOW)


async def test_an_rsa_key_that_is_said_to_be_elliptic_is_refused(engines: FakeEngines, issuer: JwtIssuer) -> None:
    engines.transit = FakeTransit(keys=[rsa_key()])
    with pytest.raises(VaultBadReplyError):
        await issuer.issue(BILLING, GRANT, PARTNER, NOW)
