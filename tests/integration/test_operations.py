"""A running agent and its operator: reload, revoke, lift, rotate, and what is there after a restart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.agents import TOKENWARD, Process
from tests.openbao import Bao
from tests.postgres import Postgres
from tests.site import CREATE, REVOKE, Site, prepared, until
from tokenward.client import Client
from tokenward.errors import DeniedError, NotFoundError, Reason, RevokedError
from tokenward.v1 import admin_pb2, admin_pb2_grpc
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc


def admin(site: Site, *arguments: str) -> subprocess.CompletedProcess[str]:
    socket = str(site.directory / "admin" / "admin.sock")
    return subprocess.run(
        [TOKENWARD, "admin", "--socket", socket, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def watching(channel: grpc.Channel, name: str) -> Iterator[pb.WatchCredentialsResponse]:
    return iter(rpc.CredentialServiceStub(channel).WatchCredentials(pb.WatchCredentialsRequest(names=[name])))


def rewrite(site: Site, old: str, new: str) -> None:
    text = site.config.read_text()
    assert old in text
    site.config.write_text(text.replace(old, new))


# -- reload -----------------------------------------------------------------------------------------------------------


def test_a_reload_keeps_what_did_not_change_and_ends_what_is_gone(site: Site, agent: Process, client: Client) -> None:
    kept, login = client.credential("api"), client.credential("db")
    first, username = kept.credential, login.value["username"]
    reads = [request["path"] for request in site.vault.requests()].count("tests/data/api")
    rewrite(site, "[workloads.connector.credentials.db]", "[workloads.connector.credentials.db2]")
    agent.send(signal.SIGHUP)
    agent.wait_for_log("the configuration was replaced: 1 workloads changed")
    until(lambda: username not in site.logins(), "the login of the grant that is gone is revoked")
    assert client.get("api").version == first.version
    assert [request["path"] for request in site.vault.requests()].count("tests/data/api") == reads
    with pytest.raises(DeniedError) as caught:
        client.get("db")
    assert caught.value.reason is Reason.NOT_GRANTED
    assert client.get("db2").values["username"] in site.logins(), "and what is new is there"
    assert "reload" in [record["event"] for record in site.audit()]


async def test_a_watch_goes_on_over_a_reload(site: Site, agent: Process, client: Client) -> None:
    handle = client.credential("api")
    assert handle.value["api_key"] == "first"
    rewrite(site, 'path = "tests/cold"', 'path = "tests/missing"')
    agent.send(signal.SIGHUP)
    agent.wait_for_log("the configuration was replaced")
    await site.admin("POST", "tests/data/api", {"data": {"api_key": "second"}})
    until(lambda: handle.value["api_key"] == "second", "the new value")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[policies.short]", "[policies.short]\nnonsense = 1", "nonsense: unknown key"),
        ('trust_domain = "test.example"', 'trust_domain = "other.example"', "takes effect after a restart only"),
    ],
)
def test_a_configuration_that_cannot_be_taken_changes_nothing(
    site: Site, agent: Process, client: Client, old: str, new: str, said: str
) -> None:
    before = client.get("api").version
    rewrite(site, old, new)
    agent.send(signal.SIGHUP)
    agent.wait_for_log("the configuration was not replaced")
    assert said in agent.log()
    refused = admin(site, "reload")
    assert refused.returncode == 1
    assert said in refused.stderr
    assert client.get("api").version == before


def test_a_workload_that_is_gone_gets_nothing_any_more_also_on_an_open_stream(site: Site, agent: Process) -> None:
    with grpc.insecure_channel(f"unix:{site.socket}") as channel:
        stream = watching(channel, "api")
        next(stream)
        rewrite(site, 'selectors = ["unix:uid:', 'selectors = ["unix:uid:4')
        assert admin(site, "reload").returncode == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with Client(site.socket) as client, pytest.raises(DeniedError) as denied:
        client.get("api")
    assert denied.value.reason is Reason.NO_MATCHING_WORKLOAD


# -- revocation -------------------------------------------------------------------------------------------------------


def test_a_revoked_credential_is_gone_at_once_for_all_and_at_the_vault_until_it_is_lifted(
    site: Site, agent: Process, client: Client
) -> None:
    del agent
    handle = client.credential("db")
    username = handle.value["username"]
    done = admin(site, "revoke", "connector", "db", "--reason", "found in a paste")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 values ended")
    with pytest.raises(RevokedError) as caught:
        client.get("db")
    assert caught.value.reason is Reason.REVOKED
    assert "found in a paste" in caught.value.public
    until(lambda: username not in site.logins(), "the login is gone at the database")

    def watched() -> str:
        try:
            return handle.value["username"]
        except RevokedError:
            return "revoked"

    until(lambda: watched() == "revoked", "who watches is told")
    assert client.get("api").values["api_key"] == "first", "and nothing else is touched"
    shown = json.loads(admin(site, "status").stdout)
    assert shown["blocks"][0] | {"since": ""} == {
        "scope": {"workload": "connector", "credential": "db"},
        "reason": "found in a paste",
        "by": f"uid {os.getuid()}",
        "since": "",
    }
    wider = admin(site, "unblock", "connector", "--reason", "?")
    assert wider.returncode == 1
    assert "nothing was revoked with these words" in wider.stderr
    assert admin(site, "unblock", "connector", "db", "--reason", "rotated").returncode == 0
    until(lambda: watched() in site.logins(), "the watch has a new login")
    events = [record["event"] for record in site.audit()]
    assert events.index("block") < events.index("unblock")


@pytest.mark.parametrize("scope", [["connector"], ["--all"]])
def test_a_workload_or_everything_can_be_revoked(site: Site, client: Client, scope: list[str]) -> None:
    username = client.get("db").values["username"]
    client.get("api")
    assert admin(site, "revoke", *scope, "--reason", "drill").stdout.startswith("2 values ended")
    for name in ("api", "db", "cold"):
        with pytest.raises(RevokedError):
            client.get(name)
    until(lambda: username not in site.logins(), "the login is gone")
    assert json.loads(admin(site, "status").stdout).get("credentials", []) == []


def test_what_was_revoked_stays_so_after_a_restart_and_what_the_vault_could_not_be_told_is_made_up_for(
    site: Site,
) -> None:
    """The vault is away when it is revoked, and the agent is killed before it is back."""
    with site.agent() as agent, Client(site.socket) as client:
        agent.wait_for_log("serving on")
        username = client.get("db").values["username"]
        os.kill(site.vault.pid, signal.SIGSTOP)
        began_revoking = admin(site, "revoke", "connector", "db", "--reason", "leaked")
        assert began_revoking.returncode == 0
        agent.wait_for_log("could not be revoked yet")
        agent.stop(signal.SIGKILL)
    assert username in site.logins()
    os.kill(site.vault.pid, signal.SIGCONT)
    with site.agent() as agent, Client(site.socket) as client:
        agent.wait_for_log("serving on")
        with pytest.raises(RevokedError):
            client.get("db")
        until(lambda: username not in site.logins(), "the lease is revoked by the agent after")
        until(lambda: "pending_revocations" not in json.loads(admin(site, "status").stdout), "and it knows")
    kept = json.loads((site.directory / "state.json").read_text())
    assert kept["left_over"] == []
    assert [block["reason"] for block in kept["blocks"]] == ["leaked"]


def test_an_operator_has_a_new_value_made(site: Site, client: Client) -> None:
    handle = client.credential("db")
    first = handle.credential
    done = admin(site, "rotate", "connector", "db", "--reason", "leaver")
    assert done.stdout == "connector/db is at version 2\n"
    until(lambda: handle.version == 2, "who watches has it")
    until(lambda: site.logins() == {handle.value["username"]}, "and the old one goes")
    assert first.values["username"] != handle.value["username"]
    nothing = admin(site, "rotate", "connector", "cold", "--reason", "leaver")
    assert nothing.returncode == 1
    assert "nothing is held of connector/cold" in nothing.stderr


def test_status_has_no_value_in_it(site: Site, client: Client) -> None:
    values = {**client.get("db").values, **client.get("api").values}
    shown = admin(site, "status").stdout
    held = {one["credential"]: one for one in json.loads(shown)["credentials"]}
    assert held.keys() == {"db", "api"}
    assert len(held["db"]["fingerprint"]) == 16
    assert not [value for value in values.values() if len(value) > 3 and value in shown]


def test_the_two_sockets_have_nothing_of_each_other(site: Site, agent: Process) -> None:
    del agent
    with grpc.insecure_channel(f"unix:{site.socket}") as channel, pytest.raises(grpc.RpcError) as caught:
        admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert os.listdir(site.directory / "inner") == [], "and there is no way around the doors"
    with grpc.insecure_channel(f"unix:{site.directory}/admin/admin.sock") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            rpc.CredentialServiceStub(channel).GetCredential(pb.GetCredentialRequest(name="api"))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("arguments", [["revoke", "--reason", "x"], ["revoke", "connector"], ["revoke", "a", "--all"]])
def test_a_revocation_needs_a_scope_and_a_reason(site: Site, agent: Process, arguments: list[str]) -> None:
    del agent
    assert admin(site, *arguments).returncode == 2


# -- from outside, and when nobody is left ----------------------------------------------------------------------------


async def test_a_secret_is_read_once_per_version_and_a_deleted_one_ends(site: Site, client: Client) -> None:
    handle = client.credential("api")
    assert handle.value["api_key"] == "first"

    def paths() -> list[str]:
        return [request["path"] for request in site.vault.requests()]

    until(lambda: paths().count("tests/metadata/api") >= 3, "three polls")
    assert paths().count("tests/data/api") == 1 + 1, "written once, read once"
    await site.admin("DELETE", "tests/data/api")

    def ended() -> bool:
        try:
            return handle.value is None
        except NotFoundError:
            return True

    until(ended, "who watches is told that it was deleted")
    with pytest.raises(NotFoundError) as caught:
        client.get("api")
    assert caught.value.reason is Reason.SECRET_NOT_FOUND
    await site.admin("POST", "tests/undelete/api", {"versions": [1]})
    until(lambda: not ended() and handle.value["api_key"] == "first", "it comes back when it is undeleted")


async def test_a_lease_that_was_revoked_at_the_vault_is_replaced_at_the_next_contact(
    directory: Path, fresh_bao: Bao, postgres: Postgres
) -> None:
    site = await prepared(directory, fresh_bao, postgres, ttl="8s", max_ttl="60s", overlap="3s")
    with site.agent() as agent, Client(site.socket) as client:
        agent.wait_for_log("serving on")
        handle = client.credential("db")
        first = handle.credential
        await site.admin("PUT", "sys/leases/revoke-prefix/database/creds/app", {"sync": True})
        assert site.logins() == set()
        until(lambda: handle.version == first.version + 1, "a new login")
        assert handle.credential.previous is None, "the dead one is no previous value"
        assert site.logins() == {handle.value["username"]}
        assert "was ended at the vault" in agent.log()


def test_when_the_last_process_of_a_workload_has_gone_its_login_goes(site: Site) -> None:
    rewrite(site, "[leases]", '[leases]\nlinger = "1s"')
    program = f"import sys, tokenward; c = tokenward.Client({site.socket!r}); print(c.get('db').values['username']); "
    program += "sys.stdout.flush(); sys.stdin.read()"
    with site.agent() as agent:
        agent.wait_for_log("serving on")
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as app:
            assert app.stdout is not None
            username = app.stdout.readline().strip()
            assert username in site.logins()
            assert app.stdin is not None
            app.stdin.close()
            app.wait(30)
        until(lambda: username not in site.logins(), "the login goes a second after its last user")


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stop_ends_streams_so_that_clients_come_back(site: Site) -> None:
    with site.agent() as agent, grpc.insecure_channel(f"unix:{site.socket}") as channel:
        agent.wait_for_log("serving on")
        stream = watching(channel, "api")
        next(stream)
        caught: list[grpc.RpcError] = []

        def read() -> None:
            try:
                next(stream)
            except grpc.RpcError as error:
                caught.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        assert agent.stop(signal.SIGTERM) == 0
        reader.join(10)
    assert [error.code() for error in caught] == [grpc.StatusCode.UNAVAILABLE]


async def test_leases_can_be_kept_over_a_stop(site: Site) -> None:
    rewrite(site, "[leases]", '[leases]\non_stop = "keep"')
    with site.agent() as agent, Client(site.socket) as client:
        agent.wait_for_log("serving on")
        username = client.get("db").values["username"]
        assert agent.stop(signal.SIGTERM) == 0
    assert username in site.logins()
    await site.admin("PUT", "sys/leases/revoke-prefix/database/creds/app", {"sync": True})
    assert username not in site.logins(), "or the next test would find it"


def test_a_client_that_watches_does_not_notice_that_the_agent_was_restarted(site: Site) -> None:
    with site.agent() as agent, Client(site.socket) as client:
        agent.wait_for_log("serving on")
        handle = client.credential("api")
        assert handle.value["api_key"] == "first"
        assert agent.stop(signal.SIGTERM) == 0
        assert handle.value["api_key"] == "first", "it is valid still"
        with site.agent() as again:
            again.wait_for_log("serving on")
            assert client.get("api").values["api_key"] == "first"
            assert handle.value["api_key"] == "first"


# -- validation -------------------------------------------------------------------------------------------------------


async def test_a_login_that_does_not_log_in_is_never_served(site: Site) -> None:
    """The database role is broken at the vault and mended again: callers keep the old login meanwhile."""
    check = f'validate = {{ postgresql = "127.0.0.1:{site.postgres.port}/postgres", sslmode = "disable" }}'
    rewrite(site, 'path = "database/creds/app"', f'path = "database/creds/app"\n{check}')
    role: dict[str, object] = {"db_name": "pg", "default_ttl": "60s", "max_ttl": "60s", "revocation_statements": REVOKE}
    with site.agent() as agent, Client(site.socket) as client:
        agent.wait_for_log("serving on")
        first = client.get("db")
        broken = role | {"creation_statements": [CREATE.replace("WITH LOGIN", "WITH NOLOGIN")]}
        await site.admin("POST", "database/roles/app", broken)
        again = client.report_rejected(first)
        assert (again.version, again.stale) == (first.version, True)
        assert "refused the new login" in agent.log()
        until(lambda: site.logins() == {first.values["username"]}, "the bad login is revoked")
        await site.admin("POST", "database/roles/app", role | {"creation_statements": [CREATE]})
        done = admin(site, "rotate", "connector", "db", "--reason", "mended")
        assert done.returncode == 0, done.stderr
        assert client.get("db").version == first.version + 1
    assert ("validate", "VALIDATION_FAILED") in [(one["event"], one.get("outcome")) for one in site.audit()]
