"""Which address is asked, how often, and when a caller has its answer: against vaults that fail in every way."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.fakes import vault as fake
from tests.fakes.vault import FakeVault, serving
from tokenward.core.secret import Secret
from tokenward.errors import (
    InvalidRequestError,
    NotFoundError,
    Reason,
    VaultBadReplyError,
    VaultDeniedError,
    VaultUnavailableError,
)
from tokenward.vault.client import AddressHealth, InlineAuth, State, VaultClient, VaultRequest

TIMEOUT_S = 1.0
READ = VaultRequest("GET", "secret/data/a")
CREATE = VaultRequest("GET", "database/creds/a", repeatable=False)
SEALED = fake.refuses(503, "Vault is sealed")


@pytest.fixture
def vaults(tmp_path: Path) -> Iterator[list[FakeVault]]:
    """Three nodes of one vault: they share tokens and secrets."""
    first = FakeVault(secrets={"secret/data/a": {"k": "v"}, "database/creds/a": {"k": "v"}})
    nodes = [first, FakeVault(), FakeVault()]
    with ExitStack() as stack:
        for number, node in enumerate(nodes):
            node.secrets, node.tokens, node.roles = first.secrets, first.tokens, first.roles
            stack.enter_context(serving(node, socket_path=str(tmp_path / f"{number}.sock")))
        yield nodes


@pytest.fixture
async def client(vaults: list[FakeVault]) -> AsyncIterator[VaultClient]:
    made = VaultClient(addresses=[node.address for node in vaults], timeout_s=TIMEOUT_S, threads=2)
    yield made
    await made.close()


@pytest.fixture
def token(vaults: list[FakeVault]) -> Secret:
    return Secret(vaults[0].new_token(("secret/", "database/")))


def counts(vaults: list[FakeVault]) -> list[int]:
    return [len(node.requests) for node in vaults]


NOT_SERVING = {
    "redirect": fake.redirects("http://127.0.0.1:1/v1/secret/data/a"),
    "sealed": SEALED,
    "behind": fake.says(429, {"errors": []}, retry_after="1"),
    "no leader": fake.refuses(500, "local node not active but active cluster node not found"),
}


@pytest.mark.parametrize("lie", NOT_SERVING.values(), ids=NOT_SERVING.keys())
@pytest.mark.parametrize("request_", [READ, CREATE], ids=["repeatable", "makes a lease"])
async def test_a_node_that_does_not_serve_is_passed_over(
    vaults: list[FakeVault], client: VaultClient, token: Secret, lie: fake.Lie, request_: VaultRequest
) -> None:
    vaults[0].lies.append(lie)
    await client.call(request_, into=dict, auth=token)
    assert counts(vaults) == [1, 1, 0]


@pytest.mark.parametrize(
    "lie", [fake.resets, fake.hangs, fake.refuses(502), fake.refuses(503)], ids=["reset", "hangs", "502", "503"]
)
async def test_a_call_that_makes_a_lease_is_never_sent_twice_once_it_may_have_been_done(
    vaults: list[FakeVault], client: VaultClient, token: Secret, lie: fake.Lie
) -> None:
    vaults[0].lies.append(lie)
    with pytest.raises(VaultUnavailableError):
        await client.call(CREATE, into=dict, auth=token)
    assert counts(vaults) == [1, 0, 0]


async def test_an_address_that_hangs_on_a_lease_is_not_asked_first_again(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    vaults[0].lies.extend([fake.hangs] * 5)
    for _ in range(2):
        with suppress(VaultUnavailableError, NotFoundError):
            await client.call(CREATE, into=dict, auth=token)
    assert counts(vaults)[:2] == [1, 1]


@pytest.mark.parametrize("lie", [fake.hangs, fake.refuses(502)], ids=["hangs", "502"])
async def test_a_read_goes_on_to_the_next_address(
    vaults: list[FakeVault], client: VaultClient, token: Secret, lie: fake.Lie
) -> None:
    vaults[0].lies.append(lie)
    await client.call(READ, into=dict, auth=token)
    assert counts(vaults) == [1, 1, 0]


async def test_a_read_on_an_old_connection_that_the_vault_closes_just_then_is_sent_once_more(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    await client.call(READ, into=dict, auth=token)
    vaults[0].lies.append(fake.resets)
    await client.call(READ, into=dict, auth=token)
    assert counts(vaults) == [3, 0, 0]
    vaults[0].lies.extend([fake.resets] * 2)
    await client.call(READ, into=dict, auth=token)
    assert counts(vaults) == [5, 1, 0]


async def test_an_address_where_nobody_listens_is_passed_over_even_for_a_lease(
    vaults: list[FakeVault], token: Secret
) -> None:
    client = VaultClient(addresses=["unix:///no/such.sock", vaults[0].address], timeout_s=TIMEOUT_S)
    await client.call(CREATE, into=dict, auth=token)
    await client.close()
    assert len(vaults[0].requests) == 1


async def test_the_address_that_answered_last_is_asked_first(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    vaults[0].lies.append(SEALED)
    for _ in range(3):
        await client.call(READ, into=dict, auth=token)
    assert counts(vaults) == [1, 3, 0]


async def test_when_no_address_serves_the_error_names_each_and_the_most_telling_reason(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    for node, lie in zip(vaults, [SEALED, fake.hangs, fake.says(429, {"errors": []}, retry_after="4")], strict=True):
        node.lies.append(lie)
    with pytest.raises(VaultUnavailableError) as caught:
        await client.call(READ, into=dict, auth=token)
    assert caught.value.reason is Reason.VAULT_SEALED
    assert caught.value.retry_after_s == 4.0
    assert all(node.address in caught.value.public for node in vaults)


async def test_a_rate_limit_is_obeyed_and_no_other_node_is_bothered(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    vaults[0].lies.append(fake.refuses(429, "rate limit quota exceeded", retry_after="2"))
    with pytest.raises(VaultUnavailableError) as caught:
        await client.call(READ, into=dict, auth=token)
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.VAULT_RATE_LIMITED, 2.0)
    assert counts(vaults) == [1, 0, 0]


async def test_a_reply_that_was_refused_is_no_reason_to_ask_another_node(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    vaults[0].lies.append(fake.huge(50 << 20))
    with pytest.raises(VaultBadReplyError, match="more than 1048576 bytes"):
        await client.call(READ, into=dict, auth=token)
    assert counts(vaults) == [1, 0, 0]


@pytest.mark.parametrize(
    ("lie", "kind", "reason"),
    [
        (fake.refuses(403, fake.NO_POLICY), VaultDeniedError, Reason.VAULT_DENIED),
        (fake.refuses(400, "s3cret is wrong"), VaultDeniedError, Reason.VAULT_DENIED),
        (fake.refuses(404), NotFoundError, Reason.SECRET_NOT_FOUND),
        (fake.refuses(500, "s3cret is wrong"), VaultUnavailableError, Reason.VAULT_ERROR),
        (fake.says(200, {"data": "s3cret"}), VaultBadReplyError, Reason.VAULT_BAD_REPLY),
    ],
)
async def test_an_answer_is_final_and_its_error_holds_none_of_its_text(
    vaults: list[FakeVault],
    client: VaultClient,
    token: Secret,
    lie: fake.Lie,
    kind: type[Exception],
    reason: Reason,
) -> None:
    vaults[0].lies.append(lie)
    with pytest.raises(kind) as caught:
        await client.call(READ, into=dict, auth=token)
    assert getattr(caught.value, "reason") is reason  # noqa: B009 -- the classes have it, their common type has not
    assert "s3cret" not in str(caught.value)
    assert counts(vaults) == [1, 0, 0]


async def test_everything_hanging_is_over_after_twice_the_timeout(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    for node in vaults:
        node.lies.append(fake.hangs)
    begun = time.monotonic()
    with pytest.raises(VaultUnavailableError) as caught:
        await client.call(READ, into=dict, auth=token)
    assert time.monotonic() - begun < 3 * TIMEOUT_S
    assert caught.value.reason is Reason.VAULT_UNREACHABLE


async def test_a_cancelled_caller_gives_its_thread_back_in_time(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    """Both threads are held by calls that hang; cancelled, they are free again within the deadline."""
    for node in vaults:
        node.lies.extend([fake.hangs] * 2)
    hung = [asyncio.create_task(client.call(READ, into=dict, auth=token)) for _ in range(2)]
    async with asyncio.timeout(5):
        while counts(vaults)[0] < 2:
            await asyncio.sleep(0.01)
    for task in hung:
        task.cancel()
    assert all(isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*hung, return_exceptions=True))
    async with asyncio.timeout(4 * TIMEOUT_S):
        while True:
            try:
                await client.call(READ, into=dict, auth=token)
                break
            except VaultUnavailableError:
                pass


async def test_more_callers_than_threads_are_all_answered_by_no_more_threads(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    await asyncio.gather(*(client.call(READ, into=dict, auth=token) for _ in range(50)))
    assert counts(vaults) == [50, 0, 0]
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("vault_")]
    assert len(ours) <= 2


async def test_a_slow_vault_does_not_hold_up_the_loop(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    vaults[0].lies.append(fake.hangs)
    call = asyncio.create_task(client.call(READ, into=dict, auth=token))
    longest, last = 0.0, time.monotonic()
    while not call.done():
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    await call
    assert longest < TIMEOUT_S / 2


async def test_the_token_and_the_namespace_go_as_headers_and_secrets_in_the_body_as_themselves(
    vaults: list[FakeVault], token: Secret
) -> None:
    client = VaultClient(addresses=[vaults[0].address], namespace="team1", timeout_s=TIMEOUT_S)
    vaults[0].lies.append(fake.says(204))
    body = {"jwt": Secret("a.b.c"), "list": [Secret("d")]}
    await client.call(VaultRequest("POST", "x/y", body, query={"v": "1"}), into=dict, auth=token)
    await client.close()
    (seen,) = vaults[0].requests
    assert (seen.method, seen.path) == ("POST", "/v1/x/y?v=1")
    assert json.loads(seen.body) == {"jwt": "a.b.c", "list": ["d"]}
    assert seen.headers["X-Vault-Token"] == token.reveal()
    assert seen.headers["X-Vault-Namespace"] == "team1"
    assert seen.headers["X-Vault-Request"] == "true"


async def test_inline_authentication_goes_as_headers_and_without_a_token(
    vaults: list[FakeVault], client: VaultClient
) -> None:
    vaults[0].roles["app"] = ("secret/",)
    auth = InlineAuth("auth/jwt/login", {"role": "app", "jwt": Secret("a.b.c")})
    reply = await client.call(READ, into=dict, auth=auth)
    assert reply.require_data()["data"] == {"k": "v"}
    headers = vaults[0].requests[0].headers
    assert "X-Vault-Token" not in headers
    encoded = headers["X-Vault-Inline-Auth-Parameter-2"]
    assert "=" not in encoded
    assert json.loads(base64.urlsafe_b64decode(encoded + "==")) == {"key": "jwt", "value": "a.b.c"}
    assert "a.b.c" not in repr(auth)


async def test_a_read_after_a_write_carries_the_state_that_it_must_see(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    vaults[0].lies.append(fake.says(200, {"request_id": "r"}, x_vault_index="idx"))
    written = await client.call(VaultRequest("POST", "secret/data/a", {}), into=dict, auth=token)
    await client.call(VaultRequest("GET", "secret/data/a", after_index=written.index), into=dict, auth=token)
    headers = vaults[0].requests[1].headers
    assert (headers["X-Vault-Index"], headers["X-Vault-Inconsistent"]) == ("idx", "forward-active-node")


@pytest.mark.parametrize("path", ["", "/sys/health", "secret/data/../../sys/seal", "./a", "a/."])
async def test_a_path_that_leads_elsewhere_is_refused_before_anything_is_sent(
    vaults: list[FakeVault], client: VaultClient, path: str
) -> None:
    with pytest.raises(InvalidRequestError):
        await client.call(VaultRequest("GET", path), into=dict)
    assert counts(vaults) == [0, 0, 0]


async def test_health_tells_each_address_apart(vaults: list[FakeVault]) -> None:
    vaults[1].sealed = True
    vaults[2].lies.append(fake.says(429, {}))
    addresses = [*(node.address for node in vaults), "unix:///no/such.sock"]
    client = VaultClient(addresses=addresses, timeout_s=TIMEOUT_S)
    assert await client.health() == (
        AddressHealth(addresses[0], State.ACTIVE),
        AddressHealth(addresses[1], State.SEALED),
        AddressHealth(addresses[2], State.STANDBY),
        AddressHealth(addresses[3], State.UNREACHABLE, "cannot be reached (No such file or directory)"),
    )
    await client.close()
