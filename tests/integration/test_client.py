"""The client against a fake agent: real gRPC, real sockets, real threads, real forks."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fakes.agent import FakeAgent, details, wait_for
from tokenward import (
    AsyncClient,
    Change,
    Client,
    CredentialHandle,
    DeniedError,
    InvalidRequestError,
    Reason,
    RevokedError,
    TokenwardError,
    UnavailableError,
    VaultUnavailableError,
)
from tokenward.client.connection import Stream
from tokenward.v1 import credentials_pb2 as pb

SEALED = VaultUnavailableError(Reason.VAULT_SEALED, "unseal the vault")
GONE = DeniedError(Reason.IDENTITY_CHANGED, "this process is no longer the workload it was")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(str(tmp_path / "a.sock")) as agent:
        agent.put("db")
        agent.put("other")
        yield agent


@pytest.fixture
def client(agent: FakeAgent) -> Iterator[Client]:
    with Client(agent.path) as client:
        yield client


def reason_of(call: Callable[[], object]) -> Reason | None:
    try:
        call()
    except TokenwardError as error:
        return error.reason
    return None


# -- calls -----------------------------------------------------------------------------------------------------------


def test_get_gives_the_credential_as_the_agent_has_it(agent: FakeAgent, client: Client) -> None:
    agent.put("token", kind="jwt", version=7, audience="ledger", values={"token": "abc"})
    got = client.get("token", audience="ledger")
    assert (got.name, got.kind, got.version, got.audience) == ("token", "jwt", 7, "ledger")
    assert got.values["token"] == "abc"
    assert agent.gets[-1].audience == "ledger"


def test_what_this_process_may_have_and_is(client: Client) -> None:
    assert [(grant.name, grant.scopes) for grant in client.list_grants()] == [("db", ("read",)), ("other", ("read",))]
    assert client.identity().spiffe_id == "spiffe://acme.example/app"


def test_a_refusal_is_raised_with_its_reason_and_advice(agent: FakeAgent, client: Client) -> None:
    with pytest.raises(DeniedError, match="have one added") as raised:
        client.get("nothing")
    assert raised.value.reason is Reason.NOT_GRANTED
    agent.fail("db", VaultUnavailableError(Reason.VAULT_RATE_LIMITED, "slower", retry_after_s=1.5))
    with pytest.raises(VaultUnavailableError) as limited:
        client.get("db")
    assert limited.value.retry_after_s == 1.5


def test_a_reason_of_a_newer_agent_is_one_of_our_errors(agent: FakeAgent, client: Client) -> None:
    agent.answer_raw(
        grpc.StatusCode.PERMISSION_DENIED, "not at night", ("grpc-status-details-bin", details("OUT_OF_HOURS"))
    )
    with pytest.raises(DeniedError, match="not at night"):
        client.get("db")


def test_many_threads_share_one_client_and_one_connection(agent: FakeAgent, client: Client) -> None:
    with ThreadPoolExecutor(16) as threads:
        got = list(threads.map(lambda _: client.get("db").version, range(200)))
    assert got == [1] * 200
    assert agent.peers == [os.getpid()]


def test_a_deadline_ends_a_call_to_a_slow_agent(agent: FakeAgent, client: Client) -> None:
    agent.get_delay_s = 5.0
    began_mono = time.monotonic()
    with pytest.raises(UnavailableError, match=r"did not answer within 0\.2 s") as raised:
        client.get("db", timeout_s=0.2)
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED
    assert time.monotonic() - began_mono < 1.0


def test_no_time_at_all_is_a_mistake_in_the_call(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="more than 0"):
        client.get("db", timeout_s=0)


def test_an_agent_that_is_not_there_is_named_within_the_deadline(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with Client(path, timeout_s=0.3) as client:
        for call in (lambda: client.get("db"), client.list_grants, lambda: client.credential("db").value):
            began_mono = time.monotonic()
            with pytest.raises(UnavailableError, match=re.escape(path)) as raised:
                call()
            assert raised.value.reason is Reason.AGENT_UNREACHABLE
            assert "start the agent" in raised.value.public
            assert time.monotonic() - began_mono < 1.0
        with pytest.raises(UnavailableError, match="start the agent"):
            next(client.watch())


def test_a_socket_that_nobody_serves_is_told_apart(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    with Client(path, timeout_s=0.2) as client, pytest.raises(UnavailableError, match="has stopped"):
        client.get("db")


def test_a_call_waits_for_an_agent_that_is_just_starting(tmp_path: Path) -> None:
    agent = FakeAgent(str(tmp_path / "a.sock"))
    agent.put("db")
    with Client(agent.path) as client, ThreadPoolExecutor(1) as thread:
        call = thread.submit(client.get, "db")
        with pytest.raises(TimeoutError):
            call.result(0.3)
        with agent:
            assert call.result(5).version == 1


def test_a_call_is_repeated_when_the_agent_goes_away_in_the_middle(agent: FakeAgent, client: Client) -> None:
    agent.get_delay_s = 0.3
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(client.get, "db")
        wait_for(lambda: agent.gets)
        agent.cut()
        assert call.result(5).version == 1
    assert len(agent.gets) == 2


def test_an_agent_that_shuts_down_is_waited_for(agent: FakeAgent, client: Client) -> None:
    agent.refuse(UnavailableError(Reason.SHUTTING_DOWN, "the agent is stopping"))
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(client.get, "db")
        wait_for(lambda: len(agent.gets) > 1)
        agent.refuse(None)
        assert call.result(5).version == 1


# -- handles ---------------------------------------------------------------------------------------------------------


def test_a_handle_shows_each_rotation(agent: FakeAgent, client: Client) -> None:
    db = client.credential("db")
    assert db.value["password"] == "db-1"
    for version in range(2, 6):
        agent.rotate("db")
        wait_for(lambda: db.version == version)  # noqa: B023 -- called within the round
        assert db.value["password"] == f"db-{version}"
    assert agent.watches == [("db",)]
    assert not agent.gets


def test_a_new_version_is_acknowledged_once_it_is_in_use_and_the_callbacks_are_through(
    agent: FakeAgent, client: Client
) -> None:
    handle = client.credential("db")
    seen: list[tuple[int, int]] = []
    handle.on_change(lambda change: seen.append((handle.version, len(agent.acknowledged))))
    assert handle.version == 1
    previous = pb.PreviousValues(version=1, values={"password": "db-1"})
    agent.rotate("db", previous=previous)
    wait_for(lambda: agent.acknowledged == [("db", 2)])
    assert seen[-1] == (2, 0), "the callback came first"
    agent.rotate("db")
    wait_for(lambda: handle.version == 3)
    assert agent.acknowledged == [("db", 2)], "without an overlap there is nothing to end"


def test_a_refused_credential_is_reported_and_answered_with_what_there_is_now(agent: FakeAgent, client: Client) -> None:
    refused = client.get("db")
    replaced = client.report_rejected(refused)
    assert (replaced.name, replaced.version) == ("db", refused.version + 1)


async def test_a_refused_credential_is_reported_from_a_loop_as_well(agent: FakeAgent) -> None:
    async with AsyncClient(agent.path) as client:
        refused = await client.get("db")
        assert (await client.report_rejected(refused)).version == refused.version + 1


def test_a_handle_asks_for_nothing_before_its_first_use(agent: FakeAgent, client: Client) -> None:
    client.credential("db")
    assert client.get("other")
    assert not agent.watches


def test_handles_made_together_share_one_stream_with_exactly_their_names(agent: FakeAgent, client: Client) -> None:
    agent.put("unused")
    db, other, again = client.credential("db"), client.credential("other"), client.credential("db")
    assert (db.version, other.version, again.version) == (1, 1, 1)
    assert agent.watches[-1] == ("db", "other")
    agent.rotate("db")
    wait_for(lambda: again.version == 2)
    assert db.version == 2


def test_a_handle_added_later_does_not_disturb_the_others(agent: FakeAgent, client: Client) -> None:
    db = client.credential("db")
    seen: list[Change] = []
    assert db.version == 1
    db.on_change(seen.append)
    other = client.credential("other")
    assert other.version == 1
    agent.rotate("other")
    agent.rotate("db")
    wait_for(lambda: (db.version, other.version) == (2, 2))
    assert [change.credential and change.credential.version for change in seen] == [2]


def test_reading_a_value_costs_less_than_a_microsecond_and_no_system_call(client: Client) -> None:
    db = client.credential("db")
    assert db.value
    count = 100_000
    best_s = 1.0
    for _ in range(7):
        began_mono = time.perf_counter()
        for _ in range(count):
            db.value  # noqa: B018 -- the read is what is measured
        best_s = min(best_s, time.perf_counter() - began_mono)
    assert best_s / count < 1e-6


def test_a_name_that_is_not_granted_raises_and_does_not_stop_the_others(agent: FakeAgent, client: Client) -> None:
    db, wrong = client.credential("db"), client.credential("wrong")
    assert db.version == 1
    assert reason_of(lambda: wrong.value) is Reason.NOT_GRANTED
    agent.rotate("db")
    wait_for(lambda: db.version == 2)
    assert reason_of(lambda: wrong.value) is Reason.NOT_GRANTED


def test_a_grant_that_is_withdrawn_ends_its_own_handle_only(agent: FakeAgent, client: Client) -> None:
    db, other = client.credential("db"), client.credential("other")
    assert (db.version, other.version) == (1, 1)
    agent.withdraw("db")
    wait_for(lambda: reason_of(lambda: db.value) is Reason.NOT_GRANTED)
    agent.rotate("other")
    wait_for(lambda: other.version == 2)


def test_a_credential_without_a_value_raises_why_and_recovers(agent: FakeAgent, client: Client) -> None:
    agent.fail("db", SEALED)
    db = client.credential("db")
    with pytest.raises(VaultUnavailableError, match="unseal the vault"):
        db.value  # noqa: B018 -- raises
    agent.put("db", version=4)
    wait_for(lambda: reason_of(lambda: db.value) is None)
    assert db.version == 4
    agent.fail("db", RevokedError(Reason.REVOKED, "revoked by an operator"))
    wait_for(lambda: reason_of(lambda: db.value) is Reason.REVOKED)
    with pytest.raises(RevokedError):
        db.version  # noqa: B018 -- raises


def test_an_expired_value_is_never_handed_out(agent: FakeAgent, client: Client) -> None:
    agent.put("db", ttl_s=0.4)
    db = client.credential("db")
    assert db.value["password"] == "db-1"
    agent.stop()
    wait_for(lambda: reason_of(lambda: db.value) is Reason.EXPIRED)
    with pytest.raises(UnavailableError, match="start the agent"):
        db.value  # noqa: B018 -- raises


def test_the_last_value_is_served_while_the_agent_is_away_and_replaced_when_it_is_back(
    agent: FakeAgent, client: Client
) -> None:
    db = client.credential("db")
    assert db.version == 1
    agent.stop()
    assert db.value["password"] == "db-1"
    agent.rotate("db")
    agent.start()
    wait_for(lambda: db.version == 2)


def test_a_lost_connection_is_made_again_for_ever(agent: FakeAgent, client: Client) -> None:
    db = client.credential("db")
    for version in range(1, 5):
        wait_for(lambda: db.version == version)  # noqa: B023 -- called within the round
        agent.cut()
        agent.rotate("db")
    wait_for(lambda: db.version == 5)


def test_a_withdrawn_identity_drops_the_value_at_once_and_a_restored_one_brings_it_back(
    agent: FakeAgent, client: Client
) -> None:
    db = client.credential("db")
    assert db.version == 1
    agent.refuse(GONE)
    wait_for(lambda: reason_of(lambda: db.value) is Reason.IDENTITY_CHANGED, timeout_s=1.0)
    with pytest.raises(DeniedError, match="no longer the workload"):
        db.value  # noqa: B018 -- raises
    agent.refuse(None)
    wait_for(lambda: reason_of(lambda: db.value) is None, timeout_s=10)


def test_an_agent_that_cannot_tell_who_calls_leaves_the_value_be(agent: FakeAgent, client: Client) -> None:
    db = client.credential("db")
    assert db.version == 1
    agent.refuse(UnavailableError(Reason.ATTESTATION_INCOMPLETE, "cannot read /proc"))
    wait_for(lambda: len(agent.watches) > 2)
    assert db.value["password"] == "db-1"
    assert reason_of(lambda: client.credential("other").value) is Reason.ATTESTATION_INCOMPLETE


def test_callbacks_are_told_of_changes_and_of_the_end(agent: FakeAgent, client: Client) -> None:
    seen: list[Change] = []
    db = client.credential("db")
    db.on_change(lambda change: 1 / 0)
    db.on_change(seen.append)
    wait_for(lambda: len(seen) == 1)
    agent.put("db", stale=True)
    wait_for(lambda: len(seen) == 2)
    assert db.stale
    agent.fail("db", RevokedError(Reason.REVOKED, "revoked"))
    wait_for(lambda: len(seen) == 3)
    assert isinstance(seen[2].error, RevokedError)
    assert seen[2].credential is None


def test_a_callback_may_use_the_client(agent: FakeAgent, client: Client) -> None:
    got: list[int] = []
    client.credential("db").on_change(lambda change: got.append(client.get("other").version))
    wait_for(lambda: got == [1])


# -- watch -----------------------------------------------------------------------------------------------------------


def test_watch_gives_the_state_and_then_each_change_over_a_restart(agent: FakeAgent, client: Client) -> None:
    changes = client.watch()
    first = {next(changes).name, next(changes).name}
    assert first == {"db", "other"}
    agent.stop()
    agent.rotate("db")
    agent.start()
    change = next(changes)
    assert change.credential is not None
    assert (change.name, change.credential.version) == ("db", 2)
    agent.fail("other", SEALED)
    problem = next(changes)
    assert problem.name == "other"
    assert isinstance(problem.error, VaultUnavailableError)
    changes.close()  # type: ignore[attr-defined]  # a generator, which the annotation does not promise


def test_watch_of_a_name_that_is_not_granted_is_refused(client: Client) -> None:
    with pytest.raises(DeniedError):
        next(client.watch(["db", "wrong"]))


def test_watch_ends_when_the_client_is_closed(agent: FakeAgent) -> None:
    client = Client(agent.path)
    with ThreadPoolExecutor(1) as thread:
        told = threading.Event()

        def follow() -> int:
            count = 0
            for _ in client.watch(["db"]):
                count += 1
                told.set()
            return count

        followed = thread.submit(follow)
        assert told.wait(5)
        client.close()
        assert followed.result(5) == 1


# -- closing ---------------------------------------------------------------------------------------------------------


def watch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenward")]


def test_a_closed_client_leaves_no_thread_no_value_and_says_so(agent: FakeAgent) -> None:
    client = Client(agent.path)
    db = client.credential("db")
    assert db.value
    assert watch_threads()
    client.close()
    client.close()
    assert not watch_threads()
    for use in (lambda: client.get("db"), lambda: db.value, lambda: db.on_change(print)):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_closing_waits_for_a_callback_that_still_runs(agent: FakeAgent) -> None:
    client = Client(agent.path)
    running, finished = threading.Event(), threading.Event()

    def slow(change: Change) -> None:
        running.set()
        time.sleep(0.2)  # not to synchronise: it is what takes long
        finished.set()

    client.credential("db").on_change(slow)
    assert running.wait(5)
    client.close()
    assert finished.is_set()
    assert not watch_threads()


def test_a_forgotten_client_ends_its_thread(agent: FakeAgent) -> None:
    Client(agent.path).credential("db").value  # noqa: B018 -- a use that leaves the client to the collector
    gc.collect()
    wait_for(lambda: not watch_threads())


def test_an_unclosed_client_does_not_hold_up_the_end_of_the_program(agent: FakeAgent) -> None:
    program = "import sys, tokenward; c = tokenward.Client(sys.argv[1]); db = c.credential('db'); print(db.version)"
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program, agent.path], capture_output=True, text=True, timeout=10, check=True
    )
    assert (ran.stdout, ran.stderr) == ("1\n", "")


# -- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_grpc", [False, True], ids=["alone", "application-uses-grpc"])
def test_parent_and_forked_children_go_on_each_with_a_connection_of_its_own(agent: FakeAgent, own_grpc: bool) -> None:
    children = 4
    app = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.prefork_app", agent.path, str(children), *["own-grpc"][: int(own_grpc)]],
        stdout=subprocess.PIPE,
        text=True,
    )
    events: list[dict[str, Any]] = []
    with app:
        assert app.stdout is not None
        for line in app.stdout:
            events.append(json.loads(line))
            if [event["event"] for event in events].count("ready") == children + 1:
                agent.rotate("db")
    assert app.returncode == 0
    ready = [event for event in events if event["event"] == "ready"]
    assert {(event["got"], event["value"]) for event in ready} == {(1, "db-1")}
    assert [event["event"] for event in events].count("rotated") == children + 1
    assert events[-1]["codes"] == [0] * children
    assert events[-1]["failures"] == []
    assert {event["pid"] for event in ready} <= set(agent.peers)
    forked = [event for event in events if event["event"] == "forked"]
    assert own_grpc or not any(event["core_ran"] for event in forked)
    assert max(event["took_s"] for event in forked) < 2.0


# -- asyncio ---------------------------------------------------------------------------------------------------------


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def test_the_async_client_does_what_the_client_does(agent: FakeAgent) -> None:
    async with AsyncClient(agent.path) as client:
        assert (await client.get("db")).values["password"] == "db-1"
        assert [grant.name for grant in await client.list_grants()] == ["db", "other"]
        assert (await client.identity()).workload == "app"
        db = await client.credential("db")
        assert db.value["password"] == "db-1"
        seen: list[Change] = []
        db.on_change(seen.append)
        agent.rotate("db")
        await until(lambda: seen)
        assert db.version == 2
        with pytest.raises(DeniedError):
            await client.get("nothing")
        with pytest.raises(DeniedError):
            await client.credential("nothing")
    assert not watch_threads()


async def test_many_async_gets_at_once_share_one_connection(agent: FakeAgent) -> None:
    async with AsyncClient(agent.path) as client:
        got = await asyncio.gather(*(client.get("db") for _ in range(200)))
    assert [credential.version for credential in got] == [1] * 200
    assert agent.peers == [os.getpid()]


async def test_a_cancelled_async_get_cancels_the_call(agent: FakeAgent) -> None:
    agent.get_delay_s = 30.0
    async with AsyncClient(agent.path) as client:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.get("db", timeout_s=20)
        await until(lambda: agent.abandoned == 1)
        agent.get_delay_s = 0.0
        assert (await client.get("db")).version == 1


async def test_an_agent_that_is_not_there_is_named_to_async_callers_too(tmp_path: Path) -> None:
    async with AsyncClient(str(tmp_path / "a.sock"), timeout_s=0.3) as client:
        with pytest.raises(UnavailableError, match="start the agent"):
            await client.get("db")
        with pytest.raises(UnavailableError, match="start the agent"):
            await client.credential("db")
        with pytest.raises(UnavailableError, match="start the agent"):
            await anext(aiter(client.watch()))


async def test_async_watch_gives_each_change_and_can_be_left_at_any_time(agent: FakeAgent) -> None:
    async with AsyncClient(agent.path) as client:
        seen = []
        async for change in client.watch(["db"]):
            seen.append(change.credential and change.credential.version)
            if len(seen) == 3:
                break
            agent.rotate("db")
        assert seen == [1, 2, 3]
        with pytest.raises(DeniedError):
            await anext(aiter(client.watch(["nothing"])))


def is_reading(thread: threading.Thread) -> bool:
    """Whether `thread` waits for a message of a watch."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not Stream.read.__code__:
        frame = frame.f_back
    return frame is not None


async def test_a_waiting_async_watch_can_be_cancelled(agent: FakeAgent) -> None:
    async with AsyncClient(agent.path) as client:
        watch = aiter(client.watch(["db"]))
        await anext(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await until(lambda: any(is_reading(thread) for thread in watch_threads()))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: not watch_threads())


# -- the package -----------------------------------------------------------------------------------------------------


def test_importing_tokenward_imports_neither_grpc_nor_anything_of_the_agent() -> None:
    program = "import sys, tokenward; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=10)
    assert not {"grpc", "google", "asyncio", "hvac", "msgspec", "click", "cryptography", "uvloop"} & set(
        ran.stdout.split()
    )


def test_the_client_needs_grpc_and_protobuf_and_nothing_else() -> None:
    program = "import sys, tokenward; tokenward.AsyncClient; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=10)
    ours = {name for name in ran.stdout.split() if name.startswith("tokenward.")}
    allowed = ("tokenward.client", "tokenward.errors", "tokenward.v1")
    assert all(name.startswith(allowed) for name in ours)
    foreign = {name.partition(".")[0] for name in ran.stdout.split()} - set(sys.stdlib_module_names) - {"tokenward"}
    assert not {"hvac", "msgspec", "click", "cryptography", "uvloop", "requests", "jwt"} & foreign


def test_every_public_name_is_there() -> None:
    import tokenward

    for name in tokenward.__all__:
        assert getattr(tokenward, name) is not None
    with pytest.raises(AttributeError):
        tokenward.nothing  # noqa: B018 -- raises
    assert isinstance(Client.__doc__, str)
    assert CredentialHandle is tokenward.CredentialHandle
    assert pb.DESCRIPTOR.package == "tokenward.v1"
