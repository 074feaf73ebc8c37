"""The agent as a process among others of its own user, which get nothing out of it; and how it refuses to start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agents import TOKENWARD, tokenward

UID = 65532 if os.geteuid() == 0 else os.geteuid()
"""Whom agent and attacker run as."""
PLANTED = "planted-8f1c0d"
_READY_S = 30.0

CONFIG = """
trust_domain = "test.example"
[environment]
name = "test"
vault_paths = ["secret"]
[listen]
workload_socket = "{directory}/workload.sock"
[vault]
addresses = ["unix://{directory}/no-vault.sock"]
[vault.signing]
[audit]
file = "{directory}/audit.jsonl"
[state]
file = "{directory}/state.json"
[workloads.app]
selectors = ["unix:uid:{uid}"]
exchange = {{ method = "signed_jwt" }}
[workloads.app.credentials.key]
kind = "kv"
path = "secret/app"
"""

# A process that has just changed its uid is closed to others by the kernel. A service that was started as its user is
# not, so that is undone. All that is imported late is imported first: its files may be in root's home.
_AS_USER = """
import ctypes, os, sys
import encodings.ascii, encodings.idna, grpc._channel, grpc._observability, uvloop, _tracemalloc
import tokenward.cli, tokenward.client.sync, tokenward.config, tokenward.daemon, tokenward.hardening
uid = int(sys.argv.pop(1))
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""
_AGENT = _AS_USER + "tokenward.cli.main()"
_OPEN_PROCESS = _AS_USER + "sys.stderr.write('serving on nothing\\n'); sys.stderr.flush(); sys.stdin.read()"

# What one process of a user can do to another one: for each way, what came of it.
_ATTACK = """
import ctypes, json, os, sys
pid, uid, planted = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
libc = ctypes.CDLL(None, use_errno=True)
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)

def call(function, *arguments):
    found = function(*arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found

def regions():
    for line in open(f"/proc/{pid}/maps"):
        span, rights = line.split()[:2]
        if rights.startswith("rw") and "[v" not in line:
            yield [int(end, 16) for end in span.split("-")]

class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

def environ():
    return planted in open(f"/proc/{pid}/environ", "rb").read()

def memory():
    with open(f"/proc/{pid}/mem", "rb", 0) as mem:
        return any(planted in os.pread(mem.fileno(), end - start, start) for start, end in regions())

def process_vm_readv():
    try:
        start, end = next(iter(regions()))
    except OSError:
        start, end = 4096, 8192
    into = ctypes.create_string_buffer(16)
    ours, theirs = Vector(ctypes.addressof(into), 16), Vector(start, 16)
    return call(libc.process_vm_readv, pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0) > 0

def descriptors():
    return len(os.listdir(f"/proc/{pid}/fd")) > 0

def pidfd_getfd():
    return call(libc.syscall, 438, os.pidfd_open(pid), 2, 0) >= 0

def ptrace():
    return call(libc.ptrace, 0x4206, pid, 0, 0) == 0  # PTRACE_SEIZE; our end lets go

done = {}
for attack in (environ, memory, process_vm_readv, descriptors, pidfd_getfd, ptrace):
    try:
        done[attack.__name__] = "got in" if attack() else "nothing there"
    except OSError as error:
        done[attack.__name__] = "refused" if error.errno in {1, 13} else str(error)
print(json.dumps(done))
"""
_WAYS = ("environ", "memory", "process_vm_readv", "descriptors", "pidfd_getfd", "ptrace")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tw-") as made:
        directory = Path(made)
        os.chown(directory, UID, -1)
        config = directory / "tokenward.toml"
        config.write_text(CONFIG.format(directory=directory, uid=UID))
        config.chmod(0o644)
        yield directory


class Running:
    """A process of `UID` that says on stderr that it serves."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.pid = process.pid
        self._log = log

    def log(self) -> str:
        return self._log.read_text()

    def file(self, name: str) -> str:
        """A file of /proc about it that everybody may read."""
        return Path(f"/proc/{self.pid}/{name}").read_text()

    def attacked(self) -> dict[str, str]:
        """What another process of the same user gets out of it."""
        command = [sys.executable, "-Ic", _ATTACK, str(self.pid), str(UID), PLANTED]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout)
        return found


@contextmanager
def running(script: str, *arguments: str) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", script, str(UID), *arguments],
                stdin=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PLANTED": PLANTED},
            )
        try:
            give_up = time.monotonic() + _READY_S
            while "serving on" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < give_up, log.read_text()
                time.sleep(0.02)
            yield Running(process, log)
        finally:
            process.terminate()
            process.communicate(timeout=15)


@pytest.fixture(scope="module")
def agent(place: Path) -> Iterator[Running]:
    with running(_AGENT, "run", "--config", str(place / "tokenward.toml")) as started:
        yield started


# -- another process of the same user ---------------------------------------------------------------------------------


def test_no_process_of_the_same_user_gets_into_the_agent(agent: Running) -> None:
    assert agent.attacked() == dict.fromkeys(_WAYS, "refused")


def _is_restrained() -> bool:
    try:
        return Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip() != "0"
    except OSError:
        return False


@pytest.mark.skipif(_is_restrained(), reason="this kernel lets no process into another one (Yama)")
def test_the_same_attacks_get_into_any_other_process() -> None:
    """Or the test before this one would show nothing."""
    with running(_OPEN_PROCESS) as other:
        assert other.attacked() == dict.fromkeys(_WAYS, "got in")


def test_the_agent_still_reads_of_the_kernel_what_it_needs(agent: Running, place: Path) -> None:
    """Its own /proc/self belongs to root now: who a caller is must be found out even so."""
    command = [sys.executable, "-c", _AGENT, str(UID), "--socket", str(place / "workload.sock"), "whoami"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr + agent.log()
    assert f"unix:uid:{UID}" in json.loads(said.stdout)["selectors"]
    records = [json.loads(line)["record"] for line in (place / "audit.jsonl").read_text().splitlines()]
    paths = {record["peer"]["path"] for record in records if record["event"] == "identity"}
    assert paths == {os.path.realpath(sys.executable)}  # by /proc/<caller>/exe and /proc/self/fd
    assert Path(f"/proc/{agent.pid}/mem").stat().st_uid == 0


def test_it_leaves_no_core_and_takes_no_new_rights(agent: Running) -> None:
    (core,) = (line for line in agent.file("limits").splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]
    assert int(agent.file("coredump_filter"), 16) == 0
    assert "NoNewPrivs:\t1" in agent.file("status")
    assert "Umask:\t0077" in agent.file("status")


def test_memory_is_locked_or_it_is_said_what_to_do(agent: Running) -> None:
    (locked,) = (line for line in agent.file("status").splitlines() if line.startswith("VmLck:"))
    assert (locked.split()[1] == "0") == ("memory is not locked" in agent.log())
    assert ("LimitMEMLOCK=infinity" in agent.log()) == ("memory is not locked" in agent.log())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may lock all memory as a rule")
def test_locked_memory_is_no_more_memory(place: Path) -> None:
    """Without MCL_ONFAULT the stack of every thread would be resident: hundreds of MiB."""
    limit = subprocess.run(
        [sys.executable, "-c", _LOCKED], capture_output=True, text=True, check=True, cwd="/"
    ).stdout.split()
    if limit[0] == "0":
        pytest.skip("this root has no CAP_IPC_LOCK")
    before_kib, after_kib = map(int, limit[1:])
    assert after_kib < before_kib + 4096


_LOCKED = """
import threading
from tokenward.hardening import protect
def status(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name + ":"))
    return int(line.split()[1])
protect()
before, end = status("VmRSS"), threading.Event()
threads = [threading.Thread(target=end.wait) for _ in range(16)]
for thread in threads: thread.start()
print(status("VmLck"), before, status("VmRSS"))
end.set()
"""


# -- refused at start -------------------------------------------------------------------------------------------------

_SWITCHES = {
    "PYTHONINSPECT": ({"PYTHONINSPECT": "1"}, ()),
    "PYTHONASYNCIODEBUG": ({"PYTHONASYNCIODEBUG": "1"}, ()),
    "PYTHONDEVMODE": ({"PYTHONDEVMODE": "1"}, ()),
    "PYTHONTRACEMALLOC": ({"PYTHONTRACEMALLOC": "1"}, ()),
    "GRPC_TRACE": ({"GRPC_TRACE": "api"}, ()),
    "GRPC_VERBOSITY": ({"GRPC_VERBOSITY": "debug"}, ()),
    "PYTHONPATH": ({"PYTHONPATH": "/tmp"}, ()),
    "PYTHONUSERBASE": ({"PYTHONUSERBASE": "/tmp"}, ()),
    "PYTHONPYCACHEPREFIX": ({"PYTHONPYCACHEPREFIX": "/tmp/nobody-made-this"}, ()),
    "-i": ({}, ("-i",)),
    "-X dev": ({}, ("-X", "dev")),
    "-X tracemalloc": ({}, ("-X", "tracemalloc")),
    "-X pycache_prefix": ({}, ("-X", "pycache_prefix=/tmp/nobody-made-this")),
}


def run(
    directory: Path, environment: Mapping[str, str], *options: str, command: str = "run"
) -> subprocess.CompletedProcess[str]:
    """`tokenward run`, or another command, with the configuration of this directory, that ends by itself."""
    return subprocess.run(
        [sys.executable, *options, TOKENWARD, command, "--config", str(directory / "tokenward.toml")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )


@pytest.mark.parametrize(("environment", "options"), _SWITCHES.values(), ids=_SWITCHES)
def test_an_agent_that_would_show_its_memory_does_not_start(
    tmp_path: Path, request: pytest.FixtureRequest, environment: Mapping[str, str], options: tuple[str, ...]
) -> None:
    said = run(tmp_path, environment, *options)
    named = request.node.callspec.id
    assert "the agent does not start like this" in said.stderr
    assert re.search(rf"(^|\s){named}[\s=]", said.stderr)
    assert "tokenward.toml" not in said.stderr, "it did not look at the configuration"
    if "INSPECT" not in named and named != "-i":  # these take the exit code for their own
        assert said.returncode == 1


@pytest.mark.parametrize("name", ["PYTHONFAULTHANDLER", "PYTHONUNBUFFERED"])
def test_what_shows_no_value_is_allowed(tmp_path: Path, name: str) -> None:
    said = run(tmp_path, {name: "1"})
    assert "cannot be read: No such file" in said.stderr, "it went on to the configuration"


@pytest.mark.parametrize("command", ["run", "check", "vault-setup"])
def test_a_configuration_that_others_may_write_is_refused(place: Path, command: str) -> None:
    with tempfile.TemporaryDirectory(prefix="tw-") as made:
        directory = Path(made)
        file = directory / "tokenward.toml"
        file.write_text((place / "tokenward.toml").read_text())
        file.chmod(0o666)
        said = run(directory, {}, command=command)
        assert (said.returncode, said.stdout) == (1, "")
        assert f"{file}:1: file: may be written by others (mode 0666)" in said.stderr
        file.chmod(0o644)
        directory.chmod(0o777)
        said = run(directory, {}, command=command)
        assert said.returncode == 1
        assert f"{directory}:1: file: may be written by others (mode 0777)" in said.stderr


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_signing_key_that_others_may_read_is_refused(place: Path, command: str) -> None:
    with tempfile.TemporaryDirectory(prefix="tw-") as made:
        directory, key = Path(made), Path(made) / "signing.pem"
        directory.chmod(0o755)
        text = (place / "tokenward.toml").read_text().replace("[vault.signing]", f'[vault.signing]\nkey_file = "{key}"')
        (directory / "tokenward.toml").write_text(text)
        (directory / "tokenward.toml").chmod(0o644)
        key.write_text("no key")
        key.chmod(0o644)
        said = run(directory, {}, command=command)
        assert said.returncode == 1
        assert f"{key}:1: vault.signing.key_file: is a secret that others may read (mode 0644)" in said.stderr
        assert "chmod go-r" in said.stderr


# -- a pod's volumes --------------------------------------------------------------------------------------------------

_MOUNTED = """
mount --bind {directory} {directory} && mount -o remount,bind,ro {directory} && exec {command}
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount of one's own needs root")
def test_a_volume_of_a_pod_is_nobody_s_to_write_whatever_its_mode(place: Path) -> None:
    """The kubelet makes them with mode 0777. A unit that sees all of the machine read-only proves nothing."""
    with tempfile.TemporaryDirectory(prefix="tw-") as made:
        file = Path(made) / "tokenward.toml"
        file.write_text((place / "tokenward.toml").read_text())
        Path(made).chmod(0o777)
        script = _MOUNTED.format(directory=made, command=f"{TOKENWARD} check --config {file}")
        for environment, code in (({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 0), ({}, 1)):
            said = subprocess.run(
                ["unshare", "--mount", "sh", "-c", script],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env={**os.environ, **environment},
            )
            assert said.returncode == code, said.stderr


def test_the_command_line_of_callers_is_not_bound_by_this(tmp_path: Path) -> None:
    """Somebody who debugs an application with `tokenward get` may trace his own calls."""
    said = tokenward(str(tmp_path / "none.sock"), "get", "x", environment={"GRPC_TRACE": "api", "PYTHONDEVMODE": "1"})
    assert said.returncode == 3
    assert "does not start" not in said.stderr
