"""The client against a real OpenBao; and, word for word, against the fake one that other tests stand on."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.fakes.vault import FakeVault, serving
from tests.integration.tls_bao import TlsBao, now, running
from tokenward.core.secret import Secret
from tokenward.errors import NotFoundError, Reason, VaultDeniedError, VaultUnavailableError
from tokenward.vault.client import AuthReply, InlineAuth, Refusal, State, VaultClient, VaultRequest, refusal_of
from tokenward.vault.keeper import ROUNDED_UP_S, NoData, renew_token, revoke_token
from tokenward.vault.signer import Signer

READ = VaultRequest("GET", "secret/data/a")
ISSUER = "https://agent.example.org"


class Fields(msgspec.Struct):
    k: Secret


class KvRead(msgspec.Struct):
    data: Fields


class Place(ABC):
    """A vault with the secret `a` (`k` is `v`), a deleted one `gone`, and the JWT role `app` that may read them."""

    address: str

    @abstractmethod
    def jwt(self) -> Secret:
        """A JWT that proves `app`."""

    @abstractmethod
    async def seal(self) -> None: ...


class FakePlace(Place):
    def __init__(self, vault: FakeVault) -> None:
        self._vault = vault
        self.address = vault.address

    def jwt(self) -> Secret:
        return Secret("a.b.c")

    async def seal(self) -> None:
        self._vault.sealed = True


class RealPlace(Place):
    def __init__(self, bao: TlsBao) -> None:
        self._bao = bao
        self._signer = Signer.generate(issuer=ISSUER)
        self.address = bao.address

    async def set_up(self) -> None:
        await self._bao.enable_kv()
        await self._bao.admin("POST", "secret/data/gone", {"data": {"k": "v"}})
        await self._bao.admin("DELETE", "secret/data/gone")
        await set_up_jwt(self._bao, self._signer)

    def jwt(self) -> Secret:
        return self._signer.sign(subject="spiffe://example.org/app", audience="openbao", claims={}, now=now())

    async def seal(self) -> None:
        await self._bao.admin("PUT", "sys/seal", {})


async def set_up_jwt(bao: TlsBao, signer: Signer, mount: str = "jwt") -> None:
    """The role `app` for the workload of that name, with the policy `reader`."""
    await bao.admin("POST", f"sys/auth/{mount}", {"type": "jwt"})
    config = {"jwt_validation_pubkeys": [signer.public_pem()], "bound_issuer": signer.issuer}
    await bao.admin("POST", f"auth/{mount}/config", {**config, "jwt_supported_algs": ["ES256"]})
    role = {
        "role_type": "jwt",
        "user_claim": "sub",
        "bound_subject": "spiffe://example.org/app",
        "bound_audiences": ["openbao"],
        "expiration_leeway": -1,
        "clock_skew_leeway": -1,
        "not_before_leeway": -1,
        "token_policies": ["reader"],
        "token_ttl": "5m",
    }
    await bao.admin("POST", f"auth/{mount}/role/app", role)


@pytest.fixture(params=["fake", "real"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    if request.param == "fake":
        metadata = {"secret/data/a": {"k": "v"}}
        made = FakeVault(secrets=metadata, deleted={"secret/data/gone"}, roles={"app": ("secret/",)})
        with serving(made, socket_path=str(tmp_path / "vault.sock")):
            yield FakePlace(made)
    else:
        with running() as bao:
            real = RealPlace(bao)
            await real.set_up()
            yield real


@pytest.fixture
async def client(place: Place) -> AsyncIterator[VaultClient]:
    made = VaultClient(addresses=[place.address], timeout_s=10.0)
    yield made
    await made.close()


async def log_in(client: VaultClient, place: Place) -> AuthReply:
    request = VaultRequest("POST", "auth/jwt/login", {"role": "app", "jwt": place.jwt()})
    return (await client.call(request, into=NoData)).require_auth()


class TestContract:
    """What every vault does for the agent."""

    async def test_a_login_gives_a_token_that_reads_a_secret(self, client: VaultClient, place: Place) -> None:
        auth = await log_in(client, place)
        assert (auth.lease_duration, auth.renewable) == (300, True)
        reply = await client.call(READ, into=KvRead, auth=auth.client_token)
        assert reply.require_data().data.k == Secret("v")
        assert reply.request_id

    async def test_inline_authentication_reads_without_a_token(self, client: VaultClient, place: Place) -> None:
        inline = InlineAuth("auth/jwt/login", {"role": "app", "jwt": place.jwt()})
        assert (await client.call(READ, into=KvRead, auth=inline)).require_data().data.k == Secret("v")

    async def test_a_role_that_is_not_there(self, client: VaultClient, place: Place) -> None:
        for request, auth in [
            (VaultRequest("POST", "auth/jwt/login", {"role": "none", "jwt": place.jwt()}), None),
            (READ, InlineAuth("auth/jwt/login", {"role": "none", "jwt": place.jwt()})),
        ]:
            with pytest.raises(VaultDeniedError) as caught:
                await client.call(request, into=NoData, auth=auth)
            assert refusal_of(caught.value) is Refusal.LOGIN_ROLE

    async def test_a_secret_that_is_missing_or_deleted(self, client: VaultClient, place: Place) -> None:
        auth = await log_in(client, place)
        for path, refusal in [("secret/data/never", Refusal.NOTHING), ("secret/data/gone", Refusal.DELETED)]:
            with pytest.raises(NotFoundError) as caught:
                await client.call(VaultRequest("GET", path), into=KvRead, auth=auth.client_token)
            assert (caught.value.reason, refusal_of(caught.value)) == (Reason.SECRET_NOT_FOUND, refusal)

    async def test_a_token_without_rights_is_told_from_a_token_that_ended(
        self, client: VaultClient, place: Place
    ) -> None:
        auth = await log_in(client, place)
        for token, path, refusal in [
            (auth.client_token, "elsewhere/data/a", Refusal.POLICY),
            (Secret("s.unknown"), "secret/data/a", Refusal.BAD_TOKEN),
        ]:
            with pytest.raises(VaultDeniedError) as caught:
                await client.call(VaultRequest("GET", path), into=KvRead, auth=token)
            assert (caught.value.reason, refusal_of(caught.value)) == (Reason.VAULT_DENIED, refusal)

    async def test_a_token_is_renewed_and_then_revoked_for_good(self, client: VaultClient, place: Place) -> None:
        token = (await log_in(client, place)).held_from(now())
        sent = now()
        renewed = await renew_token(client, token, now=sent, increment_s=300)
        assert renewed.token == token.token
        assert renewed.expires_mono == sent.mono + 300 - ROUNDED_UP_S
        await revoke_token(client, token)
        await revoke_token(client, token)
        with pytest.raises(VaultDeniedError):
            await client.call(READ, into=KvRead, auth=token.token)

    async def test_a_sealed_vault_says_so(self, client: VaultClient, place: Place) -> None:
        assert [each.state for each in await client.health()] == [State.ACTIVE]
        auth = await log_in(client, place)
        await place.seal()
        with pytest.raises(VaultUnavailableError) as caught:
            await client.call(READ, into=KvRead, auth=auth.client_token)
        assert caught.value.reason is Reason.VAULT_SEALED
        assert [each.state for each in await client.health()] == [State.SEALED]


@pytest.fixture(scope="module")
def bao() -> Iterator[TlsBao]:
    with running() as made:
        yield made


class TestReal:
    """What only a real one can show."""

    async def test_it_answers_over_tls_and_many_at_once(self, bao: TlsBao) -> None:
        client = VaultClient(addresses=[bao.tls_address], ca_file=bao.ca_file, timeout_s=10.0)
        lookup = VaultRequest("GET", "auth/token/lookup-self")
        replies = await asyncio.gather(*(client.call(lookup, into=NoData, auth=bao.admin_token) for _ in range(30)))
        assert {reply.require_data()["policies"][0] for reply in replies} == {"root"}
        await client.close()

    @pytest.mark.parametrize("wrong", ["ca", "name", "system CAs"])
    async def test_a_certificate_that_is_not_trusted_gets_no_token_and_says_what_to_check(
        self, bao: TlsBao, wrong: str
    ) -> None:
        address = bao.address_by_name if wrong == "name" else bao.tls_address
        ca_file = {"ca": bao.other_ca_file, "name": bao.ca_file, "system CAs": ""}[wrong]
        client = VaultClient(addresses=[address], ca_file=ca_file, timeout_s=10.0)
        before = len(bao.requests())
        with pytest.raises(VaultUnavailableError, match=r"vault\.ca_file") as caught:
            await client.call(VaultRequest("GET", "auth/token/lookup-self"), into=NoData, auth=bao.admin_token)
        await client.close()
        assert caught.value.reason is Reason.VAULT_UNREACHABLE
        assert address in caught.value.public
        assert len(bao.requests()) == before

    async def test_a_ca_file_that_was_replaced_is_read_again(self, bao: TlsBao, tmp_path: Path) -> None:
        ca_file = tmp_path / "ca.pem"
        ca_file.write_text(Path(bao.other_ca_file).read_text())
        client = VaultClient(addresses=[bao.tls_address], ca_file=str(ca_file), timeout_s=10.0)
        lookup = VaultRequest("GET", "auth/token/lookup-self")
        with pytest.raises(VaultUnavailableError):
            await client.call(lookup, into=NoData, auth=bao.admin_token)
        ca_file.write_text(Path(bao.ca_file).read_text() + "\n")
        assert await client.call(lookup, into=NoData, auth=bao.admin_token)
        await client.close()

    async def test_a_bad_address_does_not_keep_the_good_ones_from_answering(self, bao: TlsBao) -> None:
        addresses = ["https://127.0.0.1:1", "unix:///no/such.sock", bao.address_by_name, bao.tls_address]
        client = VaultClient(addresses=addresses, ca_file=bao.ca_file, timeout_s=10.0)
        create = VaultRequest("POST", "auth/token/create", {"ttl": "1m"}, repeatable=False)
        assert (await client.call(create, into=NoData, auth=bao.admin_token)).require_auth()
        assert [each.state for each in await client.health()] == [
            State.UNREACHABLE,
            State.UNREACHABLE,
            State.UNREACHABLE,
            State.ACTIVE,
        ]
        await client.close()

    async def test_a_plain_http_address_of_a_tls_listener_is_named_as_the_mistake(self, bao: TlsBao) -> None:
        client = VaultClient(addresses=[bao.tls_address.replace("https", "http")], timeout_s=10.0)
        with pytest.raises(VaultUnavailableError, match="begins with https://"):
            await client.call(VaultRequest("GET", "sys/mounts"), into=NoData)
        await client.close()

    async def test_a_namespace_has_secrets_and_tokens_of_its_own(self, bao: TlsBao) -> None:
        await bao.admin("POST", "sys/namespaces/team1", {})
        await bao.enable_kv("teams", namespace="team1", k="of team1")
        create = VaultRequest("POST", "auth/token/create", {"policies": ["reader"], "ttl": "1m"})
        team = VaultClient(addresses=[bao.address], namespace="team1", timeout_s=10.0)
        token = (await team.call(create, into=NoData, auth=bao.admin_token)).require_auth().client_token
        read = VaultRequest("GET", "teams/data/a")
        assert (await team.call(read, into=KvRead, auth=token)).require_data().data.k == Secret("of team1")
        root = VaultClient(addresses=[bao.address], timeout_s=10.0)
        with pytest.raises((NotFoundError, VaultDeniedError)):
            await root.call(read, into=KvRead, auth=token)
        await team.close()
        await root.close()

    async def test_any_text_can_be_a_path(self, bao: TlsBao) -> None:
        await bao.admin("POST", "sys/mounts/odd", {"type": "kv", "options": {"version": "2"}})
        for path in ("my app", "a+b", "50%25", "grün", "q?x=1#y"):
            await bao.admin("POST", f"odd/data/{path}", {"data": {"k": path}})
            assert (await bao.admin("GET", f"odd/data/{path}"))["data"] == {"k": path}

    async def test_a_query_asks_for_another_version(self, bao: TlsBao) -> None:
        await bao.admin("POST", "sys/mounts/versions", {"type": "kv", "options": {"version": "2"}})
        for value in ("old", "new"):
            await bao.admin("POST", "versions/data/a", {"data": {"k": value}})
        client = VaultClient(addresses=[bao.address], timeout_s=10.0)
        request = VaultRequest("GET", "versions/data/a", query={"version": "1"})
        reply = await client.call(request, into=KvRead, auth=bao.admin_token)
        assert reply.require_data().data.k == Secret("old")
        await client.close()
