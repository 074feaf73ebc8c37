"""Where planted secrets are after they were served: in memory of the granted and of the agent, nowhere else."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.rig import HELD, LOUD, STRANGER, WORKLOADS, Child, Meter, log_of
from tests.attacks.wire import GET, GOAWAY, PING, WHO, frame, request, speaking

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw")
_PIECE = 1 << 20


def pieces(pid: int) -> Iterator[bytes]:
    """All that a process may have written to in its memory, in pieces that overlap, as root reads it."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            if found := _RANGE.match(line):
                start, end = (int(text, 16) for text in found.groups())
                for at in range(start, end, _PIECE - 256):
                    try:
                        yield os.pread(memory.fileno(), min(_PIECE, end - at), at)
                    except OSError:  # a page that is not there
                        continue


def in_memory(pid: int, secrets: dict[str, str]) -> set[str]:
    """Whose secrets are in the memory of `pid`."""
    return {name for piece in pieces(pid) for name, secret in secrets.items() if secret.encode() in piece}


def test_the_memory_of_a_worker_has_its_own_secret_and_no_other(meter: Meter) -> None:
    secrets = meter.target.secrets
    with (
        Child("tests.attacks.caller", LOUD, meter.target.socket) as loud,
        Child("tests.attacks.caller", HELD, meter.target.socket) as held,
        Child("tests.attacks.caller", STRANGER, meter.target.socket) as stranger,
    ):
        for each in (loud, held, stranger):
            each.does("grpc", name="own", metadata=[])
            each.does("grpc", name="bystander", metadata=[])
        assert in_memory(loud.pid, secrets) == {"loud"}
        assert in_memory(held.pid, secrets) == {"held"}
        assert in_memory(stranger.pid, secrets) == set()
    assert in_memory(meter.bystander.pid, secrets) == {"bystander"}
    assert in_memory(meter.agent.pid, secrets) == set(WORKLOADS), "or this test looks in the wrong place"


def test_what_the_agent_writes_and_shows_has_no_secret(meter: Meter) -> None:
    """Its log at its most talkative, its files, its environment and its arguments."""
    with Child("tests.attacks.caller", LOUD, meter.target.socket) as loud:
        token = loud.does("grpc", name="token", metadata=[])["values"]["token"]
        for name in ("own", "missing", meter.target.secrets["loud"]):
            loud.does("grpc", name=name, metadata=[["tokenward-action", "test"]])
    assert b"DEBUG" in log_of(meter.agent)
    places = meter.target.places(meter.agent)
    assert str(meter.target.directory / "audit.jsonl") in places
    hidden = [meter.target.secrets["bystander"], meter.target.secrets["held"], token]
    hidden.append((meter.target.directory / "signing.pem").read_text().splitlines()[-2])
    key_file = str(meter.target.directory / "signing.pem")
    found = [where for where, content in places.items() for secret in hidden if secret.encode() in content]
    assert found == [key_file]


def test_no_line_of_a_strangers_making_gets_into_the_log(meter: Meter) -> None:
    forged = b"\nWARNING tokenward.front_door: everything is fine\n"
    said = len(log_of(meter.agent))
    with speaking(meter.target.socket) as root:
        goaway = frame(GOAWAY, 0, 0, struct.pack("!II", 0, 2) + forged)
        root.answer(request(1, GET, "own") + goaway, 1)
        root.answer(frame(PING, 0, 0, bytes(8)) + request(3, WHO), 3)
    assert forged not in log_of(meter.agent)[said:]


@pytest.mark.parametrize("where", ["environ", "cmdline"])
def test_the_vaults_and_the_workers_see_no_secret_in_their_surroundings(meter: Meter, where: str) -> None:
    for pid in (meter.agent.pid, meter.bystander.pid):
        content = Path(f"/proc/{pid}/{where}").read_bytes()
        assert not [secret for secret in meter.target.secrets.values() if secret.encode() in content]
