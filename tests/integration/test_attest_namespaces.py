"""Attestation across namespaces, without privileges, and when a pid is used again. Each agent is its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes other users and makes namespaces"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of util-linux"),
]

_COMMON = """
import asyncio, json, os, select, socket, subprocess, sys
import concurrent.futures.thread  # now: another user may not be allowed to read the interpreter's files
from tokenward.attest import Attestor, Caller, peer_of
from tokenward.core.identity import Selector, SpiffeId
from tokenward.core.model import TokenRole, Workload
from tokenward.errors import TokenwardError

def listen(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen()
    return listener

def attestor(*selectors):
    return Attestor(workloads=[Workload(
        name="app", spiffe_id=SpiffeId.of("example.org", "/app"), exchange=TokenRole(role="app"), grants={},
        selectors=frozenset(map(Selector.parse, selectors)))])

async def told(caller):
    try:
        return [(await caller.identify(0.0)).workload.name, ""]
    except TokenwardError as error:
        return [error.reason, error.public]
"""

_AGENT = (
    _COMMON
    + """
path, uid, *questions = sys.argv[1:]
listener = listen(path)
if int(uid):
    os.setgroups([]); os.setgid(int(uid)); os.setuid(int(uid))
print(flush=True)
sock = listener.accept()[0]
try:
    peer = peer_of(sock)
except TokenwardError as error:
    print(json.dumps({"refused": [error.reason, error.public]}))
else:
    answers = {"pid": peer.pid, "uid": peer.uid}
    for question in questions:
        answers[question] = asyncio.run(told(Caller(peer=peer, attestor=attestor(*question.split()))))
    sock.send(b"x")
    end = select.poll()
    end.register(peer.pidfd, select.POLLIN)
    end.poll(10_000)
    answers["alive after its end"] = peer.is_alive()
    print(json.dumps(answers))
"""
)

_CLIENT = """
import os, socket, sys
uid = int(sys.argv[2])
if uid:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.recv(1)
"""


@contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def meeting_place() -> Iterator[Path]:
    """Where a socket can be reached by every user, as pytest's own directories cannot."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory, "s")


def _meet(
    place: Path, *questions: str, agent: str = "", agent_uid: int = 0, client: str = "", client_uid: int = 0
) -> dict[str, Any]:
    """What an agent started by the words of `agent` is told of a client started by those of `client`."""
    agent_command = [*agent.split(), sys.executable, "-c", _AGENT, str(place), str(agent_uid), *questions]
    client_command = [*client.split(), sys.executable, "-c", _CLIENT, str(place), str(client_uid)]
    with _started(agent_command) as server:
        assert server.stdout is not None
        server.stdout.readline()
        with _started(client_command):
            answers: dict[str, Any] = json.loads(server.stdout.readline())
            return answers


_PATH = f"unix:path:{os.path.realpath(sys.executable)}"


def test_a_sibling_pid_namespace_leaves_the_ids_and_the_end_of_the_process(meeting_place: Path) -> None:
    answers = _meet(
        meeting_place,
        "unix:uid:4242",
        f"unix:uid:4242 {_PATH}",
        "systemd:unit:app.service",
        agent="unshare --pid --fork --mount-proc --kill-child",
        client="unshare --pid --fork --kill-child",
        client_uid=4242,
    )
    assert (answers["pid"], answers["uid"]) == (0, 4242)
    assert answers["unix:uid:4242"] == ["app", ""]
    for question in (f"unix:uid:4242 {_PATH}", "systemd:unit:app.service"):
        reason, public = answers[question]
        assert reason == "ATTESTATION_INCOMPLETE"
        assert "pid namespace" in public
    assert answers["alive after its end"] is False


def test_without_privileges_the_executable_of_another_user_cannot_be_read_and_the_rest_can(meeting_place: Path) -> None:
    answers = _meet(meeting_place, "unix:uid:4242", _PATH, "systemd:unit:no.service", agent_uid=4321, client_uid=4242)
    assert answers["unix:uid:4242"] == ["app", ""]
    assert answers[_PATH][0] == "ATTESTATION_INCOMPLETE"
    assert "CAP_SYS_PTRACE" in answers[_PATH][1]
    assert answers["systemd:unit:no.service"][0] == "NO_MATCHING_WORKLOAD"
    assert answers["alive after its end"] is False


def test_what_hidepid_hides_could_not_be_told(meeting_place: Path) -> None:
    script = meeting_place.parent / "hidepid"
    script.write_text('#!/bin/sh\nmount -t proc -o hidepid=2 proc /proc && exec "$@"\n')
    script.chmod(0o755)
    answers = _meet(
        meeting_place,
        "unix:uid:4242",
        _PATH,
        "systemd:unit:no.service",
        agent=f"unshare --mount {script}",
        agent_uid=4321,
        client_uid=4242,
    )
    assert answers["unix:uid:4242"] == ["app", ""]
    for question in (_PATH, "systemd:unit:no.service"):
        assert answers[question][0] == "ATTESTATION_INCOMPLETE"
        assert "hidepid" in answers[question][1]


def test_who_has_no_uid_in_the_agents_user_namespace_is_refused(meeting_place: Path) -> None:
    answers = _meet(meeting_place, "unix:uid:65534", agent="unshare --user")
    assert answers["refused"][0] == "UNKNOWN_PEER"
    assert "user namespace" in answers["refused"][1]


def test_a_child_pid_namespace_is_seen_through(meeting_place: Path) -> None:
    answers = _meet(meeting_place, _PATH, client="unshare --pid --fork --kill-child")
    assert answers["pid"] > 0
    assert answers[_PATH] == ["app", ""]


# -- a pid that is used again ---------------------------------------------------------------------------------------

_REUSE = (
    _COMMON
    + """
PID = 4000
way, when, other_uid = sys.argv[2] == "peerpidfd", sys.argv[3], int(sys.argv[4])
listener = listen(sys.argv[1])

def start(uid, code):
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(PID - 1))
    code = f"import os; os.setuid({uid}); " + code
    child = subprocess.Popen([sys.executable, "-S", "-c", code, sys.argv[1]], stdout=subprocess.PIPE)
    assert child.pid == PID, child.pid
    child.stdout.readline()
    return child

def end(child):
    child.kill()
    child.wait()

WAIT = "import time; print(flush=True); time.sleep(60)"
CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); " + WAIT
first = start(0, CONNECT)
if when == "before accept":
    end(first)
    second = start(other_uid, WAIT)
    try:
        peer = peer_of(listener.accept()[0], ask_peerpidfd=way)
        print(json.dumps(["served", ""]))
    except TokenwardError as error:
        print(json.dumps([error.reason, error.public]))
else:
    attest_by = attestor("unix:uid:0")
    peer = peer_of(listener.accept()[0], ask_peerpidfd=way)
    caller = Caller(peer=peer, attestor=attest_by)
    if when == "after a proof":
        assert asyncio.run(told(caller))[0] == "app"
    end(first)
    second = start(other_uid, WAIT)
    assert os.path.exists(f"/proc/{PID}/exe")
    print(json.dumps(asyncio.run(told(caller))))
end(second)
"""
)


@pytest.mark.parametrize(
    ("way", "when", "other_uid"),
    [
        ("peerpidfd", "before accept", 0),
        ("peerpidfd", "before accept", 4242),
        ("peerpidfd", "after accept", 0),
        ("peerpidfd", "after a proof", 0),
        ("pidfd_open", "before accept", 4242),
        ("pidfd_open", "after accept", 0),
        ("pidfd_open", "after a proof", 0),
    ],
)
def test_a_process_that_got_the_pid_of_the_peer_gets_nothing(
    meeting_place: Path, way: str, when: str, other_uid: int
) -> None:
    """In a pid namespace of its own, where the next pid can be chosen."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", _REUSE]
    done = subprocess.run(
        [*command, str(meeting_place), way, when, str(other_uid)], stdout=subprocess.PIPE, check=True, timeout=60
    )
    assert json.loads(done.stdout)[0] == "PEER_GONE"
