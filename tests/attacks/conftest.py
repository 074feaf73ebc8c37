"""One agent for all attacks on it, as one agent meets them all; whoever needs another has its own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import Process
from tests.attacks.rig import HEADING, Bystander, Meter, Target
from tests.openbao import Bao
from tests.site import until

QUIET_S = 3.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="attackers are other users, which only root can become")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every attack needs root; the test of the threat model does not."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "threat_model" not in item.path.name:
            item.add_marker(needs_root)


@pytest.fixture(scope="session")
def target(bao: Bao) -> Iterator[Target]:
    with tempfile.TemporaryDirectory(prefix="tw-") as directory:
        yield Target(Path(directory), bao.address).set_up(bao)


@pytest.fixture(scope="session")
def agent(target: Target) -> Iterator[Process]:
    with target.agent() as started:
        started.wait_for_log("serving on")
        yield started


@pytest.fixture(scope="session")
def meter(target: Target, agent: Process) -> Iterator[Meter]:
    """With a bystander that is being served, and that has met no error while all was quiet."""
    with Bystander(target) as bystander:
        until(lambda: bystander.seen().asked > 0, "the bystander is served")
        time.sleep(QUIET_S)  # how long is measured, and nothing is waited for
        bystander.quiet = bystander.seen()
        assert bystander.quiet.errors == ()
        print(HEADING)
        yield Meter(target, agent, bystander)
