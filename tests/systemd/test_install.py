"""docs/systemd.md, line by line, in a machine that knows nothing of tokenward yet: install, use, upgrade, uninstall."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.openbao import Bao
from tests.systemd.machine import APP_UID, OTHER_UID, ROOT, UNITS, Machine, missing, until
from tests.systemd.wheels import pack, pack_tokenward

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it can be booted")

GUIDE = (ROOT / "docs/systemd.md").read_text()
DROP_INS = Path("/root/tokenward/systemd/drop-ins")
SERVICE_D = Path("/etc/systemd/system/tokenward.service.d")
CA = ("openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-keyout", "/dev/null", "-subj", "/CN=the vault's CA")
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
APPS = ("stripe-sync", "billing", "mailer")

# Beside what the guide has: two more units, and processes that are recognised by user, or by program too.
MORE = f"""
[workloads.billing]
selectors = ["systemd:unit:billing.service"]
exchange = {{ method = "signed_jwt" }}
credentials.billing.kind = "vault_token"

[workloads.mailer]
selectors = ["systemd:unit:mailer.service"]
exchange = {{ method = "signed_jwt" }}
credentials.mailer.kind = "vault_token"

[workloads.load]
selectors = ["unix:uid:{APP_UID}"]
exchange = {{ method = "signed_jwt" }}
credentials.load.kind = "vault_token"

[workloads.by-path]
selectors = ["unix:uid:{OTHER_UID}", "unix:path:/opt/python/bin/{PYTHON}"]
exchange = {{ method = "signed_jwt" }}
credentials.by-path.kind = "vault_token"
"""

APP = """\
#!/usr/local/bin/interpreter
import json
from tokenward import Client, TokenwardError

def ask(client, name):
    try:
        return client.get(name).version
    except TokenwardError as error:
        return str(error.reason)

with Client("/run/tokenward/workload.sock", timeout_s=60) as client:
    identity = client.identity()
    got = {name: ask(client, name) for name in ("ledger", "billing", "mailer", "load")}
print(json.dumps({"spiffe_id": identity.spiffe_id, "selectors": list(identity.selectors), "got": got}), flush=True)
"""

BY_PATH = """
from tokenward import Client, TokenwardError

with Client("/run/tokenward/workload.sock", timeout_s=5) as client:
    try:
        print(client.get("by-path").version)
    except TokenwardError as error:
        print(error.reason)
"""

# Twenty callers, ten gets a second each, whatever happened to the get before; a line with their number now and then.
# They would wait for a socket that is not there; somebody else tries that it always is.
LOAD = """
import json, socket, sys, threading, time
from tokenward import Client

SOCKET = "/run/tokenward/workload.sock"
ended = threading.Event()
took, errors = [], []

def ask(client):
    due = time.monotonic()
    while not ended.is_set():
        began = time.monotonic()
        try:
            client.get("load")
        except Exception as error:
            errors.append(repr(error))
        took.append(time.monotonic() - began)
        due += 0.1
        ended.wait(max(0, due - time.monotonic()))

def connect():
    while not ended.wait(0.05):
        try:
            with socket.socket(socket.AF_UNIX) as own:
                own.connect(SOCKET)
        except OSError as error:
            errors.append(repr(error))

def say():
    while not ended.wait(0.2):
        print(len(took), flush=True)

with Client(SOCKET, timeout_s=60) as client:
    began = time.monotonic()
    threads = [threading.Thread(target=ask, args=(client,)) for _ in range(20)]
    threads += [threading.Thread(target=connect), threading.Thread(target=say)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
print(json.dumps({"gets": len(took), "errors": errors, "slowest_s": max(took), "seconds": seconds}), flush=True)
"""


def shown(heading: str, language: str = "sh") -> list[str]:
    """The blocks of `language` in the guide's section `heading`."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def unit(name: str) -> str:
    """The guide's unit, as that of another application."""
    return shown("An application's unit", "ini")[0].replace("stripe-sync", name)


class Site:
    """A machine in which the guide was followed, with three applications; `wheels` is what its pip finds."""

    def __init__(self, machine: Machine, wheels: Path) -> None:
        self.machine = machine
        self.wheels = wheels

    def ask(self, name: str) -> dict[str, Any]:
        """What the application `name` was told, in a run of its own."""
        self.machine.run("systemctl", "restart", f"{name}.service")
        this_run = f"_SYSTEMD_INVOCATION_ID={self.machine.show(name, 'InvocationID')}"
        found: list[str] = []

        def is_told() -> bool:
            lines = self.machine.run("journalctl", "--output=cat", this_run).splitlines()
            found[:] = [line for line in lines if line.startswith("{")]
            return bool(found)

        until(is_told, self.machine.journal)
        told: dict[str, Any] = json.loads(found[0])
        return told

    @contextmanager
    def drop_in(self, name: str) -> Iterator[None]:
        """The service runs with one of the drop-ins within the block."""
        self.machine.run_shell(f"install -Dm 644 -t {SERVICE_D} {DROP_INS / name}")
        self.restart()
        try:
            yield
        finally:
            self.machine.run("rm", str(SERVICE_D / name))
            self.restart()

    def restart(self) -> None:
        self.machine.run_shell("systemctl daemon-reload && systemctl restart tokenward")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="tokenward-site-") as made, Bao(directory=Path(made)) as vault:
        Path(made).chmod(0o755)  # the agent is another user
        Path(made, "bao.sock").chmod(0o666)
        wheels = Path(made, "wheels")
        wheels.mkdir()
        pack(wheels, "agent")
        (config,) = shown("Configure", "toml")
        etc = {
            "ld.so.conf": "/opt/python/lib\n",
            "pip.conf": "[global]\nno-index = true\nfind-links = /opt/site/wheels\ndisable-pip-version-check = true\n",
            "tokenward/tokenward.toml": config.replace("https://vault.acme.example:8200", "unix:///opt/site/bao.sock")
            + MORE,
        }
        etc |= {f"systemd/system/{name}.service": unit(name) for name in APPS}
        with Machine(etc=etc, shared={"/opt/site": Path(made)}, bare=True) as machine:
            site = Site(machine, wheels)
            machine.run("ldconfig")
            for name in APPS:
                machine.run("sh", "-c", f"cat >/usr/local/bin/{name} && chmod 755 /usr/local/bin/{name}", given=APP)
            made_ca = subprocess.run(CA, capture_output=True, text=True, check=True)
            machine.run_shell("cat >vault-ca.pem", given=made_ca.stdout)
            for block in shown("Configure"):
                machine.run_shell(block)
            install, set_up = shown("Install")
            assert len(install.splitlines()) == 4
            machine.run_shell(install)
            machine.run_shell(set_up, given=vault.admin_token.reveal())
            yield site
            assert "Traceback" not in machine.journal(), machine.journal()


def test_three_units_get_what_is_theirs_and_nothing_else(site: Site) -> None:
    told = {name: site.ask(name) for name in APPS}
    assert {name: each["spiffe_id"] for name, each in told.items()} == {
        name: f"spiffe://acme.example/{name}" for name in APPS
    }
    for name, own in zip(APPS, ("ledger", "billing", "mailer"), strict=True):
        assert f"systemd:unit:{name}.service" in told[name]["selectors"]
        assert told[name]["got"].pop(own) == 1
        assert set(told[name]["got"].values()) == {"NOT_GRANTED"}


def test_the_units_have_no_mistakes(site: Site) -> None:
    units = [f"/etc/systemd/system/{path.name}" for path in UNITS.iterdir() if path.is_file()]
    assert len(units) == 3
    site.machine.run("systemd-analyze", "verify", "--recursive-errors=no", *units)


def test_the_first_call_is_answered_though_no_agent_runs_yet(site: Site) -> None:
    site.machine.run("systemctl", "stop", "tokenward.service")
    assert site.machine.show("tokenward", "ActiveState") == "inactive"
    assert site.ask("stripe-sync")["got"]["ledger"] == 1
    assert site.machine.show("tokenward", "ActiveState") == "active"


def test_the_status_says_that_the_agent_is_ready(site: Site) -> None:
    site.restart()
    until(
        lambda: site.machine.show("tokenward", "StatusText") == "ready", lambda: site.machine.run("systemctl", "status")
    )


def test_a_program_is_recognised_through_all_that_the_unit_takes_away(site: Site) -> None:
    assert by_path(site) == "1"


def test_without_the_capability_units_are_told_apart_and_programs_are_not(site: Site) -> None:
    with site.drop_in("no-ptrace.conf"):
        pid = site.machine.show("tokenward", "MainPID")
        assert "CapPrm:\t0000000000000000" in site.machine.run("cat", f"/proc/{pid}/status")
        assert site.ask("billing")["got"]["billing"] == 1
        assert by_path(site) == "ATTESTATION_INCOMPLETE"


def by_path(site: Site) -> str:
    """What a process of another user is told that is recognised by its program, too: a version, or why not."""
    told, said = site.machine.start_unit(BY_PATH, uid=OTHER_UID).communicate(timeout=60)
    assert not said
    return told.strip()


def test_the_key_is_for_the_agent_alone(site: Site) -> None:
    where = "/run/credentials/tokenward.service/tokenward.signing.pem"
    stored = site.machine.run("cat", "/etc/credstore/tokenward.signing.pem")
    assert site.machine.run("setpriv", "--reuid=tokenward", "--clear-groups", "cat", where) == stored
    assert site.machine.run("setpriv", f"--reuid={APP_UID}", "--clear-groups", "cat", where, check=False) == ""


def test_the_key_may_be_encrypted_on_the_disk(site: Site) -> None:
    key, store = "tokenward.signing.pem", "/etc/credstore.encrypted"
    site.machine.run_shell(f"""
        mkdir -p {store}
        systemd-creds encrypt --name={key} /etc/credstore/{key} {store}/{key}
        mv /etc/credstore/{key} /root
    """)
    try:
        with site.drop_in("encrypted-credentials.conf"):
            assert site.ask("mailer")["got"]["mailer"] == 1
            site.machine.run_shell(f"mv /root/{key} /etc/credstore")
    finally:
        site.machine.run("rm", "-r", store)


def test_operators_alone_reach_the_admin_socket(site: Site) -> None:
    assert json.loads(site.machine.run_shell("tokenward admin status"))
    app = ("setpriv", f"--reuid={APP_UID}", f"--regid={APP_UID}", "--clear-groups")
    assert site.machine.run(*app, "ls", "/run/tokenward-admin", check=False) == ""
    found = site.machine.run("stat", "--format=%U:%G %a", "/run/tokenward-admin", "/run/tokenward-admin/admin.sock")
    assert found.splitlines() == ["root:tokenward-admin 750", "root:tokenward-admin 660"]


def test_an_upgrade_under_200_gets_a_second_is_seen_by_none_of_them(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, agent = site.machine, site.machine.show("tokenward", "MainPID")
    load = machine.start_unit(LOAD)
    assert load.stdout is not None
    counts = (int(line) for line in iter(load.stdout.readline, ""))

    def goes_on() -> None:
        """Returns two seconds' worth of gets later."""
        enough = next(counts) + 400
        assert any(count >= enough for count in counts)

    goes_on()
    newer = f"{version('tokenward')}.post1"
    pack_tokenward(site.wheels, version=newer)
    for block in shown("Reload, restart, upgrade"):
        machine.run_shell(block)
    goes_on()
    out, said = load.communicate(timeout=60)
    told = json.loads(out.splitlines()[-1])

    assert newer in machine.run_shell("tokenward --version")
    assert machine.show("tokenward", "MainPID") not in {agent, "0"}
    with capsys.disabled():
        print(
            f"\nupgrade: {told['gets']} gets in {told['seconds']:.1f} s, {len(told['errors'])} errors, "
            f"the slowest took {told['slowest_s']:.2f} s"
        )
    assert told["errors"] == [], said
    assert told["gets"] >= 800


def test_uninstalled_it_leaves_nothing(site: Site) -> None:
    """The last one here: it takes away what the others use."""
    (block,) = shown("Uninstall")
    site.machine.run_shell(block)
    ours = " -o ".join(
        f"-path {path}" for path in ("/proc", "/root/tokenward", "/opt/agent", "/opt/packages", "/opt/site")
    )
    found = site.machine.run("sh", "-c", rf"find / \( {ours} \) -prune -o -iname '*tokenward*' -print")
    assert found == ""
    users = site.machine.run("cat", "/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow")
    assert "tokenward" not in users
