"""How long a proof counts, and what a connection may become. The process is our own."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from tests.making import workload
from tokenward.attest import Attestor, Caller, Peer, peer_of
from tokenward.attest.attestor import Examined
from tokenward.core.identity import SpiffeId
from tokenward.core.model import Workload
from tokenward.errors import AttestationError, DeniedError, Reason

_UID = f"unix:uid:{os.geteuid()}"
_GID = f"unix:gid:{os.getegid()}"
_APP = workload("app", _UID)
_OTHER = workload("other", _GID)


class CountingAttestor(Attestor):
    """Counts its attestations, and holds them back while `gate` is not set."""

    def __init__(self, workloads: Iterable[Workload], *, reattest_s: float = 60.0) -> None:
        super().__init__(workloads=workloads, reattest_s=reattest_s)
        self.examined = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def examine(self, peer: Peer) -> Examined:
        self.examined += 1
        examined = await super().examine(peer)
        await self.gate.wait()
        return examined


@pytest.fixture
def peer() -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours)
        yield peer
        peer.close()


async def _refused(caller: Caller, now_mono: float = 0.0) -> DeniedError:
    with pytest.raises(DeniedError) as caught:
        await caller.identify(now_mono)
    return caught.value


# -- the proof ------------------------------------------------------------------------------------------------------


async def test_a_caller_is_the_one_workload_that_matches(peer: Peer) -> None:
    attested = await Caller(peer=peer, attestor=CountingAttestor([_APP])).identify(0.0)
    assert attested.workload == _APP
    assert attested.attestation.process.pid == os.getpid()


async def test_a_proof_counts_until_it_is_too_old(peer: Peer) -> None:
    attestor = CountingAttestor([_APP], reattest_s=60.0)
    caller = Caller(peer=peer, attestor=attestor)
    first = await caller.identify(1000.0)
    assert await caller.identify(1059.9) is first
    assert attestor.examined == 1
    assert await caller.identify(1060.0) is not first
    assert await caller.identify(1119.9)
    assert attestor.examined == 2


async def test_a_proof_that_counts_is_given_without_waiting_for_anything(peer: Peer) -> None:
    caller = Caller(peer=peer, attestor=CountingAttestor([_APP]))
    await caller.identify(0.0)
    with pytest.raises(StopIteration):  # a coroutine that never yields to the loop ends at its first step
        caller.identify(1.0).send(None)


async def test_a_proof_that_counts_is_cheap(peer: Peer) -> None:
    """It is in every request. The bound is ten times what was measured, for slow machines."""
    caller = Caller(peer=peer, attestor=CountingAttestor([_APP]))
    await caller.identify(0.0)
    fastest = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            await caller.identify(1.0)
        fastest = min(fastest, (time.perf_counter() - began) / 200)
    assert fastest < 60e-6


async def test_one_attestation_serves_everyone_who_asked_meanwhile(peer: Peer) -> None:
    attestor = CountingAttestor([_APP])
    attestor.gate.clear()
    caller = Caller(peer=peer, attestor=attestor)
    asked = [asyncio.create_task(caller.identify(0.0)) for _ in range(100)]
    await asyncio.sleep(0)
    attestor.gate.set()
    assert {attested.workload.name for attested in await asyncio.gather(*asked)} == {"app"}
    assert attestor.examined == 1


@pytest.mark.parametrize("cancelled", [0, 1, 99])
async def test_who_leaves_does_not_disturb_the_others(peer: Peer, cancelled: int) -> None:
    attestor = CountingAttestor([_APP])
    attestor.gate.clear()
    caller = Caller(peer=peer, attestor=attestor)
    asked = [asyncio.create_task(caller.identify(0.0)) for _ in range(100)]
    await asyncio.sleep(0)
    leaver = asked.pop(cancelled)
    leaver.cancel()
    await asyncio.wait({leaver})
    attestor.gate.set()
    assert len(await asyncio.gather(*asked)) == 99
    assert leaver.cancelled()
    assert attestor.examined == 1


async def test_when_everyone_left_the_next_one_is_served(peer: Peer) -> None:
    attestor = CountingAttestor([workload("nobody", "unix:uid:4242")])
    attestor.gate.clear()
    caller = Caller(peer=peer, attestor=attestor)
    leaver = asyncio.create_task(caller.identify(0.0))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.wait({leaver})
    next_one = asyncio.create_task(_refused(caller))
    attestor.gate.set()
    assert (await next_one).reason is Reason.NO_MATCHING_WORKLOAD
    assert attestor.examined == 1


async def test_workloads_replaced_during_an_attestation_are_the_ones_that_count(peer: Peer) -> None:
    attestor = CountingAttestor([_APP])
    attestor.gate.clear()
    caller = Caller(peer=peer, attestor=attestor)
    asked = asyncio.create_task(caller.identify(0.0))
    await asyncio.sleep(0)
    changed = replace(_APP, grants={})
    attestor.replace([changed])
    attestor.gate.set()
    assert (await asked).workload is changed


async def test_a_peer_that_is_gone_is_refused_before_and_after_it_was_proved(peer: Peer) -> None:
    caller, proved = (Caller(peer=peer, attestor=CountingAttestor([_APP])) for _ in range(2))
    await proved.identify(0.0)
    peer.close()
    assert (await _refused(caller)).reason is Reason.PEER_GONE
    assert (await _refused(proved)).reason is Reason.PEER_GONE


# -- changes --------------------------------------------------------------------------------------------------------


async def test_new_workloads_are_looked_at_at_once(peer: Peer) -> None:
    attestor = CountingAttestor([_APP])
    caller = Caller(peer=peer, attestor=attestor)
    await caller.identify(0.0)
    changed = replace(_APP, grants={})
    attestor.replace([changed])
    assert (await caller.identify(0.0)).workload is changed


@pytest.mark.parametrize("workloads", [[], [_OTHER], [replace(_APP, spiffe_id=SpiffeId.of("example.org", "/new"))]])
async def test_a_connection_never_becomes_another_workload(peer: Peer, workloads: list[Workload]) -> None:
    attestor = CountingAttestor([_APP])
    caller = Caller(peer=peer, attestor=attestor)
    await caller.identify(0.0)
    attestor.replace(workloads)
    for _ in range(2):
        error = await _refused(caller)
        assert error.reason is Reason.IDENTITY_CHANGED
        assert "app" in error.public
    attestor.replace([_APP])
    assert (await caller.identify(0.0)).workload is _APP


async def test_a_connection_that_was_nobody_may_become_somebody(peer: Peer) -> None:
    attestor = CountingAttestor([])
    caller = Caller(peer=peer, attestor=attestor)
    assert (await _refused(caller)).reason is Reason.NO_MATCHING_WORKLOAD
    attestor.replace([_APP])
    assert (await caller.identify(0.0)).workload is _APP


# -- refusals -------------------------------------------------------------------------------------------------------


async def test_a_refusal_shows_what_a_workload_could_be_written_from(peer: Peer) -> None:
    error = await _refused(Caller(peer=peer, attestor=CountingAttestor([workload("app", "unix:uid:4242")])))
    assert error.reason is Reason.NO_MATCHING_WORKLOAD
    for selector in (_UID, _GID, f"unix:path:{os.path.realpath(sys.executable)}"):
        assert selector in error.public


async def test_a_refusal_is_short_whatever_the_caller_has(peer: Peer) -> None:
    many = replace(peer, groups=tuple(range(30_000)))
    error = await _refused(Caller(peer=many, attestor=CountingAttestor([])))
    assert len(error.public) < 1100
    assert "and 2998" in error.public
    long = replace(peer, label="x" * 3000)
    assert len((await _refused(Caller(peer=long, attestor=CountingAttestor([])))).public) < 1100


async def test_two_matches_are_both_named(peer: Peer) -> None:
    error = await _refused(Caller(peer=peer, attestor=CountingAttestor([_APP, _OTHER])))
    assert error.reason is Reason.AMBIGUOUS_WORKLOAD
    assert "app and other" in error.public


async def test_not_to_be_able_to_tell_is_not_a_no(peer: Peer) -> None:
    attestor = CountingAttestor([workload("app", _UID, "unix:path:/bin/app")])
    with pytest.raises(AttestationError) as caught:
        await Caller(peer=replace(peer, pid=0), attestor=attestor).identify(0.0)
    assert caught.value.reason is Reason.ATTESTATION_INCOMPLETE
    assert caught.value.retryable
    assert "pid namespace" in caught.value.public


async def test_a_stale_proof_is_not_given_when_the_next_attestation_cannot_tell(peer: Peer) -> None:
    attestor = CountingAttestor([_APP])
    caller = Caller(peer=peer, attestor=attestor)
    await caller.identify(0.0)
    attestor.replace([_APP, workload("in-doubt", "lsm:label:x")])
    if peer.label:
        pytest.skip("this machine has a security module that labels sockets")
    for _ in range(2):
        with pytest.raises(AttestationError):
            await caller.identify(0.0)
    attestor.replace([_APP])
    assert (await caller.identify(0.0)).workload is _APP


async def test_an_executable_that_was_replaced_is_named_as_the_cause(peer: Peer) -> None:
    class Replaced(CountingAttestor):
        async def examine(self, peer: Peer) -> Examined:
            examined = await super().examine(peer)
            seen = examined.attestation
            selectors = frozenset(s for s in seen.selectors if s.kind != "unix:path")
            process = replace(seen.process, path="/opt/app\x1b (deleted)")
            return replace(examined, attestation=replace(seen, selectors=selectors, process=process))

    error = await _refused(Caller(peer=peer, attestor=Replaced([workload("app", "unix:path:/opt/app")])))
    assert error.reason is Reason.NO_MATCHING_WORKLOAD
    assert "restart the process" in error.public
    assert "/opt/app? (deleted)" in error.public
