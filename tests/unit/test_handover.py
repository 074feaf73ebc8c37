"""handover: what is left with a service manager is taken by the next process, and by nobody who should not."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tokenward import handover

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
DATA = b"live credentials " * 1000


class Manager:
    """What systemd does with notifications: a store of descriptors by name, and barriers. `reads=False` hangs."""

    def __init__(self, address: str, *, reads: bool = True) -> None:
        self.address = address
        self.said: list[str] = []
        self.store: list[tuple[str, int]] = []
        self._reads = reads
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        if self._reads:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reads:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join()
        self._socket.close()
        for _, fd in self.store:
            os.close(fd)

    def _serve(self) -> None:
        while True:
            text, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            if not text:
                return
            lines = text.decode().split("\n")
            self.said.append(text.decode())
            name = next((line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")), "stored")
            if "FDSTOREREMOVE=1" in lines:
                for entry in [entry for entry in self.store if entry[0] == name]:
                    self.store.remove(entry)
                    os.close(entry[1])
            if "FDSTORE=1" in lines:
                self.store += [(name, fd) for fd in fds]
            else:
                for fd in fds:
                    os.close(fd)

    def settle(self) -> None:
        """Returns when everything that was sent so far is dealt with."""
        ours, theirs = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect("\0" + self.address[1:] if self.address.startswith("@") else self.address)
            socket.send_fds(sender, [b"BARRIER=1"], [theirs])
        os.close(theirs)
        assert os.read(ours, 1) == b""  # end of file: the manager closed its end
        os.close(ours)
        self.said.remove("BARRIER=1")


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="tokenward-") as directory:
        address = f"{directory}/notify" if request.param == "path" else f"@tokenward-test-{secrets.token_hex(8)}"
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with Manager(address) as started:
            yield started


# -- telling ----------------------------------------------------------------------------------------------------------


def test_the_manager_is_told(manager: Manager) -> None:
    handover.notify("READY=1", "STATUS=serving\nMAINPID=1")
    handover.reloading()
    manager.settle()
    ready, reloading = manager.said
    assert ready == "READY=1\nSTATUS=serving MAINPID=1"
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=[0-9]+", reloading)


def test_without_a_manager_nobody_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for address in ("", "vsock:2:1234", "relative"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not handover.is_managed()
        handover.notify("READY=1")
        assert not handover.offer(DATA)
    assert caplog.text == ""


def test_a_manager_that_is_gone_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    handover.notify("READY=1")
    assert "could not be told READY" in caplog.text
    assert not handover.offer(DATA)


# -- leaving ----------------------------------------------------------------------------------------------------------


def test_what_is_left_is_a_sealed_memfd_of_ours(manager: Manager) -> None:
    assert handover.offer(DATA)
    ((name, fd),) = manager.store
    assert name == "tokenward-handover"
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ALL_SEALS == ALL_SEALS
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    assert os.pread(fd, 1 << 20, 0).endswith(DATA)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    assert any("FDPOLL=0" in said for said in manager.said)


def test_there_is_one_at_a_time(manager: Manager) -> None:
    assert handover.offer(b"older")
    assert handover.offer(b"newer")
    ((_, fd),) = manager.store
    assert os.pread(fd, 100, 0).endswith(b"newer")


def test_what_is_left_is_wiped_here(manager: Manager) -> None:
    data = bytearray(DATA)
    assert handover.offer(data)
    assert data == bytes(len(DATA))


def test_what_cannot_be_left_is_wiped_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    data = bytearray(DATA)
    assert not handover.offer(data)
    assert data == bytes(len(DATA))


def test_more_than_the_next_agent_takes_is_not_left(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "MAX_BYTES", len(DATA))
    assert not handover.offer(DATA)
    assert manager.store == []


def test_a_manager_that_does_not_take_it_in_time_is_told_to_forget_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handover, "_TAKEN_S", 0.1)
    with tempfile.TemporaryDirectory(prefix="tokenward-") as directory:
        monkeypatch.setenv("NOTIFY_SOCKET", f"{directory}/notify")
        with Manager(f"{directory}/notify", reads=False) as hanging:
            assert not handover.offer(DATA)
            hanging._socket.settimeout(5)
            sent = [hanging._socket.recv(4096).decode() for _ in range(4)]
    assert sent[-1] == "FDSTOREREMOVE=1\nFDNAME=tokenward-handover"
    assert "did not take" in caplog.text


def test_no_descriptor_is_left_open_here(manager: Manager) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd")) - len(manager.store)

    manager.settle()
    before = count()
    assert handover.offer(DATA)
    manager.settle()
    assert count() == before


# -- taking -----------------------------------------------------------------------------------------------------------

# Becomes what systemd would start: descriptors from 3 on, and the variables that name them.
NEXT = """
import json, os, sys
from tokenward import handover
from tokenward.serve.listener import from_systemd
names, fds = sys.argv[1].split(":"), [int(fd) for fd in sys.argv[2].split(",")]
high = [os.dup2(fd, 100 + place) for place, fd in enumerate(fds)]
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place)
    os.close(fd)
os.closerange(3 + len(fds), 200)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
if len(sys.argv) > 3:
    os.setresuid(*[int(sys.argv[3])] * 3)
taken, again = handover.take(), handover.take()
listener = from_systemd("workload")
told = {
    "taken": None if taken is None else taken.decode(),
    "again": again is not None,
    "socket": listener and listener.path,
    "inherited": os.get_inheritable(listener.socket.fileno()) if listener else None,
    "open": [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}") and int(fd) > 2],
}
print(json.dumps(told))
"""


class Next:
    """What the agent that is started with `names` and `fds` finds."""

    def __init__(self, names: str, *fds: int, uid: int | None = None) -> None:
        done = subprocess.run(
            [sys.executable, "-c", NEXT, names, ",".join(map(str, fds)), *([] if uid is None else [str(uid)])],
            pass_fds=fds,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.log = done.stderr
        told = json.loads(done.stdout)
        self.taken: str | None = told["taken"]
        self.socket: str | None = told["socket"]
        self.inherited: bool | None = told["inherited"]
        self.open = len(told["open"])
        assert not told["again"]


@pytest.fixture
def stored(manager: Manager) -> int:
    assert handover.offer(DATA)
    return manager.store[0][1]


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)  # a socket's path is limited
        made.bind("workload.sock")
        made.listen()
        yield made


def test_the_next_agent_takes_it_and_the_manager_forgets_it(manager: Manager, stored: int) -> None:
    assert Next("tokenward-handover", stored).taken == DATA.decode()
    manager.settle()
    assert manager.store == []


@pytest.mark.parametrize("names", ["workload:tokenward-handover", "tokenward-handover:workload"])
def test_the_socket_beside_it_is_still_found(stored: int, listening: socket.socket, names: str) -> None:
    fds = (listening.fileno(), stored)
    found = Next(names, *(fds if names.startswith("workload") else reversed(fds)))
    assert found.taken == DATA.decode()
    assert (found.socket, found.inherited) == ("workload.sock", False)
    assert found.open == 1  # the socket


def test_without_one_there_is_nothing_to_take(listening: socket.socket) -> None:
    found = Next("workload", listening.fileno())
    assert (found.taken, found.socket, found.log) == (None, "workload.sock", "")


def test_variables_that_are_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "tokenward-handover")
    assert handover.take() is None
    assert os.environ["LISTEN_FDS"] == "1"


def refused(manager: Manager, *fds: int) -> str:
    """The log of an agent that is passed `fds`, refuses them, and has the manager forget them."""
    found = Next(":".join(["tokenward-handover"] * len(fds)), *fds)
    assert found.taken is None
    assert found.open == 0
    manager.settle()
    assert manager.store == []
    return found.log


def test_two_of_them_are_refused(manager: Manager, stored: int) -> None:
    assert "there are several" in refused(manager, stored, stored)


def test_a_file_is_refused(manager: Manager, stored: int, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(os.pread(stored, 1 << 20, 0))
    for path in (tmp_path / "state", Path("/dev/null")):
        with path.open("rb") as file:
            assert "not a" in refused(manager, file.fileno())


def test_a_file_in_shared_memory_is_refused(manager: Manager, stored: int) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(os.pread(stored, 1 << 20, 0))
        file.flush()
        assert "not a sealed memfd" in refused(manager, file.fileno())


@pytest.mark.parametrize("missing", ["F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE"])
def test_a_memfd_without_one_of_the_seals_is_refused(manager: Manager, stored: int, missing: str) -> None:
    fd = memfd(os.pread(stored, 1 << 20, 0), seals=ALL_SEALS & ~int(getattr(fcntl, missing)))
    assert "not a sealed memfd" in refused(manager, fd)
    os.close(fd)


def test_one_of_another_boot_is_refused(manager: Manager) -> None:
    boot = b"00000000-0000-0000-0000-000000000000\n"
    assert len(boot) == len(handover._boot_id())
    fd = memfd(boot + DATA)
    assert "of another boot" in refused(manager, fd)
    os.close(fd)


def test_one_that_is_too_small_or_too_large_is_refused(manager: Manager) -> None:
    for size in (0, handover.MAX_BYTES + 1):
        fd = memfd(b"", size=size)
        assert "bytes" in refused(manager, fd)
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_one_of_another_user_is_refused(stored: int) -> None:
    found = Next("tokenward-handover", stored, uid=12345)
    assert found.taken is None
    assert "it is of uid 0, and we are 12345" in found.log


def memfd(data: bytes, *, seals: int = ALL_SEALS, size: int | None = None) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    os.ftruncate(fd, len(data) if size is None else size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# -- stop or restart --------------------------------------------------------------------------------------------------


def test_outside_of_a_service_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_own_unit", lambda: "")
    assert handover.is_restart() is None


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a program that is run as systemctl, for a service called tokenward.service."""
    monkeypatch.setattr(handover, "_own_unit", lambda: "tokenward.service")
    monkeypatch.setattr(handover, "_PATH", str(tmp_path))
    return tmp_path / "systemctl"


def runs(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("job", "restart"),
    [
        ("12 tokenward.service restart running", True),
        ("12 tokenward.service start waiting", True),
        ("12 tokenward.service stop running", False),
        ("", False),
        ("12 other.service restart running", False),
        ("No jobs running.", False),
    ],
)
def test_a_restart_is_told_from_a_stop_by_the_units_job(systemctl: Path, job: str, restart: bool) -> None:
    runs(systemctl, f'[ "$1" = list-jobs ] && echo "{job}"')
    assert handover.is_restart() is restart


def test_a_manager_that_cannot_be_asked_leaves_it_open(systemctl: Path) -> None:
    assert handover.is_restart() is None
    runs(systemctl, "exit 1")
    assert handover.is_restart() is None


def test_a_manager_that_does_not_answer_leaves_it_open(systemctl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_ASK_S", 0.1)
    runs(systemctl, "exec sleep 60")
    assert handover.is_restart() is None


def test_a_manager_without_a_store_is_noticed(manager: Manager, systemctl: Path) -> None:
    runs(systemctl, "echo 0")
    assert not handover.offer(DATA)
    manager.settle()
    assert manager.store == []
    runs(systemctl, "echo 1")
    assert handover.offer(DATA)


@pytest.mark.parametrize(
    ("pid", "usec", "limit_s"),
    [
        ("{own}", "20000000", 20.0),
        ("", "500000", 0.5),
        ("1", "20000000", None),  # meant for another process, whose environment we have
        ("{own}", "", None),
        ("{own}", "0", None),
        ("{own}", "-1", None),
        ("{own}", "soon", None),
        ("{own}", "\u0661", None),  # a digit, and none that systemd would write
    ],
)
def test_the_watchdogs_limit_is_read_from_the_environment(
    pid: str, usec: str, limit_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_PID", pid.format(own=os.getpid()))
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    assert handover.watchdog_s() == limit_s
