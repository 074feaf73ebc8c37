"""Fixtures of the tests that run the agent as a process: a site, its agent, and a client of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import Process
from tests.openbao import Bao
from tests.postgres import Postgres
from tests.site import Site, prepared
from tokenward.client import Client


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tw-") as made:
        yield Path(made)


@pytest.fixture
async def site(directory: Path, fresh_bao: Bao, postgres: Postgres) -> Site:
    return await prepared(directory, fresh_bao, postgres)


@pytest.fixture
def agent(site: Site) -> Iterator[Process]:
    with site.agent() as started:
        started.wait_for_log("serving on")
        yield started


@pytest.fixture
def client(site: Site, agent: Process) -> Iterator[Client]:
    del agent
    with Client(site.socket) as opened:
        yield opened
