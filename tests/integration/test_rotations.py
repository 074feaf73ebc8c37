"""Many rotations of one credential before many watchers: nobody is left behind, and nothing piles up.

A thousand rotations; TOKENWARD_FAULTS=full makes it ten thousand.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from tests.openbao import Bao
from tests.postgres import Postgres
from tests.site import Site, prepared
from tokenward.errors import TokenwardError
from tokenward.v1 import admin_pb2, admin_pb2_grpc
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.keeper import NoData

ROTATIONS = 10_000 if os.environ.get("TOKENWARD_FAULTS") == "full" else 1_000
WATCHERS = 100
CHANNELS = 10
WARM_UP = 200
TOKEN = """
[workloads.connector.credentials.token]
kind = "vault_token"
policy = "short"
"""


@pytest.fixture
async def site(directory: Path, fresh_bao: Bao, postgres: Postgres) -> Site:
    made = await prepared(directory, fresh_bao, postgres, overlap="5s")
    made.config.write_text(made.config.read_text() + TOKEN)
    made.vault_setup("--apply", "--token-file", "-")
    return made


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


async def tokens_of(site: Site, workload: str) -> int:
    """How many tokens with the workload's policy there are at the vault."""
    client = VaultClient(addresses=[site.vault.address])
    count = 0
    try:
        listed = await client.call(
            VaultRequest("LIST", "auth/token/accessors"), into=NoData, auth=site.vault.admin_token
        )
        for accessor in listed.require_data()["keys"]:
            lookup = VaultRequest("POST", "auth/token/lookup-accessor", {"accessor": accessor})
            with suppress(TokenwardError):  # it may end while we look
                found = await client.call(lookup, into=NoData, auth=site.vault.admin_token)
                count += any(policy.endswith(f":{workload}") for policy in found.require_data()["policies"])
    finally:
        await client.close()
    return count


class Watching:
    """One stream, and the newest version that it was told of."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.version = 0
        self.messages = 0
        self._stream = rpc.CredentialServiceStub(channel).WatchCredentials(pb.WatchCredentialsRequest(names=["token"]))

    async def read(self) -> None:
        async for message in self._stream:
            self.messages += 1
            for state in message.states:
                assert state.credential.version >= self.version, "never backwards"
                self.version = state.credential.version


async def test_everybody_ends_on_the_newest_and_neither_memory_nor_leases_grow(site: Site) -> None:
    with site.agent() as agent:
        agent.wait_for_log("serving on")
        channels = [grpc.aio.insecure_channel(f"unix:{site.socket}") for _ in range(CHANNELS)]
        admin = grpc.aio.insecure_channel(f"unix:{site.directory}/admin/admin.sock")
        watching = [Watching(channels[number % CHANNELS]) for number in range(WATCHERS)]
        readers = [asyncio.create_task(each.read()) for each in watching]

        async def all_at(version: int) -> None:
            async with asyncio.timeout(30):
                while any(each.version != version for each in watching):
                    await asyncio.sleep(0.01)

        await all_at(1)
        operate = admin_pb2_grpc.AdminServiceStub(admin)
        before_kib = 0
        for number in range(ROTATIONS):
            if number == WARM_UP:
                before_kib = resident_kib(agent.pid)
            request = admin_pb2.RotateRequest(workload="connector", credential="token", reason="test")
            done = await operate.Rotate(request)
            assert list(done.versions) == [number + 2]
        await all_at(ROTATIONS + 1)
        after_kib = resident_kib(agent.pid)
        assert await tokens_of(site, "connector") <= 2, "the current one, and the one before in its overlap"
        for each in readers:
            each.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for channel in (*channels, admin):
            await channel.close(None)

        async def one() -> bool:
            return await tokens_of(site, "connector") == 1

        async with asyncio.timeout(20):
            while not await one():
                await asyncio.sleep(0.2)
        told = sum(each.messages for each in watching) / WATCHERS
        print(
            f"{ROTATIONS} rotations, {WATCHERS} watchers, {told:.0f} messages each, "
            f"resident {before_kib / 1024:.1f} MiB after {WARM_UP}, {after_kib / 1024:.1f} MiB at the end, 1 token left"
        )
        assert after_kib <= before_kib * 1.1
