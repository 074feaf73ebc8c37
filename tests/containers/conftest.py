"""One engine and one image for all tests that run containers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.engine import Engine, missing


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """podman with the image built (a minute); skips where that cannot be."""
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    with tempfile.TemporaryDirectory(prefix="tokenward-c-", ignore_cleanup_errors=True) as directory:
        made = Engine(Path(directory))
        try:
            made.build()
            yield made
        finally:
            made.close()
