"""Attempts to be somebody else: by what is sent, by whose socket is used, and past the front door.

Every one is made while the bystander is served, and shows what was got: an identity is what the kernel says, always.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import DevAgent
from tests.attacks.rig import HELD, LOUD, STRANGER, Child, Cost, Meter
from tests.attacks.wire import DATA, END_HEADERS, END_STREAM, GET, HEADERS, WHO, block, frame, literal, speaking
from tests.site import until

_NAME = re.compile(rb"@(tokenward-[0-9a-f]{32})")


def caller(meter: Meter, uid: int, *, python: str = sys.executable) -> Child:
    return Child("tests.attacks.caller", uid, meter.target.socket, python=python)


@pytest.fixture
def stranger(meter: Meter) -> Iterator[Child]:
    with caller(meter, STRANGER) as started:
        yield started


@pytest.fixture
def loud(meter: Meter) -> Iterator[Child]:
    with caller(meter, LOUD) as started:
        yield started


@pytest.fixture
def held(meter: Meter) -> Iterator[Child]:
    with caller(meter, HELD) as started:
        yield started


def counted(meter: Meter, cost: Cost, *answers: object) -> None:
    """Counts the planted secrets in `answers`; the attacker may have none of them."""
    cost.got += sum(str(each).count(secret) for each in answers for secret in meter.target.secrets.values())


# -- what is sent -----------------------------------------------------------------------------------------------------

_SPIFFE_ID = "spiffe://test.example/bystander"
_FORGED: dict[str, list[tuple[str, str]]] = {
    "workload.spiffe.io": [("workload.spiffe.io", "true"), ("workload.spiffe.io", _SPIFFE_ID)],
    "x-forwarded": [
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-client-cert", f"URI={_SPIFFE_ID}"),
        ("x-real-ip", "127.0.0.1"),
        ("forwarded", "for=unix:uid:4201"),
    ],
    "tokenward": [
        ("tokenward-workload", "bystander"),
        ("tokenward-uid", "4201"),
        ("tokenward-peer", "unix:uid:4201"),
        ("tokenward-action", "as-bystander"),
    ],
    "authorization": [("authorization", "Bearer root"), ("x-vault-token", "root"), ("x-vault-namespace", "root")],
    "duplicates": [("tokenward-workload", "loud"), ("tokenward-workload", "bystander")] * 20,
    "binary": [("tokenward-peer-bin", base64.b64encode(b"\0\0\0\0uid=4201").decode())] * 3,
    "oversized": [("x-large", "v" * 100_000)],
}


@pytest.mark.parametrize("forged", sorted(_FORGED))
def test_metadata_makes_nobody_somebody_else(meter: Meter, stranger: Child, loud: Child, forged: str) -> None:
    metadata = _FORGED[forged]
    with meter.attacked(f"metadata: {forged}") as cost:
        refused = stranger.does("grpc", name="own", metadata=metadata)
        itself = loud.does("grpc", name="own", metadata=metadata)
        counted(meter, cost, refused)
        after = loud.does("grpc", name="own", metadata=[])
    assert refused["code"] in {"PERMISSION_DENIED", "RESOURCE_EXHAUSTED"}
    allowed = {"value": meter.target.secrets["loud"]}
    assert itself.get("values", allowed) == after["values"] == allowed, "its own, as the kernel says, and nothing else"


@pytest.mark.parametrize("authority", ["bystander", "tokenward-" + "0" * 32, "root@localhost:0", "a" * 5000])
def test_the_authority_makes_nobody_somebody_else(meter: Meter, loud: Child, authority: str) -> None:
    with meter.attacked(f":authority {authority[:12]}") as cost:
        said = loud.does("grpc", name="", metadata=[], authority=authority, method="GetIdentity")
        counted(meter, cost, said)
    assert said.get("workload", "loud") == "loud"


_TWICE = {
    "path": block(GET, (":path", WHO)),
    "authority": block(WHO, (":authority", "bystander")),
    "method": literal(":method", "GET") + block(WHO),
    "unknown pseudo-header": block(WHO, (":peer", "unix:uid:4201")),
    "upper case": block(WHO, ("Tokenward-Workload", "bystander")),
    "line break": block(WHO, ("x-a", "b\r\ntokenward-workload: bystander")),
}


@pytest.mark.parametrize("what", sorted(_TWICE))
def test_a_request_that_contradicts_itself_is_the_callers_own_or_none(meter: Meter, what: str) -> None:
    """Written by hand as root, who has no workload; whatever becomes of it, the agent and the others go on."""
    with meter.attacked(f"twice: {what}") as cost, speaking(meter.target.socket) as root:
        body = frame(DATA, END_STREAM, 1, bytes(5))
        said = root.answer(frame(HEADERS, END_HEADERS, 1, _TWICE[what]) + body, 1)
        counted(meter, cost, said.decode("latin-1"))
    assert b"bystander" not in said


# -- whose socket it is -----------------------------------------------------------------------------------------------


def test_a_passed_connection_is_the_one_who_connected_and_ends_with_it(
    meter: Meter, loud: Child, stranger: Child
) -> None:
    """Who passes its connection on, passes its rights on, for as long as it lives: that is its to decide."""
    name = f"tw-attack-{os.getpid()}"
    with meter.attacked("SCM_RIGHTS, then exit") as cost:
        stranger.does("listen", at=name)
        loud.does("connect")
        loud.does("pass", to=name)
        stranger.does("receive")
        lent = stranger.does("ask", path=GET, name="own")
        loud.end()
        kept = stranger.does("ask", path=GET, name="own")
        counted(meter, cost, kept)
        stranger.does("connect")
        own = stranger.does("ask", path=GET, name="own")
        counted(meter, cost, own)
        stranger.end()
    assert meter.target.secrets["loud"] in lent
    assert meter.target.secrets["bystander"] not in lent
    assert "planted-" not in kept


def test_a_child_that_inherits_the_connection_has_nothing_once_its_parent_is_gone(meter: Meter, loud: Child) -> None:
    with meter.attacked("inherited by a child") as cost:
        loud.does("connect")
        loud.does("fork")
        before = loud.does("ask", path=GET, name="own")
        loud.does("orphan")
        after = loud.does("ask", path=GET, name="own")
        counted(meter, cost, after)
        loud.end()
    assert meter.target.secrets["loud"] in before
    assert "planted-" not in after


def test_who_runs_another_program_after_it_connected_is_refused(meter: Meter, held: Child) -> None:
    with meter.attacked("exec after connect") as cost:
        held.does("connect")
        before = held.does("ask", path=GET, name="own")
        held.does("exec")
        after: list[str] = []

        def changed() -> bool:
            after.append(held.does("ask", path=GET, name="own"))
            return meter.target.secrets["held"] not in after[-1]

        until(changed, "the other program runs")
        after = [after[-1], held.does("ask", path=GET, name="own")]
        counted(meter, cost, *after)
        held.end()
    assert meter.target.secrets["held"] in before
    assert "connect again" in after[0]
    assert [record["outcome"] for record in meter.target.audit() if record.get("outcome") == "IDENTITY_CHANGED"]


def test_the_right_user_with_another_program_is_nobody(meter: Meter) -> None:
    with tempfile.TemporaryDirectory(prefix="tw-") as place:
        copied = shutil.copy(os.path.realpath(sys.executable), Path(place, "python"))
        with meter.attacked("same uid, other program") as cost:
            with caller(meter, HELD, python=str(copied)) as other:
                said = other.does("grpc", name="own", metadata=[])
            counted(meter, cost, said)
    assert said["code"] == "PERMISSION_DENIED"
    assert f"unix:uid:{HELD}" in said["text"]


# -- past the front door ----------------------------------------------------------------------------------------------


def inner(meter: Meter) -> str:
    """grpcio's own socket, which has no name any more: the way that root has to it, by the agent's descriptor."""
    name = str(meter.target.directory / "inner" / "grpc.sock")
    fds = Path(f"/proc/{meter.agent.pid}/fd")
    return next(str(fd) for fd in fds.iterdir() if os.readlink(fd).startswith(name))


def names() -> set[str]:
    """The abstract names of the front door's hops, which every user can read."""
    return {name.decode() for name in _NAME.findall(Path("/proc/net/unix").read_bytes())}


def test_nobody_else_can_enter_the_directory_of_the_inner_socket(meter: Meter) -> None:
    with meter.attacked("inner socket, other user"), Child("tests.attacks.caller", STRANGER, inner(meter)) as other:
        said = other.does("grpc", name="own", metadata=[])
    assert said["code"] == "UNAVAILABLE"
    assert (meter.target.directory / "inner").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("bound", ["", "tokenward-" + "0" * 32, "tw-another-name"], ids=["none", "guessed", "other"])
def test_the_inner_socket_gives_root_nothing(meter: Meter, bound: str) -> None:
    with meter.attacked(f"inner socket, name {bound[:12] or 'none'}") as cost:
        with speaking(inner(meter), bound=bound) as root:
            said = [root.ask(GET, "own"), root.ask(WHO)]
        counted(meter, cost, *(each.decode("latin-1") for each in said))
    assert all(b"did not come through" in each for each in said)


def test_the_name_of_a_live_connection_cannot_be_used_twice(meter: Meter, loud: Child) -> None:
    """Anybody can see it; the kernel gives it to nobody else as long as its connection is there."""
    with meter.attacked("inner socket, observed name"):
        before = names()
        loud.does("connect")
        loud.does("ask", path=WHO)
        for name in names() - before:
            with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="in use"):
                sock.bind(f"\0{name}")
        loud.end()


def test_the_name_of_a_connection_that_ended_is_nobodys(meter: Meter, loud: Child) -> None:
    with meter.attacked("inner socket, replayed name") as cost:
        before = names()
        loud.does("connect")
        assert "loud" in loud.does("ask", path=WHO)
        seen = names() - before
        assert seen
        loud.end()
        said = []
        for name in seen:
            until(lambda name=name: name not in names(), "the connection is gone")  # type: ignore[misc]  # a default
            with speaking(inner(meter), bound=name) as root:
                said.append(root.ask(GET, "own"))
        counted(meter, cost, *(each.decode("latin-1") for each in said))
    assert all(b"did not come through" in each for each in said)


def test_the_inner_sockets_have_no_name_by_which_anybody_could_reach_them(meter: Meter) -> None:
    """A live connection's name could else be bound in another network namespace, and grpcio would take one for the
    other. What is left is the agent's own descriptor, which root alone can use (test_hardening: its own user cannot).
    """
    assert os.listdir(meter.target.directory / "inner") == []


# -- what the agent's own children get --------------------------------------------------------------------------------


def sockets_and_files(pid: int) -> set[str]:
    """What its descriptors are, those apart that every process has."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if int(fd.name) > 2:
            found.add(target)
    return {each for each in found if not each.startswith(("anon_inode:", "/dev/", "/proc/", "/sys/"))}


def test_the_agents_own_child_inherits_none_of_its_descriptors() -> None:
    """`tokenward dev` starts a vault, which gets the memfds of its own secrets and nothing else."""
    with (
        tempfile.TemporaryDirectory(prefix="tw-") as place,
        DevAgent(Path(place) / "dev") as agent,
        speaking(agent.workload_socket) as root,
    ):
        root.ask(GET, "demo-api-key")
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        assert children
        agents = sockets_and_files(agent.pid)
        assert any(each.startswith("socket:") for each in agents)
        assert agents & sockets_and_files(int(children[0])) == set()
