"""One token kept alive: when it is obtained, renewed, replaced and given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes import vault as fake
from tests.fakes.vault import FakeVault, serving
from tests.making import instant
from tokenward.core.model import Instant, VaultToken
from tokenward.core.secret import Secret
from tokenward.errors import Reason, VaultDeniedError, VaultUnavailableError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.keeper import MIN_AGE_S, PAUSE_S, TokenKeeper

READ = VaultRequest("GET", "secret/data/a")


class Source:
    """Makes tokens of a fake vault, one after another; `gate` holds it up, `error` makes it fail."""

    def __init__(self, vault: FakeVault) -> None:
        self.vault = vault
        self.made = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def obtain(self, now: Instant) -> VaultToken:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.made += 1
        token = self.vault.new_token(("secret/",))
        known = self.vault.tokens[token]
        ends = now.mono + known.ttl_s if known.ttl_s else None
        return VaultToken(token=Secret(token), accessor=known.accessor, expires_mono=ends, renewable=True)


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[FakeVault]:
    made = FakeVault(token_ttl_s=300, renewal_ttl_s=300, secrets={"secret/data/a": {"k": "v"}})
    with serving(made, socket_path=str(tmp_path / "vault.sock")):
        yield made


@pytest.fixture
async def client(vault: FakeVault) -> AsyncIterator[VaultClient]:
    made = VaultClient(addresses=[vault.address], timeout_s=5.0, threads=2)
    yield made
    await made.close()


@pytest.fixture
def source(vault: FakeVault) -> Source:
    return Source(vault)


@pytest.fixture
def keeper(client: VaultClient, source: Source) -> TokenKeeper:
    return TokenKeeper(client=client, source=source)


async def test_any_number_of_callers_cause_one_login(keeper: TokenKeeper, source: Source, vault: FakeVault) -> None:
    tokens = await asyncio.gather(*(keeper.token(instant(0)) for _ in range(100)))
    assert source.made == 1
    assert len({token.accessor for token in tokens}) == 1
    assert not vault.requests  # nor a renewal for each who came late


async def test_a_cancelled_caller_cancels_nobody_else(keeper: TokenKeeper, source: Source) -> None:
    source.gate.clear()
    first, second = (asyncio.create_task(keeper.token(instant(0))) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    source.gate.set()
    assert (await second).accessor
    assert source.made == 1


async def test_an_error_reaches_every_caller_and_the_next_one_tries_again(keeper: TokenKeeper, source: Source) -> None:
    source.error = VaultDeniedError(Reason.LOGIN_FAILED, "no")
    failed = await asyncio.gather(*(keeper.token(instant(0)) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(each, VaultDeniedError) for each in failed)
    source.error = None
    assert await keeper.token(instant(0))


async def test_it_is_renewed_when_two_thirds_of_its_life_are_gone(
    keeper: TokenKeeper, source: Source, vault: FakeVault
) -> None:
    first = await keeper.token(instant(0))
    assert await keeper.token(instant(199)) is first
    assert not vault.asked_for("auth/token/renew-self")
    renewed = await keeper.token(instant(201))
    assert (renewed.token, renewed.expires_mono) == (first.token, 500)
    assert len(vault.asked_for("auth/token/renew-self")) == 1
    assert source.made == 1


async def test_it_is_replaced_when_its_maximum_leaves_little_to_renew(
    keeper: TokenKeeper, source: Source, vault: FakeVault
) -> None:
    await keeper.token(instant(0))
    vault.renewal_ttl_s = 100
    await keeper.token(instant(201))
    assert source.made == 2


async def test_it_is_replaced_when_the_vault_does_not_renew_it(
    keeper: TokenKeeper, source: Source, vault: FakeVault
) -> None:
    await keeper.token(instant(0))
    vault.lies.append(fake.refuses(400, "lease is not renewable"))
    await keeper.token(instant(201))
    assert source.made == 2


async def test_while_the_vault_is_away_the_token_serves_until_its_end_and_not_longer(
    keeper: TokenKeeper, source: Source, vault: FakeVault
) -> None:
    first = await keeper.token(instant(0))
    vault.sealed = True
    source.error = VaultUnavailableError(Reason.VAULT_SEALED, "sealed")
    assert await keeper.token(instant(201)) is first
    asked = len(vault.requests)
    assert await keeper.token(instant(201 + PAUSE_S - 1)) is first
    assert len(vault.requests) == asked  # not asked again before the pause is over
    assert await keeper.token(instant(201 + PAUSE_S + 1)) is first
    assert len(vault.requests) > asked
    with pytest.raises(VaultUnavailableError):
        await keeper.token(instant(300))


async def test_a_token_that_cannot_be_replaced_is_used_up_first(
    keeper: TokenKeeper, source: Source, vault: FakeVault
) -> None:
    await keeper.token(instant(0))
    vault.renewal_ttl_s = 100
    source.error = VaultDeniedError(Reason.LOGIN_FAILED, "deliver a new wrapped secret id")
    assert (await keeper.token(instant(201))).expires_mono == 300
    with pytest.raises(VaultDeniedError, match="wrapped"):
        await keeper.token(instant(301))


async def test_a_token_that_never_ends_is_never_renewed(keeper: TokenKeeper, source: Source, vault: FakeVault) -> None:
    vault.token_ttl_s = 0
    first = await keeper.token(instant(0))
    assert await keeper.token(instant(10**9)) is first
    assert not vault.requests


async def test_after_a_403_it_logs_in_once_more(keeper: TokenKeeper, source: Source, vault: FakeVault) -> None:
    await keeper.token(instant(0))
    vault.tokens.clear()
    reply, token = await keeper.call(READ, into=dict, now=instant(1))
    assert reply.require_data()["data"] == {"k": "v"}
    assert token.accessor in {known.accessor for known in vault.tokens.values()}
    assert source.made == 2


async def test_after_a_second_403_it_gives_up(keeper: TokenKeeper, source: Source, vault: FakeVault) -> None:
    await keeper.token(instant(0))
    with pytest.raises(VaultDeniedError):
        await keeper.call(VaultRequest("GET", "other/data/a"), into=dict, now=instant(MIN_AGE_S))
    assert len(vault.asked_for("other/data/a")) == 2
    assert source.made == 2


async def test_what_a_new_token_may_not_do_costs_no_login_each_time(
    keeper: TokenKeeper, source: Source, vault: FakeVault
) -> None:
    for number in range(5):
        with pytest.raises(VaultDeniedError):
            await keeper.call(VaultRequest("GET", "other/data/a"), into=dict, now=instant(number))
    assert source.made == 1


async def test_forgetting_a_token_spares_its_successor(keeper: TokenKeeper, source: Source) -> None:
    first = await keeper.token(instant(0))
    keeper.forget(first)
    second = await keeper.token(instant(0))
    keeper.forget(first)
    assert await keeper.token(instant(0)) is second
    assert source.made == 2


async def test_revoking_ends_the_token_at_the_vault(keeper: TokenKeeper, vault: FakeVault) -> None:
    await keeper.token(instant(0))
    await keeper.revoke()
    assert not vault.tokens
    await keeper.revoke()
    assert len(vault.asked_for("auth/token/revoke-self")) == 1


async def test_a_token_that_ended_by_itself_counts_as_revoked(keeper: TokenKeeper, vault: FakeVault) -> None:
    await keeper.token(instant(0))
    vault.tokens.clear()
    await keeper.revoke()
