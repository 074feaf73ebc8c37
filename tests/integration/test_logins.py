"""Every login method of `[vault.login]` against a real OpenBao."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.fakes import token_review
from tests.fakes.authority import ec_key, pem
from tests.fakes.token_review import Cluster
from tests.integration.test_vault_client import set_up_jwt
from tests.integration.tls_bao import TlsBao, now, running
from tokenward.config import AppRoleLogin, CertLogin, JwtLogin, KubernetesLogin, Login, TokenLogin
from tokenward.core.model import Instant
from tokenward.errors import Reason, VaultDeniedError, VaultUnavailableError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.connections import TlsFiles
from tokenward.vault.keeper import NoData
from tokenward.vault.login import AgentSession
from tokenward.vault.reply import decode
from tokenward.vault.signer import Signer
from tokenward.vault.transport import Answer, Transport

SUBJECT = "spiffe://example.org/app"


@pytest.fixture(scope="module")
def bao() -> Iterator[TlsBao]:
    with running() as made:
        yield made


@pytest.fixture
async def client(bao: TlsBao) -> AsyncIterator[VaultClient]:
    made = VaultClient(addresses=[bao.tls_address], ca_file=bao.ca_file, timeout_s=10.0)
    yield made
    await made.close()


async def seen_of(session: AgentSession) -> tuple[str, list[str]]:
    """The auth path by which the session's token was made, and its policies."""
    reply, _ = await session.call(VaultRequest("GET", "auth/token/lookup-self"), into=NoData, now=now())
    found = reply.require_data()
    return found["path"], found["policies"]


async def refusal(client: VaultClient, login: Login) -> VaultDeniedError:
    with pytest.raises(VaultDeniedError) as caught:
        await AgentSession(client=client, login=login).token(now())
    assert caught.value.reason is Reason.LOGIN_FAILED
    return caught.value


def later(by_s: float) -> Instant:
    """An instant that has not come yet, so that a token looks due or over to us and not to the vault."""
    current = now()
    return Instant(current.wall + by_s, current.mono + by_s)


class TestJwt:
    async def test_a_jwt_that_the_agent_signs_itself(self, bao: TlsBao, client: VaultClient) -> None:
        signer = Signer.generate(issuer="https://agent.example.org")
        await set_up_jwt(bao, signer, "jwt-self")
        login = JwtLogin(role="app", mount="jwt-self")
        session = AgentSession(client=client, login=login, signer=signer, subject=SUBJECT, audience="openbao")
        assert await seen_of(session) == ("auth/jwt-self/login", ["default", "reader"])
        stranger = Signer.generate(issuer="https://agent.example.org")
        other = AgentSession(client=client, login=login, signer=stranger, subject=SUBJECT, audience="openbao")
        with pytest.raises(VaultDeniedError, match="does not know the key"):
            await other.token(now())

    async def test_a_jwt_of_the_platform_from_a_file(self, bao: TlsBao, client: VaultClient, tmp_path: Path) -> None:
        """A projected service account token, verified by the cluster's key: no API server is asked."""
        cluster = Cluster()
        await bao.admin("POST", "sys/auth/jwt-file", {"type": "jwt"})
        public = public_pem(cluster)
        config = {"jwt_validation_pubkeys": [public], "bound_issuer": token_review.ISSUER}
        await bao.admin("POST", "auth/jwt-file/config", config)
        role = {
            "role_type": "jwt",
            "user_claim": "sub",
            "bound_audiences": ["openbao"],
            "bound_claims": {"/kubernetes.io/namespace": "prod"},
            "token_policies": ["reader"],
        }
        await bao.admin("POST", "auth/jwt-file/role/agent", role)
        file = tmp_path / "token"
        login = JwtLogin(role="agent", mount="jwt-file", token_file=str(file))
        file.write_text(cluster.token(namespace="prod", account="agent") + "\n")
        assert await seen_of(AgentSession(client=client, login=login)) == (
            "auth/jwt-file/login",
            ["default", "reader"],
        )
        file.write_text(cluster.token(namespace="staging", account="agent"))
        assert "binds other claims" in (await refusal(client, login)).public
        file.write_text(cluster.token(namespace="prod", account="agent", audience="else"))
        assert "bound_audiences" in (await refusal(client, login)).public


def public_pem(cluster: Cluster) -> str:
    """The cluster's public key in PEM, as an operator copies it from the API server."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return cluster.key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


class TestKubernetes:
    @pytest.fixture
    def cluster(self, bao: TlsBao) -> Iterator[Cluster]:
        """An API server with a certificate of the same CA as the vault's."""
        with token_review.serving(
            Cluster(), cert_file=f"{bao.directory}/server.pem", key_file=f"{bao.directory}/server.key"
        ) as made:
            yield made

    @pytest.fixture
    async def login(self, bao: TlsBao, cluster: Cluster, tmp_path: Path) -> KubernetesLogin:
        mount = f"kubernetes-{tmp_path.name}"
        await bao.admin("POST", f"sys/auth/{mount}", {"type": "kubernetes"})
        config = {
            "kubernetes_host": cluster.address,
            "kubernetes_ca_cert": pem(bao.authority.certificate),
            "token_reviewer_jwt": cluster.reviewer,
            "disable_local_ca_jwt": True,
        }
        await bao.admin("POST", f"auth/{mount}/config", config)
        role = {
            "bound_service_account_names": ["agent"],
            "bound_service_account_namespaces": ["prod"],
            "audience": "openbao",
            "token_policies": ["reader"],
        }
        await bao.admin("POST", f"auth/{mount}/role/agent", role)
        return KubernetesLogin(role="agent", mount=mount, token_file=str(tmp_path / "token"))

    async def test_a_service_account_that_the_api_server_knows(
        self, client: VaultClient, cluster: Cluster, login: KubernetesLogin
    ) -> None:
        token = cluster.token(namespace="prod", account="agent")
        Path(login.token_file).write_text(token)
        path, policies = await seen_of(AgentSession(client=client, login=login))
        assert (path, policies) == (f"auth/{login.mount}/login", ["default", "reader"])
        assert cluster.reviewed[-1] == token

    @pytest.mark.parametrize("which", ["another account", "another audience", "a deleted pod", "a forged token"])
    async def test_everybody_else_is_refused(
        self, client: VaultClient, cluster: Cluster, login: KubernetesLogin, which: str
    ) -> None:
        cluster.deleted_pods.add("pod-gone")
        token = {
            "another account": cluster.token(namespace="prod", account="other"),
            "another audience": cluster.token(namespace="prod", account="agent", audience="else"),
            "a deleted pod": cluster.token(namespace="prod", account="agent", pod="pod-gone"),
            "a forged token": forged(cluster.token(namespace="prod", account="agent")),
        }[which]
        Path(login.token_file).write_text(token)
        error = await refusal(client, login)
        assert f"auth/{login.mount}/login" in error.public
        assert token not in error.public


def forged(token: str) -> str:
    """The same claims under another key."""
    claims = jwt.decode(token, options={"verify_signature": False})
    return jwt.encode(claims, ec_key(), algorithm="ES256")


class TestCert:
    async def test_a_client_certificate(self, bao: TlsBao) -> None:
        await bao.admin("POST", "sys/auth/cert", {"type": "cert"})
        role = {
            "certificate": pem(bao.authority.certificate),
            "allowed_uri_sans": ["spiffe://example.org/agent"],
            "token_policies": ["reader"],
        }
        await bao.admin("POST", "auth/cert/certs/agent", role)
        agent = bao.issue(
            "agent", names=(x509.UniformResourceIdentifier("spiffe://example.org/agent"),), common_name="a"
        )
        nameless = bao.issue("nameless", names=(x509.UniformResourceIdentifier("spiffe://example.org/agent"),))
        other = bao.issue(
            "other", names=(x509.UniformResourceIdentifier("spiffe://example.org/other"),), common_name="o"
        )

        for files, expected in [(agent, None), (nameless, "no common name"), (other, "auth/cert/login")]:
            login = CertLogin(role="agent", cert_file=files[0], key_file=files[1])
            client = VaultClient(addresses=[bao.tls_address], ca_file=bao.ca_file, client_cert=files, timeout_s=10.0)
            if expected is None:
                session = AgentSession(client=client, login=login)
                assert await seen_of(session) == ("auth/cert/login", ["default", "reader"])
                first = await session.token(now())
                renewed = await session.token(later(700 * 3600))  # 768 h is the default maximum
                assert renewed.token == first.token
            else:
                assert expected in (await refusal(client, login)).public
            await client.close()


class TestAppRole:
    @pytest.fixture
    async def login(self, bao: TlsBao, tmp_path: Path) -> AppRoleLogin:
        mount = f"approle-{tmp_path.name}"
        await bao.admin("POST", f"sys/auth/{mount}", {"type": "approle"})
        role = {"token_policies": ["reader"], "token_ttl": "5m", "secret_id_ttl": "10m", "secret_id_num_uses": 1}
        await bao.admin("POST", f"auth/{mount}/role/agent", role)
        role_id = (await bao.admin("GET", f"auth/{mount}/role/agent/role-id"))["role_id"]
        return AppRoleLogin(role_id=role_id, mount=mount, wrapped_secret_id_file=str(tmp_path / "wrapped"))

    def deliver(self, bao: TlsBao, login: AppRoleLogin, path: str = "", *, method: str = "POST") -> None:
        """What a deployment pipeline does: asks for a secret id, wrapped, and leaves the wrapping token in the file."""
        path = path or f"auth/{login.mount}/role/agent/secret-id"
        transport = Transport(address=bao.address, tls=TlsFiles(), max_reply_bytes=1 << 16, connections=1)
        headers = {"X-Vault-Token": bao.admin_token.reveal(), "X-Vault-Wrap-TTL": "60s"}
        got = transport.send(method, path, query={}, headers=headers, body=None, timeout_s=10.0)
        transport.close()
        assert isinstance(got, Answer)
        wrap_info = decode(got.body, NoData).wrap_info
        assert wrap_info is not None
        Path(login.wrapped_secret_id_file).write_text(wrap_info.token.reveal())

    async def test_a_wrapped_secret_id_logs_in_once_and_is_not_kept(
        self, bao: TlsBao, client: VaultClient, login: AppRoleLogin
    ) -> None:
        self.deliver(bao, login)
        session = AgentSession(client=client, login=login)
        assert await seen_of(session) == (f"auth/{login.mount}/login", ["default", "reader"])
        session.forget()
        with pytest.raises(VaultDeniedError, match="deliver a new one") as caught:
            await session.token(now())
        assert caught.value.reason is Reason.LOGIN_FAILED
        self.deliver(bao, login)
        assert await session.token(now())

    async def test_a_wrapping_token_that_somebody_else_used_is_told(
        self, bao: TlsBao, client: VaultClient, login: AppRoleLogin
    ) -> None:
        self.deliver(bao, login)
        thief = VaultClient(addresses=[bao.address], timeout_s=10.0)
        stolen = Path(login.wrapped_secret_id_file).read_text()
        await thief.call(
            VaultRequest("POST", "sys/wrapping/unwrap", {"token": stolen}), into=NoData, auth=bao.admin_token
        )
        await thief.close()
        assert "find out who used" in (await refusal(client, login)).public

    async def test_something_else_in_the_wrapping_is_left_unread(
        self, bao: TlsBao, client: VaultClient, login: AppRoleLogin
    ) -> None:
        self.deliver(bao, login, "sys/mounts", method="GET")
        assert "something else than a secret id" in (await refusal(client, login)).public
        paths = [request["path"] for request in bao.requests()]
        assert "sys/wrapping/unwrap" not in paths[-3:]

    async def test_the_token_is_renewed_with_no_new_secret_id(
        self, bao: TlsBao, client: VaultClient, login: AppRoleLogin
    ) -> None:
        self.deliver(bao, login)
        session = AgentSession(client=client, login=login)
        first = await session.token(now())
        renewed = await session.token(later(250))
        assert renewed.token == first.token
        assert renewed is not first


class TestToken:
    async def test_a_token_in_a_file_and_a_missing_one(self, bao: TlsBao, client: VaultClient, tmp_path: Path) -> None:
        file = tmp_path / "token"
        login = TokenLogin(token_file=str(file))
        with pytest.raises(VaultUnavailableError, match="No such file"):
            await AgentSession(client=client, login=login).token(now())
        file.write_text(bao.admin_token.reveal())
        session = AgentSession(client=client, login=login)
        token = await session.token(now())
        assert (token.expires_mono, bool(token.accessor)) == (None, True)
        await session.revoke()
        assert await bao.admin("GET", "auth/token/lookup-self")


class TestSession:
    async def test_many_callers_log_in_once_and_revoking_ends_the_token_at_the_vault(
        self, bao: TlsBao, client: VaultClient
    ) -> None:
        signer = Signer.generate(issuer="https://agent.example.org")
        await set_up_jwt(bao, signer, "jwt-session")
        login = JwtLogin(role="app", mount="jwt-session")
        session = AgentSession(client=client, login=login, signer=signer, subject=SUBJECT, audience="openbao")
        tokens = await asyncio.gather(*(session.token(now()) for _ in range(50)))
        logins = [request for request in bao.requests() if request["path"] == "auth/jwt-session/login"]
        assert len(logins) == 1
        await session.revoke()
        with pytest.raises(VaultDeniedError):
            await client.call(VaultRequest("GET", "auth/token/lookup-self"), into=NoData, auth=tokens[0].token)

    async def test_a_token_revoked_behind_our_back_is_replaced_at_the_next_call(
        self, bao: TlsBao, client: VaultClient
    ) -> None:
        signer = Signer.generate(issuer="https://agent.example.org")
        await set_up_jwt(bao, signer, "jwt-again")
        login = JwtLogin(role="app", mount="jwt-again")
        session = AgentSession(client=client, login=login, signer=signer, subject=SUBJECT, audience="openbao")
        first = await session.token(now())
        await bao.admin("POST", "auth/token/revoke-accessor", {"accessor": first.accessor})
        assert await seen_of(session) == ("auth/jwt-again/login", ["default", "reader"])
        assert (await session.token(now())).accessor != first.accessor
