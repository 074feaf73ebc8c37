"""Presence: real processes, and when the last of them has gone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tokenward.attest.peer import Peer
from tokenward.presence import Presence


@contextmanager
def process() -> Iterator[tuple[Peer, subprocess.Popen[bytes]]]:
    """A process that waits for its stdin to end, as a peer."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    peer = Peer(pid=child.pid, uid=os.getuid(), gid=os.getgid(), groups=(), label="", pidfd=os.pidfd_open(child.pid))
    try:
        yield peer, child
    finally:
        peer.close()
        end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    child.communicate()


class Told:
    """Who was reported gone."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.told = asyncio.Event()

    def __call__(self, name: str) -> None:
        self.names.append(name)
        self.told.set()

    async def wait(self) -> None:
        async with asyncio.timeout(10):
            await self.told.wait()


async def test_a_workload_has_gone_with_its_last_process() -> None:
    told = Told()
    presence = Presence(linger_s=0, on_gone=told)
    with process() as (one, first), process() as (other, second):
        presence.note("app", one)
        presence.note("app", other)
        presence.note("app", one)
        end(first)
        await until_followed(presence, 1)
        assert told.names == []
        end(second)
        await told.wait()
    assert told.names == ["app"]
    presence.close()


async def test_a_connection_that_closes_is_not_a_process_that_goes() -> None:
    told = Told()
    presence = Presence(linger_s=0, on_gone=told)
    with process() as (peer, child):
        presence.note("app", peer)
        peer.close()
        await asyncio.sleep(0)
        assert told.names == []
        end(child)
        await told.wait()
    presence.close()


async def test_who_comes_back_in_time_has_not_gone() -> None:
    told = Told()
    presence = Presence(linger_s=3600, on_gone=told)
    with process() as (one, first), process() as (other, second):
        presence.note("app", one)
        end(first)
        await until_followed(presence, 0)
        presence.note("app", other)
        presence.linger_s = 0
        end(second)
        await told.wait()
    assert told.names == ["app"]
    presence.close()


async def test_a_workload_of_which_one_could_not_be_followed_is_never_reported_gone() -> None:
    told = Told()
    presence = Presence(linger_s=0, on_gone=told, most=1)
    with process() as (one, first), process() as (other, _):
        presence.note("app", one)
        presence.note("app", other)
        presence.note("tiny", other)
        end(first)
        await until_followed(presence, 0)
        await asyncio.sleep(0)
        assert told.names == []
    presence.close()


async def test_workloads_are_apart_and_closing_reports_nobody() -> None:
    told = Told()
    presence = Presence(linger_s=0, on_gone=told)
    with process() as (one, first), process() as (other, second):
        presence.note("app", one)
        presence.note("batch", other)
        end(first)
        await told.wait()
        presence.close()
        end(second)
        await asyncio.sleep(0)
    assert told.names == ["app"]


async def test_processes_of_another_pid_namespace_are_followed_too() -> None:
    told = Told()
    presence = Presence(linger_s=0, on_gone=told)
    with process() as (peer, child):
        unseen = Peer(pid=0, uid=peer.uid, gid=peer.gid, groups=(), label="", pidfd=peer.pidfd)
        presence.note("app", unseen)
        end(child)
        await told.wait()
    presence.close()


async def until_followed(presence: Presence, count: int) -> None:
    async with asyncio.timeout(10):
        while presence.count != count:
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before + 4, "the event loop's own"
