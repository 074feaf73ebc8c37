"""Which address is asked, how often, and when a caller has its answer: against vaults that fail in every way."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes import vault as fake
from tests.fakes.vault import FakeVault, serving
from tokenward.core.secret import Secret
from tokenward.errors import (
    InvalidRequestError,
    NotFoundError,
    Reason,
    TokenwardError,
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
    "uninitialized": fake.refuses(503, "server is not yet initialized"),
    "standby": fake.refuses(503, "Vault is in standby mode"),
    "disaster recovery standby": fake.says(472, {}),
    "performance standby": fake.says(473, {}),
    "index not reached": fake.refuses(412, "required index state not present"),
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
    "lie",
    [
        fake.resets,
        fake.hangs,
        fake.DRIP,
        fake.cut_off(b'{"data": {"pass'),
        fake.writes(b"no HTTP at all\r\n\r\n"),
        fake.refuses(502),
        fake.refuses(503),
        fake.refuses(504),
    ],
    ids=["reset", "hangs", "drips", "reset in the body", "no HTTP", "502", "503", "504"],
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


@pytest.mark.parametrize(
    "lie",
    [
        fake.hangs,
        fake.DRIP,
        fake.writes(b"no HTTP at all\r\n\r\n"),
        fake.refuses(502),
        fake.refuses(503),
        fake.refuses(504),
    ],
    ids=["hangs", "drips", "no HTTP", "502", "503", "504"],
)
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


@pytest.mark.parametrize("place", ["unix", "tcp"])
async def test_a_read_that_is_cut_off_in_the_middle_of_its_answer_goes_on_to_the_next_address(
    vaults: list[FakeVault], token: Secret, place: str
) -> None:
    lies = deque([fake.cut_off(b'{"data": {"pass')])
    with ExitStack() as stack:
        first = stack.enter_context(serving(FakeVault(lies=lies))) if place == "tcp" else vaults[0]
        first.lies = lies
        client = VaultClient(addresses=[first.address, vaults[1].address], timeout_s=TIMEOUT_S)
        reply = await client.call(READ, into=dict, auth=token)
        await client.close()
    assert reply.require_data()["data"] == {"k": "v"}
    assert (len(first.requests), len(vaults[1].requests)) == (1, 1)


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


async def test_a_rate_limit_that_names_no_time_gives_none(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    vaults[0].lies.append(fake.refuses(429, "rate limit quota exceeded"))
    with pytest.raises(VaultUnavailableError) as caught:
        await client.call(READ, into=dict, auth=token)
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.VAULT_RATE_LIMITED, None)
    assert counts(vaults) == [1, 0, 0]


async def test_a_failed_audit_device_is_an_answer_and_a_lease_is_not_asked_for_again(
    vaults: list[FakeVault], client: VaultClient, token: Secret
) -> None:
    """The vault may have made the lease before it could not write down that it did."""
    vaults[0].audit_broken = True
    with pytest.raises(VaultUnavailableError, match="HTTP 500") as caught:
        await client.call(CREATE, into=dict, auth=token)
    assert caught.value.reason is Reason.VAULT_ERROR
    assert counts(vaults) == [1, 0, 0]


async def test_a_standby_whose_leader_is_gone_reads_on_and_its_redirect_is_never_followed(
    vaults: list[FakeVault], token: Secret
) -> None:
    standby, leader, other = vaults
    standby.dead_leader = leader.address
    client = VaultClient(addresses=[standby.address, other.address], timeout_s=TIMEOUT_S)
    await client.call(READ, into=dict, auth=token)
    await client.call(CREATE, into=dict, auth=token)
    await client.close()
    assert counts(vaults) == [2, 0, 1]


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
        (fake.says(200, b'{"data": {"pass": "s3cret\x00'), VaultBadReplyError, Reason.VAULT_BAD_REPLY),
        (fake.says(200, b"\xff\xfes3cret"), VaultBadReplyError, Reason.VAULT_BAD_REPLY),
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


@pytest.mark.parametrize("lie", [fake.hangs, fake.DRIP, fake.HEADER_DRIP], ids=["silence", "body drip", "header drip"])
async def test_everything_hanging_or_dripping_is_over_after_twice_the_timeout(
    vaults: list[FakeVault], client: VaultClient, token: Secret, lie: fake.Lie
) -> None:
    for node in vaults:
        node.lies.append(lie)
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


# -- addresses that failed are left alone ------------------------------------------------------------------------------


@dataclass(slots=True)
class Breakers:
    """The client's clock for its breakers, which stands still, and its jitter."""

    mono: float = 0.0

    def client_of(self, addresses: Sequence[str], *, timeout_s: float = 0.3, threads: int = 4) -> VaultClient:
        return VaultClient(
            addresses=addresses, timeout_s=timeout_s, threads=threads, now=lambda: self.mono, draw=lambda: 0.5
        )


@pytest.fixture
def breakers() -> Breakers:
    return Breakers()


async def fails(client: VaultClient, token: Secret, request: VaultRequest = READ) -> VaultUnavailableError:
    with pytest.raises(VaultUnavailableError) as caught:
        await client.call(request, into=dict, auth=token)
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


FAULTS: dict[str, tuple[fake.Lie, Reason, str]] = {
    "hangs": (fake.hangs, Reason.VAULT_UNREACHABLE, "did not answer in time"),
    "drips": (fake.DRIP, Reason.VAULT_UNREACHABLE, "did not answer in time"),
    "reset": (fake.resets, Reason.VAULT_UNREACHABLE, "cannot be reached|broke off"),
    "reset in the body": (fake.cut_off(b"{"), Reason.VAULT_UNREACHABLE, "cannot be reached|broke off"),
    "no HTTP": (fake.writes(b"no HTTP\r\n\r\n"), Reason.VAULT_UNREACHABLE, "not HTTP"),
    "sealed": (SEALED, Reason.VAULT_SEALED, "is sealed"),
    "uninitialized": (fake.refuses(503, "server is not yet initialized"), Reason.VAULT_SEALED, "is not initialized"),
    "502": (fake.refuses(502), Reason.VAULT_ERROR, "HTTP 502"),
    "503": (fake.refuses(503), Reason.VAULT_ERROR, "HTTP 503"),
    "504": (fake.refuses(504), Reason.VAULT_ERROR, "HTTP 504"),
}


@pytest.mark.parametrize(("lie", "reason", "why"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("request_", [READ, CREATE], ids=["repeatable", "makes a lease"])
async def test_after_three_faults_the_only_address_is_not_asked_and_the_error_comes_at_once(
    vaults: list[FakeVault],
    breakers: Breakers,
    token: Secret,
    lie: fake.Lie,
    reason: Reason,
    why: str,
    request_: VaultRequest,
) -> None:
    client = breakers.client_of([vaults[0].address])
    vaults[0].lies.extend([lie] * 6)
    for _ in range(3):
        await fails(client, token, request_)
    sent = client.calls
    begun = time.monotonic()
    error = await fails(client, token, request_)
    assert time.monotonic() - begun < 0.1
    assert (error.reason, error.retry_after_s) == (reason, 0.5)
    assert re.search(f"{vaults[0].address}.*({why}).*not asked again yet", error.public)
    assert client.calls == sent == counts(vaults)[0]
    await client.close()


HARMLESS: dict[str, fake.Lie] = {
    "rate limit": fake.refuses(429, "rate limit quota exceeded", retry_after="2"),
    "rate limit without a time": fake.refuses(429, "rate limit quota exceeded"),
    "no policy": fake.refuses(403, fake.NO_POLICY),
    "fails at this call": fake.refuses(500, "1 error occurred"),
    "audit device failed": fake.refuses(500, "internal error"),
    "not for this caller": fake.says(501, {"errors": []}),
    "not JSON": fake.says(200, b"nonsense"),
    "too long": fake.huge(50 << 20),
    "redirect": fake.redirects("http://127.0.0.1:1/"),
    "behind": fake.says(429, {"errors": []}, retry_after="1"),
    "performance standby": fake.says(473, {}),
    "no leader": fake.refuses(500, "local node not active but active cluster node not found"),
}


@pytest.mark.parametrize("lie", HARMLESS.values(), ids=HARMLESS.keys())
async def test_what_a_node_answers_to_one_call_says_nothing_about_the_next(
    vaults: list[FakeVault], breakers: Breakers, token: Secret, lie: fake.Lie
) -> None:
    client = breakers.client_of([vaults[0].address], timeout_s=5)
    vaults[0].lies.extend([lie] * 5)
    for _ in range(5):
        with pytest.raises(TokenwardError):
            await client.call(READ, into=dict, auth=token)
    await client.call(READ, into=dict, auth=token)
    assert counts(vaults)[0] == 6
    await client.close()


async def test_reads_go_on_at_standbys_however_many_logins_they_could_not_do(
    vaults: list[FakeVault], breakers: Breakers, token: Secret
) -> None:
    for node in vaults:
        node.dead_leader = "http://127.0.0.1:1"
    client = breakers.client_of([node.address for node in vaults])
    for _ in range(5):
        await fails(client, token, VaultRequest("POST", "auth/jwt/login", {}))
    await client.call(READ, into=dict, auth=token)
    await client.close()


async def test_an_address_where_nobody_listens_is_not_tried_again_and_the_calls_tell(
    breakers: Breakers, token: Secret
) -> None:
    client = breakers.client_of(["unix:///no/such.sock", "http://127.0.0.1:1"])
    for _ in range(4):
        error = await fails(client, token)
    assert client.calls == 6
    assert error.reason is Reason.VAULT_UNREACHABLE
    assert "unix:///no/such.sock cannot be reached (No such file or directory)" in error.public
    assert "http://127.0.0.1:1 cannot be reached (Connection refused)" in error.public
    await client.close()


async def test_when_every_address_is_left_alone_the_error_has_the_most_telling_reason_and_the_first_time(
    vaults: list[FakeVault], breakers: Breakers, token: Secret
) -> None:
    first, second, _ = vaults
    client = breakers.client_of([first.address, second.address])
    first.lies.extend([SEALED] * 3)
    second.lies.extend([fake.says(473, {})] * 3 + [fake.refuses(502)] * 2 + [fake.hangs])
    for mono in (0.0, 0.2):
        breakers.mono = mono
        for _ in range(3):
            await fails(client, token)
    error = await fails(client, token)
    assert error.reason is Reason.VAULT_SEALED
    assert error.retry_after_s == pytest.approx(0.3)
    assert re.search(f"{first.address} is sealed.*{second.address} did not answer in time", error.public)
    assert counts(vaults) == [3, 6, 0]
    await client.close()


@pytest.mark.parametrize("mono", [0.0, 60.0], ids=["left alone", "its time is over"])
async def test_an_address_that_is_left_alone_is_passed_over_while_another_serves(
    vaults: list[FakeVault], breakers: Breakers, token: Secret, mono: float
) -> None:
    """Nor does a caller pay for the probe: the one that serves is asked first, also when the other's time is over."""
    first, second, _ = vaults
    client = breakers.client_of([first.address, second.address])
    first.lies.extend([fake.hangs] * 9)
    second.lies.extend([fake.refuses(502)] * 2)
    for _ in range(2):
        await fails(client, token)
    second.lies.append(SEALED)
    await fails(client, token)
    second.lies.clear()
    await client.health()  # the second is well again, the first hangs on that as well
    asked = counts(vaults)[0]
    breakers.mono = mono
    begun = time.monotonic()
    await client.call(READ, into=dict, auth=token)
    assert time.monotonic() - begun < 0.2
    assert counts(vaults)[0] == asked
    await client.close()


async def frozen_out(client: VaultClient, node: FakeVault, token: Secret) -> None:
    """`node` freezes, and three calls find out."""
    node.frozen = True
    for _ in range(3):
        await fails(client, token)


@pytest.mark.parametrize("request_", [READ, CREATE], ids=["repeatable", "makes a lease"])
async def test_one_probe_goes_to_an_address_whose_time_is_over_and_others_need_not_wait_for_it(
    vaults: list[FakeVault], breakers: Breakers, token: Secret, request_: VaultRequest
) -> None:
    client = breakers.client_of([vaults[0].address], timeout_s=0.5, threads=1)  # the probe has it
    await frozen_out(client, vaults[0], token)
    breakers.mono = 0.5
    probe = asyncio.create_task(client.call(request_, into=dict, auth=token))
    await until(lambda: counts(vaults)[0] == 4)
    begun = time.monotonic()
    for _ in range(20):
        assert (await fails(client, token, request_)).retry_after_s == 1.0
    assert time.monotonic() - begun < 0.25
    vaults[0].frozen = False
    assert (await probe).require_data()["data"] == {"k": "v"}
    await client.call(request_, into=dict, auth=token)
    assert counts(vaults)[0] == 5
    await client.close()


async def test_a_probe_that_fails_leaves_the_address_alone_for_longer(
    vaults: list[FakeVault], breakers: Breakers, token: Secret
) -> None:
    client = breakers.client_of([vaults[0].address])
    await frozen_out(client, vaults[0], token)
    breakers.mono = 0.5
    await fails(client, token)
    assert (await fails(client, token)).retry_after_s == 1.0
    assert counts(vaults)[0] == 4
    await client.close()


async def test_a_cancelled_caller_does_not_keep_the_probe(
    vaults: list[FakeVault], breakers: Breakers, token: Secret
) -> None:
    client = breakers.client_of([vaults[0].address])
    await frozen_out(client, vaults[0], token)
    breakers.mono = 0.5
    probe = asyncio.create_task(client.call(READ, into=dict, auth=token))
    await until(lambda: counts(vaults)[0] == 4)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    vaults[0].frozen = False
    breakers.mono = 60.0
    async with asyncio.timeout(5):
        while True:
            with suppress(VaultUnavailableError):
                await client.call(READ, into=dict, auth=token)
                break
            await asyncio.sleep(0.01)
    await client.close()


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("a fault of ours")


async def test_a_fault_of_ours_does_not_keep_the_probe(
    vaults: list[FakeVault], breakers: Breakers, token: Secret
) -> None:
    client = breakers.client_of([vaults[0].address])
    await frozen_out(client, vaults[0], token)
    vaults[0].frozen = False
    breakers.mono = 0.5
    broken = VaultRequest("GET", "secret/data/a", query={"v": Unprintable()})  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="a fault of ours"):
        await client.call(broken, into=dict, auth=token)
    await client.call(READ, into=dict, auth=token)
    await client.close()


@pytest.mark.parametrize("dead_leader", ["", "http://127.0.0.1:1"], ids=["active", "standby"])
async def test_a_good_health_answer_has_the_address_asked_again_at_once(
    vaults: list[FakeVault], breakers: Breakers, token: Secret, dead_leader: str
) -> None:
    client = breakers.client_of([vaults[0].address])
    await frozen_out(client, vaults[0], token)
    assert [each.state for each in await client.health()] == [State.UNREACHABLE]
    await fails(client, token)
    assert client.calls == 3
    vaults[0].frozen, vaults[0].dead_leader = False, dead_leader
    await client.health()
    await client.call(READ, into=dict, auth=token)
    assert client.calls == 4
    await client.close()


@pytest.mark.parametrize("state", ["sealed", "uninitialized"])
async def test_another_health_answer_does_not(
    vaults: list[FakeVault], breakers: Breakers, token: Secret, state: str
) -> None:
    client = breakers.client_of([vaults[0].address])
    setattr(vaults[0], state, True)
    for _ in range(3):
        await fails(client, token)
    assert [str(each.state) for each in await client.health()] == [state]
    await fails(client, token)
    assert client.calls == 3
    await client.close()


async def test_callers_without_number_do_not_fill_the_pool_of_a_vault_that_hangs(
    vaults: list[FakeVault], breakers: Breakers, token: Secret
) -> None:
    """As many as there are threads find out, and two that come before the third failure; later ones know at once."""
    client = breakers.client_of([vaults[0].address], timeout_s=0.5, threads=4)
    vaults[0].frozen = True
    begun = time.monotonic()
    await asyncio.gather(*(fails(client, token) for _ in range(200)))
    assert time.monotonic() - begun < 2.0
    assert client.calls <= 4 + 2
    begun = time.monotonic()
    for _ in range(200):
        await fails(client, token)
    assert time.monotonic() - begun < 0.5
    await client.close()


async def test_a_token_that_cannot_be_sent_is_not_held_against_any_address(
    vaults: list[FakeVault], breakers: Breakers, token: Secret
) -> None:
    client = breakers.client_of([vaults[0].address])
    for _ in range(5):
        await fails(client, Secret("s.\n"))
    await client.call(READ, into=dict, auth=token)
    await client.close()
