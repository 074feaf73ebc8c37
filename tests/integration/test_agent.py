"""The agent on a vault that was there before it, set up by `vault-setup`: exchange, refresh, revocation, trouble."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import grpc
import psycopg
import pytest
from grpc_status import rpc_status

from tests.agents import TOKENWARD, Process
from tests.openbao import Bao
from tests.postgres import Postgres
from tests.site import Site, prepared, until
from tokenward.client import Client
from tokenward.errors import NotFoundError, Reason, TokenwardError, UnavailableError


def test_fields_of_a_secret_arrive_as_text(client: Client) -> None:
    values = client.get("api").values
    assert (values["api_key"], values["retries"]) == ("first", "3")


def test_a_thousand_callers_of_one_cold_credential_are_one_request_at_the_vault(site: Site, client: Client) -> None:
    threads = 50
    gate = threading.Barrier(threads)

    def ask(_: int) -> set[str]:
        gate.wait()
        return {client.get("cold").values["token"] for _ in range(1000 // threads)}

    with ThreadPoolExecutor(threads) as pool:
        answers = set().union(*pool.map(ask, range(threads)))
    assert answers == {"cold"}
    reads = [request for request in site.vault.requests() if request["path"] == "tests/data/cold"]
    assert len(reads) == 1 + 1, "written once by the test, read once by the agent"


async def test_a_changed_secret_reaches_those_who_watch(site: Site, client: Client) -> None:
    handle = client.credential("api")
    assert handle.value["api_key"] == "first"
    await site.admin("POST", "tests/data/api", {"data": {"api_key": "second"}})
    until(lambda: handle.value["api_key"] == "second", "the new value")
    assert handle.credential.version == 2
    assert handle.credential.previous is not None
    assert handle.credential.previous.values["api_key"] == "first"


def test_a_missing_secret_says_so(client: Client) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.get("missing")
    assert caught.value.reason is Reason.SECRET_NOT_FOUND
    assert "tests/data/missing" in caught.value.public


def test_status_details_are_those_that_any_client_reads(site: Site, agent: Process) -> None:
    from google.rpc import error_details_pb2

    from tokenward.v1 import credentials_pb2 as pb
    from tokenward.v1 import credentials_pb2_grpc as rpc

    del agent
    with grpc.insecure_channel(f"unix:{site.socket}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            rpc.CredentialServiceStub(channel).GetCredential(pb.GetCredentialRequest(name="nope"))
        status = rpc_status.from_call(cast("grpc.Call", caught.value))
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("tokenward", "NOT_GRANTED")


async def test_a_database_login_never_fails_while_it_is_renewed_replaced_and_revoked(
    directory: Path, fresh_bao: Bao, postgres: Postgres
) -> None:
    """Leases of 6 s that can be renewed to 12. TOKENWARD_SOAK=180 makes it three minutes with leases of 20 s to 60."""
    seconds = float(os.environ.get("TOKENWARD_SOAK", "20"))
    ttl, max_ttl = ("6s", "12s") if seconds < 120 else ("20s", "60s")
    site = await prepared(directory, fresh_bao, postgres, ttl=ttl, max_ttl=max_ttl, overlap="3s")
    seen: set[str] = set()
    failures = []
    queries = 0
    with site.agent() as agent:
        agent.wait_for_log("serving on")
        with Client(site.socket) as client:
            handle = client.credential("db")
            give_up = time.monotonic() + seconds
            while time.monotonic() < give_up:
                value = handle.value
                seen.add(value["username"])
                queries += 1
                try:
                    with psycopg.connect(site.postgres.url(user=value["username"], password=value["password"])) as db:
                        db.execute("SELECT 1").fetchone()
                except psycopg.Error as error:
                    failures.append(error)
            until(lambda: site.logins() == {handle.value["username"]}, "only the live login is left")
    print(f"{queries} queries with {len(seen)} logins, {len(failures)} failed")
    assert failures == []
    assert len(seen) >= 2
    events = [record["event"] for record in site.audit() if record.get("credential") == "db"]
    assert {"issue", "renew", "revoke"} <= set(events)
    assert site.logins() == set(), "the last one went with the agent"


def test_a_login_that_was_refused_is_replaced_at_once_and_the_old_one_goes_when_all_have_moved_on(
    site: Site, client: Client
) -> None:
    """Without the acknowledgement that the client sends by itself, the old login would stay for the overlap of 30 s."""
    handle = client.credential("db")
    first = handle.credential
    with Client(site.socket) as other:
        watching = other.credential("db")
        assert watching.version == first.version
        second = client.report_rejected(first)
        assert second.version == first.version + 1
        assert client.report_rejected(second).version == second.version, "somebody just looked"
        until(lambda: handle.version == watching.version == second.version, "both watch the new login")
        began = time.monotonic()
        until(lambda: site.logins() == {second.values["username"]}, "the old login is gone")
        assert time.monotonic() - began < 15


def test_stopping_the_agent_leaves_no_login_behind(site: Site) -> None:
    with site.agent() as agent, Client(site.socket) as client:
        agent.wait_for_log("serving on")
        username = client.get("db").values["username"]
        assert username in site.logins()
        assert agent.stop() == 0
    assert username not in site.logins()
    assert [record["event"] for record in site.audit()][-2:] == ["revoke", "stop"]


def test_a_vault_that_is_away_at_start_is_waited_for(site: Site) -> None:
    """The agent starts, says why it is not ready, tells callers, and serves once the vault is there."""
    socket = Path(site.vault.address.removeprefix("unix://"))
    away = socket.rename(socket.with_suffix(".away"))
    with site.agent() as agent, Client(site.socket) as client:
        agent.wait_for_log("not ready: ")
        began = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            client.get("api")
        assert time.monotonic() - began < 6
        assert caught.value.reason is Reason.VAULT_UNREACHABLE
        away.rename(socket)
        agent.wait_for_log("ready again")

        def served() -> bool:
            try:
                return client.get("api").values["api_key"] == "first"
            except TokenwardError:
                return False

        until(served, "a value from the vault that is back")


def test_a_second_agent_on_the_same_socket_names_the_first(site: Site, agent: Process, directory: Path) -> None:
    other = directory / "other.toml"
    other.write_text(site.config.read_text().replace("audit.jsonl", "other.jsonl"))
    again = subprocess.run([TOKENWARD, "run", "--config", str(other)], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert str(agent.pid) in again.stderr


def test_setting_up_again_changes_nothing(site: Site) -> None:
    again = site.vault_setup("--apply", "--token-file", "-")
    assert "created" not in again
    assert "corrected" not in again
    assert "unchanged" in again
    assert site.vault.admin_token.reveal() not in again


def test_without_apply_the_plan_is_printed_and_nothing_is_made(site: Site) -> None:
    before = len(site.vault.requests())
    plan = site.vault_setup()
    assert "tests/data/api" in plan
    assert len(site.vault.requests()) == before
