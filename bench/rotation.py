"""One rotation to many watchers, each with a connection of its own: how long until the last one has the new value.

The clock starts when the agent has the new value from the vault, which its audit file tells, and stops when the last
watcher here has read it; so the watchers' own cost, on the same cores, is in the figure.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import datetime

import grpc

from bench.servers import Agent, BenchError
from bench.site import ROTATING, Site
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc

WATCHERS = 1000
_WITHIN_S = 20.0


async def spread_ms(site: Site, agent: Agent, rotations: int) -> list[float]:
    """Milliseconds for each of some rotations."""
    async with AsyncExitStack() as closing:
        crowd = _Crowd()
        for _ in range(WATCHERS):
            channel = grpc.aio.insecure_channel(f"unix:{agent.socket}", [("grpc.use_local_subchannel_pool", 1)])
            await closing.enter_async_context(channel)
            watching = asyncio.create_task(crowd.watch(channel))
            closing.callback(watching.cancel)
        await crowd.all_have(1)
        took = []
        for version in range(2, rotations + 2):
            agent.audit.new()
            site.put(ROTATING, f"value number {version}")
            last_wall = await crowd.all_have(version)
            took.append((last_wall - _obtained_wall(agent)) * 1000)
        return took


class _Crowd:
    """All watchers, and how many have which version."""

    def __init__(self) -> None:
        self._have: dict[int, int] = {}
        self._changed = asyncio.Event()
        self._last_wall = 0.0

    async def watch(self, channel: grpc.aio.Channel) -> None:
        """One watcher."""
        version = 0
        async for message in rpc.CredentialServiceStub(channel).WatchCredentials(
            pb.WatchCredentialsRequest(names=[ROTATING])
        ):
            told = message.states[0].credential.version
            if told != version:
                version, self._last_wall = told, time.time()
                self._have[version] = self._have.get(version, 0) + 1
                self._changed.set()

    async def all_have(self, version: int) -> float:
        """Waits until everybody has `version`; returns when the last one got it."""
        try:
            async with asyncio.timeout(_WITHIN_S):
                while self._have.get(version, 0) < WATCHERS:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise BenchError(f"{self._have.get(version, 0)} of {WATCHERS} watchers have version {version}") from error
        return self._last_wall


def _obtained_wall(agent: Agent) -> float:
    """When the newest version came from the vault: before the first record that somebody was told of it."""
    lines = agent.audit.new()
    newest = max(line["record"].get("version", 0) for line in lines)
    told = next(at for at, line in enumerate(lines) if line["record"].get("version") == newest)
    issued = [line["time"] for line in lines[:told] if line["record"]["event"] == "issue"]
    return datetime.fromisoformat(issued[-1]).timestamp()
