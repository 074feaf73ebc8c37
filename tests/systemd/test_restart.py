"""A restart under a real systemd, with live leases at a real vault: callers, vault and disks notice nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.openbao import Bao
from tests.systemd.machine import APP_UID, Machine, children, missing, until
from tokenward.core.audit import verify
from tokenward.core.secret import Secret
from tokenward.errors import VaultDeniedError
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.keeper import NoData

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it can be booted")

CREDENTIALS = 50
CONFIG = f"""
trust_domain = "test.example"

[environment]
name = "test"
vault_paths = ["nowhere"]

[vault]
addresses = ["unix:///opt/vault/bao.sock"]
[vault.signing]
key_file = "/etc/tokenward/signing.pem"

[workloads.app]
selectors = ["unix:uid:{APP_UID}"]
exchange = {{ method = "signed_jwt" }}
""" + "".join(f'[workloads.app.credentials.token-{number}]\nkind = "vault_token"\n' for number in range(CREDENTIALS))

# Fetches everything, says what it got, goes on until its stdin ends within the agent's limits, and says what it saw.
CALLER = f"""
import json, sys, threading
from tokenward.client import Client

names = [f"token-{{number}}" for number in range({CREDENTIALS})]
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()

def ask(client, name):
    got = client.get(name)
    return [got.version, got.values["token"]]

with Client("/run/tokenward/workload.sock", timeout_s=60) as client:
    print(json.dumps({{name: ask(client, name) for name in names}}), flush=True)
    calls, errors, rounds = 0, [], 0
    seen = {{name: [] for name in names}}
    while not ended.is_set():
        for name in names:
            calls += 1
            try:
                got = ask(client, name)
            except Exception as error:
                errors.append(repr(error))
                continue
            if got not in seen[name]:
                seen[name].append(got)
        rounds += 1
        print(rounds, flush=True)
        ended.wait(0.2)
print(json.dumps({{"calls": calls, "errors": errors, "seen": seen}}), flush=True)
"""


class Caller:
    """The app, in a loop from the start to the end of the block; `seen` and `errors` are there afterwards."""

    def __init__(self, machine: Machine) -> None:
        self._app = machine.start_app(CALLER)
        self._machine = machine
        first = self._line()
        self.first: dict[str, Any] = json.loads(first)

    def _line(self) -> str:
        assert self._app.stdout is not None
        line = self._app.stdout.readline()
        if not line:
            _, said = self._app.communicate()
            raise AssertionError(f"the app ended: {said}\n{self._machine.journal()}")
        return line

    def goes_on(self) -> None:
        """Returns after two more rounds: one may have begun before."""
        for _ in range(2):
            self._line()

    def end(self) -> dict[str, Any]:
        out, _ = self._app.communicate(timeout=60)
        told: dict[str, Any] = json.loads(out.splitlines()[-1])
        return told

    def kill(self) -> None:
        if self._app.poll() is None:
            for pid in children(self._app.pid):
                os.kill(pid, signal.SIGKILL)
            self._app.communicate()


@pytest.fixture
def vault() -> Iterator[Bao]:
    with tempfile.TemporaryDirectory(prefix="tokenward-bao-") as directory, Bao(directory=Path(directory)) as started:
        Path(directory).chmod(0o755)  # the agent is another user; the audit log stays ours
        Path(directory, "bao.sock").chmod(0o666)
        yield started


@pytest.fixture
def machine(vault: Bao) -> Iterator[Machine]:
    """The shipped units, with the agent's configuration; the vault is set up for it."""
    key = ["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout"]
    signing = subprocess.run(key, capture_output=True, text=True, check=True).stdout
    etc = {"tokenward/tokenward.toml": CONFIG, "tokenward/signing.pem": signing}
    with Machine(etc=etc, shared={"/opt/vault": vault.audit_file.parent}) as booted:
        booted.run("chgrp", "-R", "tokenward", "/etc/tokenward")
        booted.run("chmod", "640", "/etc/tokenward/signing.pem")
        token = vault.admin_token.reveal()
        as_agent = ("setpriv", "--reuid=tokenward", "--regid=tokenward", "--clear-groups")
        booted.run(*as_agent, "tokenward", "vault-setup", "--apply", "--token-file", "-", given=token)
        booted.run("systemctl", "start", "tokenward.socket")
        yield booted
        for line in booted.journal().splitlines():
            assert "Traceback" not in line, booted.journal()


@pytest.fixture
def caller(machine: Machine) -> Iterator[Caller]:
    """Starts the agent too, by its first call."""
    started = Caller(machine)
    yield started
    started.kill()


def audited(machine: Machine) -> list[dict[str, Any]]:
    """The agents' own records so far, which are one chain."""
    lines = (machine.root / "var/log/tokenward/audit.jsonl").read_bytes().splitlines()
    verify(lines)
    return [json.loads(line)["record"] for line in lines]


def test_a_restart_with_50_live_leases_is_noticed_by_nobody(machine: Machine, vault: Bao, caller: Caller) -> None:
    caller.goes_on()
    before, pid = len(vault.requests()), machine.show("tokenward", "MainPID")
    machine.run("systemctl", "restart", "tokenward")
    assert machine.show("tokenward", "MainPID") not in {pid, "0"}
    caller.goes_on()
    told = caller.end()

    assert told["errors"] == []
    assert told["calls"] >= 4 * CREDENTIALS
    assert {name: [got] for name, got in caller.first.items()} == told["seen"]
    assert [request["path"] for request in vault.requests()[before:]] == []
    assert accepted(vault, caller) == CREDENTIALS
    assert machine.show("tokenward", "NFileDescriptorStore") == "0"
    records = audited(machine)
    handovers = [record["detail"].split()[0] for record in records if record["event"] == "handover"]
    assert handovers == ["left", "took"]
    assert len({record["fingerprint"] for record in records if "fingerprint" in record}) == CREDENTIALS

    for name in ("token-0", f"token-{CREDENTIALS - 1}"):
        assert machine.files_with(caller.first[name][1].encode()) == []


def test_files_are_searched_where_a_secret_would_be(machine: Machine) -> None:
    places = ("/var/lib/x", "/run/x", "/tmp/x", "/dev/shm/x", "/root/x")
    for place in places:
        machine.run("sh", "-c", f"echo needle-{place.replace('/', '')} >{place}")
        (found,) = machine.files_with(f"needle-{place.replace('/', '')}".encode())
        assert found.endswith(place)


def test_credentials_outlive_restart_after_restart(machine: Machine, vault: Bao, caller: Caller) -> None:
    before = len(vault.requests())
    for _ in range(3):
        machine.run("systemctl", "restart", "tokenward")
        caller.goes_on()
    told = caller.end()
    assert told["errors"] == []
    assert {name: [got] for name, got in caller.first.items()} == told["seen"]
    assert [request["path"] for request in vault.requests()[before:]] == []


def test_a_stop_leaves_no_lease_at_the_vault(machine: Machine, vault: Bao, caller: Caller) -> None:
    assert accepted(vault, caller) == CREDENTIALS
    machine.run("systemctl", "stop", "tokenward.socket", "tokenward.service")
    assert machine.show("tokenward", "ActiveState") == "inactive"
    assert accepted(vault, caller) == 0
    assert machine.show("tokenward", "NFileDescriptorStore") == "0"


def test_where_the_manager_keeps_nothing_the_leases_are_revoked(machine: Machine, vault: Bao, caller: Caller) -> None:
    machine.run("mkdir", "/etc/systemd/system/tokenward.service.d")
    override = machine.root / "etc/systemd/system/tokenward.service.d/no-store.conf"
    override.write_text("[Service]\nFileDescriptorStoreMax=0\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "tokenward")
    caller.goes_on()
    assert accepted(vault, caller) == 0
    assert caller.end()["errors"] == []
    assert "did not take" in machine.journal()


def test_a_restart_of_an_agent_that_was_killed_goes_on_without_what_it_held(machine: Machine, caller: Caller) -> None:
    pid = machine.show("tokenward", "MainPID")
    machine.run("kill", "-KILL", pid)
    until(lambda: machine.show("tokenward", "MainPID") not in {pid, "0"}, machine.journal)
    caller.goes_on()
    assert caller.end()["errors"] == []


def test_an_agent_that_stands_still_is_replaced_and_its_callers_recover(machine: Machine, caller: Caller) -> None:
    machine.run("mkdir", "/etc/systemd/system/tokenward.service.d")
    override = machine.root / "etc/systemd/system/tokenward.service.d/soon.conf"
    override.write_text("[Service]\nWatchdogSec=2s\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "tokenward")
    pid = machine.show("tokenward", "MainPID")
    for _ in range(4):  # longer than the limit: it is fed
        last = machine.show("tokenward", "WatchdogTimestampMonotonic")
        until(lambda last=last: machine.show("tokenward", "WatchdogTimestampMonotonic") != last)  # type: ignore[misc]
    assert machine.show("tokenward", "MainPID") == pid

    machine.run("kill", "-STOP", pid)
    until(lambda: machine.show("tokenward", "MainPID") not in {pid, "0"}, machine.journal)
    caller.goes_on()
    assert caller.end()["errors"] == []
    assert machine.show("tokenward", "NRestarts") == "1"
    assert "Watchdog timeout" in machine.journal()


def test_a_grant_that_was_taken_away_ends_with_the_restart(machine: Machine, vault: Bao, caller: Caller) -> None:
    caller.kill()
    config = machine.root / "etc/tokenward/tokenward.toml"
    config.write_text(config.read_text().replace('[workloads.app.credentials.token-0]\nkind = "vault_token"\n', ""))
    machine.run("systemctl", "restart", "tokenward")
    until(lambda: accepted(vault, caller) == CREDENTIALS - 1, machine.journal)


def test_a_reload_is_reported_to_systemd(machine: Machine, caller: Caller) -> None:
    machine.run("systemctl", "reload", "tokenward")
    until(lambda: "reload" in {record["event"] for record in audited(machine)}, machine.journal)
    assert machine.show("tokenward", "ActiveState") == "active"
    caller.goes_on()
    assert caller.end()["errors"] == []


def accepted(vault: Bao, caller: Caller) -> int:
    """How many of the tokens that the app got first the vault still knows."""

    async def ask() -> int:
        client = VaultClient(addresses=[vault.address])
        known = 0
        try:
            for _, token in caller.first.values():
                with suppress(VaultDeniedError):
                    await client.call(VaultRequest("GET", "auth/token/lookup-self"), into=NoData, auth=Secret(token))
                    known += 1
        finally:
            await client.close()
        return known

    return asyncio.run(ask())
