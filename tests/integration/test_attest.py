"""Attestation of real processes: other users, exec, death, passed sockets, and names that lie."""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.making import workload
from tokenward.attest import Attestor, Caller, Peer, peer_of, procfs
from tokenward.attest.digests import Digests
from tokenward.core.identity import Selector
from tokenward.core.model import Workload
from tokenward.errors import AttestationError, DeniedError, Reason, TokenwardError

_PYTHON = os.path.realpath(sys.executable)
_CAT = os.path.realpath("/bin/cat")
_UID = f"unix:uid:{os.geteuid()}"
_needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user or makes a namespace")

_ACTOR = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
while line := os.read(0, 4096).decode().split():
    match line:
        case ["become", uid, gid, *groups]:
            os.setgroups(list(map(int, groups))); os.setgid(int(gid)); os.setuid(int(uid))
        case ["connect", path]:
            sock.connect(path)
        case ["exec", *command]:
            sock.set_inheritable(True)
            os.write(1, b"ok\\n")
            os.execv(command[0], command)
        case ["fork-and-speak"]:
            if os.fork() == 0:
                sock.send(b"x")
                while True: os.read(0, 1) or os._exit(0)
    os.write(1, b"ok\\n")
"""


class Actor:
    """A process that does as it is told, one command at a time."""

    def __init__(self, *prefix: str, python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [*prefix, python, "-S", "-c", _ACTOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def does(self, *command: str | Path | int) -> None:
        """Returns when it is done."""
        self.says(" ".join(map(str, command)))
        assert self.hears() == b"ok\n"

    def says(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")

    def hears(self) -> bytes:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 10)[0], "the actor says nothing"
        return self.process.stdout.readline()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def actor() -> Iterator[Actor]:
    actor = Actor()
    yield actor
    actor.end()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where every user can reach it, as pytest's own directories cannot be."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        os.chmod(directory, 0o755)
        listener.bind(str(Path(directory, "s")))
        os.chmod(listener.getsockname(), 0o777)
        listener.listen()
        yield listener


@pytest.fixture
def accepted(listener: socket.socket) -> Iterator[list[Peer]]:
    """The peers that a test accepted, to be closed in the end."""
    peers: list[Peer] = []
    yield peers
    for peer in peers:
        peer.close()


def _accept(listener: socket.socket, accepted: list[Peer], *, ask_peerpidfd: bool = True) -> Peer:
    with listener.accept()[0] as sock:
        peer = peer_of(sock, ask_peerpidfd=ask_peerpidfd)
    accepted.append(peer)
    return peer


async def _refused(caller: Caller) -> TokenwardError:
    with pytest.raises(TokenwardError) as caught:
        await caller.identify(0.0)
    return caught.value


# -- other users ----------------------------------------------------------------------------------------------------


@_needs_root
async def test_another_user_is_another_caller(actor: Actor, listener: socket.socket, accepted: list[Peer]) -> None:
    actor.does("become", 4242, 4243, 4244, 4245)
    actor.does("connect", listener.getsockname())
    attestor = Attestor(workloads=[workload("root", _UID)])
    caller = Caller(peer=_accept(listener, accepted), attestor=attestor)
    refusal = await _refused(caller)
    assert refusal.reason is Reason.NO_MATCHING_WORKLOAD
    assert "unix:uid:4242" in refusal.public
    attestor.replace([workload("app", "unix:uid:4242", "unix:gid:4243", "unix:supplementary_gid:4245")])
    assert (await caller.identify(0.0)).workload.name == "app"


# -- exec -----------------------------------------------------------------------------------------------------------


async def test_a_process_that_runs_another_program_loses_its_identity(
    actor: Actor, listener: socket.socket, accepted: list[Peer]
) -> None:
    actor.does("connect", listener.getsockname())
    workloads = [workload("python", f"unix:path:{_PYTHON}"), workload("cat", f"unix:path:{_CAT}")]
    caller = Caller(peer=_accept(listener, accepted), attestor=Attestor(workloads=workloads))
    assert (await caller.identify(0.0)).workload.name == "python"
    actor.does("exec", _CAT)
    actor.says("there")
    assert actor.hears() == b"there\n"
    refusal = await _refused(caller)
    assert refusal.reason is Reason.IDENTITY_CHANGED
    assert "cat" in refusal.public


async def test_a_program_that_no_workload_runs_is_not_served_what_the_first_one_was(
    actor: Actor, listener: socket.socket, accepted: list[Peer]
) -> None:
    actor.does("connect", listener.getsockname())
    attestor = Attestor(workloads=[workload("python", f"unix:path:{_PYTHON}")])
    caller = Caller(peer=_accept(listener, accepted), attestor=attestor)
    await caller.identify(0.0)
    actor.does("exec", _CAT)
    actor.says("there")
    assert actor.hears() == b"there\n"
    assert (await _refused(caller)).reason is Reason.IDENTITY_CHANGED


async def test_an_identity_that_does_not_depend_on_the_program_goes_on_and_is_recorded_anew(
    actor: Actor, listener: socket.socket, accepted: list[Peer]
) -> None:
    actor.does("connect", listener.getsockname())
    attestor = Attestor(workloads=[workload("app", _UID)])
    caller = Caller(peer=_accept(listener, accepted), attestor=attestor)
    assert (await caller.identify(0.0)).attestation.process.path == _PYTHON
    actor.does("exec", _CAT)
    actor.says("there")
    assert actor.hears() == b"there\n"
    assert (await caller.identify(0.0)).attestation.process.path == _CAT


class MeanwhileAttestor(Attestor):
    """Lets the process run another of `programs` after each look at it, while there are any."""

    def __init__(self, actor: Actor, programs: list[Path]) -> None:
        super().__init__(workloads=[workload("app", _UID)])
        self._actor = actor
        self._programs = iter(programs)

    async def _look(self, peer: Peer, workloads: tuple[Workload, ...]) -> Any:
        findings = await super()._look(peer, workloads)
        if (program := next(self._programs, None)) is not None:
            self._actor.says(f"exec {program}")
            await _runs(peer, program)
        return findings


async def _runs(peer: Peer, program: Path) -> None:
    async with asyncio.timeout(10):
        while procfs.executable(peer.pid) != procfs.Executable.of(program.stat()):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("times", [0, 1, 2, 3])
async def test_exec_during_an_attestation_starts_it_again_for_a_while(
    actor: Actor, listener: socket.socket, accepted: list[Peer], tmp_path: Path, times: int
) -> None:
    shells = [Path(shutil.copy(os.path.realpath("/bin/sh"), tmp_path / name)) for name in "abcd"]
    actor.does("connect", listener.getsockname())
    peer = _accept(listener, accepted)
    actor.does("exec", shells[0])
    await _runs(peer, shells[0])
    attestor = MeanwhileAttestor(actor, shells[1 : 1 + times])
    if times < 3:
        assert (await attestor.attest(peer)).process.path == str(shells[times])
    else:
        with pytest.raises(AttestationError, match="keeps changing"):
            await attestor.attest(peer)


async def test_a_hash_that_could_not_be_read_is_read_again(actor: Actor) -> None:
    digests = Digests()
    cat = procfs.Executable.of(os.stat(_CAT))
    with pytest.raises(AttestationError, match="changed"):
        await digests.of(actor.process.pid, cat)
    actor.does("exec", _CAT)
    actor.says("there")
    assert actor.hears() == b"there\n"
    assert await digests.of(actor.process.pid, cat) == hashlib.sha256(Path(_CAT).read_bytes()).hexdigest()


async def test_facts_of_two_programs_are_never_mixed(
    actor: Actor, listener: socket.socket, accepted: list[Peer], tmp_path: Path
) -> None:
    """A process that keeps calling exec: what is told of it is of one program, or could not be told."""
    hashes = {}
    for name, other in (("one", "two"), ("two", "one")):
        program = Path(shutil.copy(os.path.realpath("/bin/sh"), tmp_path / name))
        with program.open("ab") as file:
            file.write(name.encode())
        hashes[str(program)] = hashlib.sha256(program.read_bytes()).hexdigest()
        (tmp_path / f"{name}.sh").write_text(f"exec {tmp_path / other} {tmp_path / other}.sh\n")
    actor.does("connect", listener.getsockname())
    peer = _accept(listener, accepted)
    attestor = Attestor(workloads=[workload("app", f"unix:sha256:{'0' * 64}")])
    actor.does("exec", tmp_path / "one", tmp_path / "one.sh")
    told = 0
    for _ in range(100):
        try:
            seen = await attestor.attest(peer)
        except AttestationError:
            continue
        process = seen.process
        if process.path in hashes and process.sha256:
            assert process.sha256 == hashes[process.path]
            assert Selector("unix:path", process.path) in seen.selectors
            told += 1
    assert peer.is_alive()
    assert told > 0


# -- names that lie -------------------------------------------------------------------------------------------------


@_needs_root
async def test_a_path_of_its_own_mount_namespace_proves_nothing(
    listener: socket.socket, accepted: list[Peer], tmp_path: Path
) -> None:
    """A process shows its own program under the path of a trusted one. Anybody can who may make a user namespace."""
    trusted = Path(shutil.copy(_CAT, tmp_path / "trusted"))
    liar = Actor("unshare", "--mount", "sh", "-c", f'mount --bind {_PYTHON} {trusted} && exec "$@"', "sh", "env",
                 f"PYTHONHOME={sys.base_prefix}", python=str(trusted))  # fmt: skip
    try:
        liar.does("connect", listener.getsockname())
        caller = Caller(
            peer=_accept(listener, accepted),
            attestor=Attestor(workloads=[workload("app", _UID, f"unix:path:{trusted}")]),
        )
        refusal = await _refused(caller)
        assert refusal.reason is Reason.NO_MATCHING_WORKLOAD
        assert f"{trusted} was replaced, or is another file where the agent runs" in refusal.public
    finally:
        liar.end()


async def test_a_program_that_was_replaced_since_it_started_is_not_what_is_at_its_path_now(
    actor: Actor, listener: socket.socket, accepted: list[Peer], tmp_path: Path
) -> None:
    program = Path(shutil.copy(_CAT, tmp_path / "app"))
    actor.does("connect", listener.getsockname())
    actor.does("exec", program)
    actor.says("there")
    assert actor.hears() == b"there\n"
    caller = Caller(
        peer=_accept(listener, accepted), attestor=Attestor(workloads=[workload("app", f"unix:path:{program}")])
    )
    assert (await caller.identify(0.0)).workload.name == "app"
    replacement = Path(shutil.copy(_CAT, tmp_path / "new"))
    replacement.rename(program)
    assert (await _refused(caller)).reason is Reason.IDENTITY_CHANGED


# -- death ----------------------------------------------------------------------------------------------------------

_both_ways = pytest.mark.parametrize("ask_peerpidfd", [True, False], ids=["SO_PEERPIDFD", "pidfd_open"])


@_both_ways
@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
async def test_a_process_that_died_is_served_no_more(
    actor: Actor, listener: socket.socket, accepted: list[Peer], ask_peerpidfd: bool, reaped: bool
) -> None:
    actor.does("connect", listener.getsockname())
    attestor = Attestor(workloads=[workload("app", _UID)])
    peer = _accept(listener, accepted, ask_peerpidfd=ask_peerpidfd)
    caller = Caller(peer=peer, attestor=attestor)
    await caller.identify(0.0)
    os.kill(actor.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, actor.process.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        actor.process.wait()
    for refused in (caller, Caller(peer=peer, attestor=attestor)):
        assert (await _refused(refused)).reason is Reason.PEER_GONE
    with pytest.raises(DeniedError):
        await attestor.attest(peer)


@_both_ways
async def test_a_process_that_died_before_we_accepted_is_never_a_peer(
    actor: Actor, listener: socket.socket, accepted: list[Peer], ask_peerpidfd: bool
) -> None:
    actor.does("connect", listener.getsockname())
    actor.process.kill()
    actor.process.wait()
    with pytest.raises(DeniedError) as caught:
        _accept(listener, accepted, ask_peerpidfd=ask_peerpidfd)
    assert caught.value.reason is Reason.PEER_GONE


async def test_a_passed_on_socket_speaks_for_who_connected_and_dies_with_it(
    actor: Actor, listener: socket.socket, accepted: list[Peer]
) -> None:
    actor.does("connect", listener.getsockname())
    sock = listener.accept()[0]
    with sock:
        peer = peer_of(sock)
        accepted.append(peer)
        caller = Caller(peer=peer, attestor=Attestor(workloads=[workload("app", _UID)]))
        actor.does("fork-and-speak")
        assert sock.recv(1) == b"x"
        assert (await caller.identify(0.0)).attestation.process.pid == actor.process.pid
        actor.process.kill()
        actor.process.wait()
        assert (await _refused(caller)).reason is Reason.PEER_GONE
