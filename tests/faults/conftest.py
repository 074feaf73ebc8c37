"""What the tests of faults share: directories whose paths are short enough for sockets, and the table of all faults."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.rig import HEADING


@pytest.fixture(scope="module")
def module_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tw-") as made:
        yield Path(made)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tw-") as made:
        yield Path(made)


@pytest.fixture(scope="module", autouse=True)
def table() -> None:
    """The table's head; each measurement prints its line (`pytest -s`)."""
    print(f"\n{HEADING}")
