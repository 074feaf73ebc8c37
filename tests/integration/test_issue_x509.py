"""X509-SVIDs signed by a real OpenBao, used by OpenSSL for a real mutual TLS connection."""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from tests.issuing import Agent, agent_at, now
from tests.openbao import Bao
from tokenward.core.identity import SpiffeId
from tokenward.core.model import Issued, X509Grant
from tokenward.errors import Reason, VaultBadReplyError, VaultDeniedError
from tokenward.issuers.x509 import X509Issuer

GRANT = X509Grant(name="svid", path="pki/sign/svid", ttl_s=600)
BELOW = X509Grant(name="svid", path="below/sign/svid", ttl_s=600)


def issuer_of(agent: Agent) -> X509Issuer:
    return X509Issuer(client=agent.client, exchange=agent.exchange)


def certificates(issued: Issued, value: str) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(issued.values[value].reveal().encode())


async def put_below_another(agent: Agent) -> x509.Certificate:
    """Replaces the root of the mount `below` by an intermediate under a root elsewhere, and returns that root."""
    uri = "spiffe://example.org"
    await agent.admin("POST", "sys/mounts/above", {"type": "pki", "config": {"max_lease_ttl": "87600h"}})
    root = await agent.admin(
        "POST",
        "above/root/generate/internal",
        {"common_name": "above", "key_type": "ec", "uri_sans": uri, "ttl": "9000h"},
    )
    await agent.admin("DELETE", "below/root")
    asked = await agent.admin(
        "POST", "below/intermediate/generate/internal", {"common_name": "below", "key_type": "ec", "uri_sans": uri}
    )
    signed = await agent.admin(
        "POST",
        "above/root/sign-intermediate",
        {"csr": asked["csr"], "ttl": "8000h", "uri_sans": uri, "common_name": "below", "max_path_length": 0},
    )
    chain = signed["certificate"] + "\n" + root["certificate"]
    made = await agent.admin("POST", "below/intermediate/set-signed", {"certificate": chain})
    ours = next(issuer for issuer, key in made["mapping"].items() if key)
    await agent.admin("POST", "below/root/replace", {"default": ours})
    return x509.load_pem_x509_certificate(root["certificate"].encode())


def contexts(issued: Issued, directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's, both of this identity and trusting its bundle alone."""
    held = directory / "svid.pem"
    held.write_text(issued.values["certificate_chain"].reveal() + issued.values["private_key"].reveal())
    made = []
    for side in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(side)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(held)
        context.load_verify_locations(cadata=issued.values["bundle"].reveal())
        made.append(context)
    return made[0], made[1]


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """A whole mutual TLS handshake in memory. Raises ssl.SSLError when a side does not trust the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(10):
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                continue
        if not sides:
            return
    raise AssertionError("the handshake does not end")


async def test_an_svid_of_the_root_is_trusted_by_openssl_on_both_sides(fresh_bao: Bao, tmp_path: Path) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        issued = await issuer_of(agent).issue(agent.workload, GRANT, now())
    assert len(certificates(issued, "certificate_chain")) == 1
    shake_hands(*contexts(issued, tmp_path))


async def test_an_svid_of_an_intermediate_carries_it_and_is_trusted(fresh_bao: Bao, tmp_path: Path) -> None:
    async with agent_at(fresh_bao, BELOW) as agent:
        root = await put_below_another(agent)
        issued = await issuer_of(agent).issue(agent.workload, BELOW, now())
    assert len(certificates(issued, "certificate_chain")) == 2
    assert certificates(issued, "bundle") == [root]
    shake_hands(*contexts(issued, tmp_path))


async def test_svids_of_two_trust_domains_do_not_trust_each_other(bao: Bao, fresh_bao: Bao, tmp_path: Path) -> None:
    made = []
    for number, server in enumerate((bao, fresh_bao)):
        async with agent_at(server, GRANT) as agent:
            (tmp_path / str(number)).mkdir()
            issued = await issuer_of(agent).issue(agent.workload, GRANT, now())
            made.append(contexts(issued, tmp_path / str(number)))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(made[0][0], made[1][1])


async def test_no_vault_token_is_made_for_it(fresh_bao: Bao) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        issued = await issuer_of(agent).issue(agent.workload, GRANT, now())
    assert issued.lease is None
    assert issued.exchanged is not None
    assert issued.exchanged.accessor == ""
    assert [seen["path"] for seen in fresh_bao.requests() if seen["id"] == issued.vault_request_id] == ["pki/sign/svid"]


async def test_the_vault_itself_signs_for_no_other_workload(fresh_bao: Bao) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        admin = dataclasses.replace(agent.workload, spiffe_id=SpiffeId.of("example.org", "/admin"))
        with pytest.raises(VaultDeniedError) as caught:
            await issuer_of(agent).issue(admin, GRANT, now())
    assert caught.value.reason is Reason.LOGIN_FAILED


ROLES: dict[str, tuple[dict[str, object], str]] = {
    "clients alone": ({"server_flag": False}, "both TLS servers and TLS clients"),
    "no key usage": ({"key_usage": []}, "critical key usage"),
    "a longer life": ({"not_before_duration": "10m"}, "live longer"),
}


@pytest.mark.parametrize(("change", "said"), ROLES.values(), ids=ROLES)
async def test_a_role_that_makes_no_svids_is_told_by_the_rule(
    fresh_bao: Bao, change: dict[str, object], said: str
) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        role = await agent.admin("GET", "pki/roles/svid")
        await agent.admin("POST", "pki/roles/svid", role | change)
        with pytest.raises(VaultBadReplyError, match=said):
            await issuer_of(agent).issue(agent.workload, GRANT, now())


async def test_a_new_root_beside_the_old_one_is_followed(fresh_bao: Bao) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        issuer = issuer_of(agent)
        before = await issuer.issue(agent.workload, GRANT, now())
        made = await agent.admin(
            "POST", "pki/root/generate/internal", {"common_name": "new", "key_type": "ec", "ttl": "9000h"}
        )
        await agent.admin("POST", "pki/root/replace", {"default": made["issuer_id"]})
        after = await issuer.issue(agent.workload, GRANT, now())
    new = x509.load_pem_x509_certificate(made["certificate"].encode())
    assert set(certificates(after, "bundle")) == {*certificates(before, "bundle"), new}
    assert certificates(after, "certificate_chain")[-1].issuer == new.subject


async def test_a_mount_made_anew_is_refused_until_the_agent_starts_again(fresh_bao: Bao) -> None:
    async with agent_at(fresh_bao, GRANT) as agent:
        issuer = issuer_of(agent)
        await issuer.issue(agent.workload, GRANT, now())
        role = await agent.admin("GET", "pki/roles/svid")
        await agent.admin("DELETE", "sys/mounts/pki")
        await agent.admin("POST", "sys/mounts/pki", {"type": "pki", "config": {"max_lease_ttl": "87600h"}})
        await agent.admin("POST", "pki/root/generate/internal", {"common_name": "x", "key_type": "ec", "ttl": "9000h"})
        await agent.admin("POST", "pki/roles/svid", role)
        with pytest.raises(VaultBadReplyError, match="restart the agent"):
            await issuer.issue(agent.workload, GRANT, now())
        await issuer_of(agent).issue(agent.workload, GRANT, now())
