"""Real servers for the tests that need them, each started when the first test asks for it."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.openbao import Bao
from tests.postgres import Postgres

settings.register_profile("unhurried", settings(), deadline=None)  # how long an example takes is not what is tested
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def bao() -> Iterator[Bao]:
    """An OpenBao that all tests share: use mounts, roles and policies of your own names."""
    with _private_directory() as directory, Bao(directory=Path(directory)) as started:
        yield started


@pytest.fixture
def fresh_bao() -> Iterator[Bao]:
    """An OpenBao with nothing in it, for this test alone (0.2 s)."""
    with _private_directory() as directory, Bao(directory=Path(directory)) as started:
        yield started


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL that all tests share: use databases and login roles of your own names."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        pytest.skip("PostgreSQL does not run for a user that the user database does not know")
    with Postgres() as started:
        yield started


def _private_directory() -> tempfile.TemporaryDirectory[str]:
    """Mode 0700 and short: a socket's path is limited, and pytest's own directories are deep."""
    return tempfile.TemporaryDirectory(prefix="tokenward-bao-")
