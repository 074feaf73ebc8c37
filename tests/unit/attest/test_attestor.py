"""What is read of a process, and what becomes of that which cannot be read. The process is our own."""

from __future__ import annotations

import asyncio
import grp
import hashlib
import os
import pwd
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.making import workload
from tokenward.attest import Attestor, Peer, peer_of, procfs
from tokenward.attest.digests import Digests
from tokenward.core.identity import Selector
from tokenward.core.model import Attestation
from tokenward.errors import DeniedError, Reason

_PATH = os.path.realpath(sys.executable)
_HASH = hashlib.sha256(Path(_PATH).read_bytes()).hexdigest()
_UID = f"unix:uid:{os.geteuid()}"
_PROC_KINDS = {"unix:path", "unix:sha256", "systemd:unit", "systemd:slice", "container:id", "k8s:pod-uid"}


@pytest.fixture
def peer() -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours)
        yield peer
        peer.close()


def _values(attestation: Attestation, kind: str) -> set[str]:
    return {selector.value for selector in attestation.selectors if selector.kind == kind}


async def test_ids_and_the_path_are_always_known(peer: Peer) -> None:
    seen = await Attestor(workloads=[]).attest(peer)
    assert seen.selectors == {
        Selector.parse(_UID),
        Selector("unix:gid", str(os.getegid())),
        Selector("unix:path", _PATH),
        *(Selector("unix:supplementary_gid", str(gid)) for gid in os.getgroups()),
    }
    assert (seen.process.pid, seen.process.uid, seen.process.path) == (os.getpid(), os.geteuid(), _PATH)
    assert not seen.unreadable


async def test_names_are_looked_up_where_a_workload_asks_for_them(peer: Peer) -> None:
    named = replace(peer, uid=0, gid=0)  # we ourselves may be a user without a name
    seen = await Attestor(workloads=[workload("a", "unix:user:x"), workload("b", "unix:group:x")]).attest(named)
    assert _values(seen, "unix:user") == {pwd.getpwuid(0).pw_name}
    assert _values(seen, "unix:group") == {grp.getgrgid(0).gr_name}


async def test_an_id_without_a_name_has_none(peer: Peer) -> None:
    workloads = [workload("a", "unix:user:x"), workload("b", "unix:group:x")]
    nameless = replace(peer, uid=3_999_999_999, gid=3_999_999_999)
    seen = await Attestor(workloads=workloads).attest(nameless)
    assert not _values(seen, "unix:user") | _values(seen, "unix:group")
    assert not seen.unreadable


async def test_the_hash_is_read_when_it_alone_decides(peer: Peer) -> None:
    seen = await Attestor(workloads=[workload("a", _UID, f"unix:sha256:{'0' * 64}")]).attest(peer)
    assert _values(seen, "unix:sha256") == {_HASH}
    assert seen.process.sha256 == _HASH


@pytest.mark.parametrize("other", ["unix:uid:4242", "unix:path:/bin/other"])
async def test_the_hash_is_not_read_for_a_process_that_fails_anyway(peer: Peer, other: str) -> None:
    seen = await Attestor(workloads=[workload("a", other, f"unix:sha256:{_HASH}")]).attest(peer)
    assert not _values(seen, "unix:sha256")
    assert "unix:sha256" not in seen.unreadable


async def test_the_label_is_the_kernels_or_could_not_be_told(peer: Peer) -> None:
    attestor = Attestor(workloads=[workload("a", "lsm:label:x")])
    assert _values(await attestor.attest(replace(peer, label="confined (enforce)")), "lsm:label") == {
        "confined (enforce)"
    }
    assert "SO_PEERSEC" in (await attestor.attest(replace(peer, label=""))).unreadable["lsm:label"]


async def test_the_platform_speaks_for_every_caller(peer: Peer) -> None:
    attestor = Attestor(
        workloads=[],
        platform=frozenset({Selector("k8s:ns", "prod")}),
        platform_unreadable={"k8s:sa": "no token file"},
    )
    seen = await attestor.attest(peer)
    assert _values(seen, "k8s:ns") == {"prod"}
    assert seen.unreadable == {"k8s:sa": "no token file"}


async def test_of_an_unknown_pid_only_the_ids_are_known_and_proc_is_never_asked(peer: Peer) -> None:
    workloads = [workload("a", _UID), *(workload("b", f"{kind}:x") for kind in _PROC_KINDS)]
    seen = await Attestor(workloads=workloads).attest(replace(peer, pid=0))
    assert _values(seen, "unix:uid") == {str(os.geteuid())}
    assert seen.unreadable.keys() == _PROC_KINDS
    assert all("pid namespace" in cause for cause in seen.unreadable.values())
    assert seen.process.path == ""


async def test_cgroups_are_told_or_reported_whichever_way_this_machine_is_set_up(peer: Peer) -> None:
    seen = await Attestor(workloads=[workload("a", "systemd:unit:x"), workload("b", "container:id:x")]).attest(peer)
    private = procfs.is_in_private_cgroup_namespace()
    told = {selector.kind for selector in seen.selectors} | seen.unreadable.keys()
    assert not private or {"systemd:unit", "container:id"} <= told


async def test_a_process_that_ended_is_gone_whatever_was_read(peer: Peer) -> None:
    peer.close()
    with pytest.raises(DeniedError) as caught:
        await Attestor(workloads=[]).attest(peer)
    assert caught.value.reason is Reason.PEER_GONE


async def test_new_workloads_change_what_is_read_and_the_generation(peer: Peer) -> None:
    named = replace(peer, uid=0, gid=0)
    attestor = Attestor(workloads=[])
    before = await attestor.examine(named)
    attestor.replace([app := workload("a", "unix:user:x")])
    after = await attestor.examine(named)
    assert (before.workloads, after.workloads) == ((), (app,))
    assert after.generation == attestor.generation == before.generation + 1
    assert not _values(before.attestation, "unix:user")
    assert _values(after.attestation, "unix:user") == {pwd.getpwuid(0).pw_name}


async def test_a_hash_is_computed_once_and_survives_whoever_asked_first() -> None:
    digests = Digests()
    executable = procfs.executable(os.getpid())
    assert executable is not None
    first = asyncio.create_task(digests.of(os.getpid(), executable))
    others = [asyncio.create_task(digests.of(os.getpid(), executable)) for _ in range(20)]
    await asyncio.sleep(0)
    first.cancel()
    assert set(await asyncio.gather(*others)) == {_HASH}
    assert first.cancelled()
    no_process = 0
    assert await digests.of(no_process, executable) == _HASH  # from memory: nothing could be read there
