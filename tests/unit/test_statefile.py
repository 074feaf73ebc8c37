"""The state file: what was revoked is there after a restart, or the agent does not start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tokenward.core.blocks import Block, Scope
from tokenward.errors import TokenwardError
from tokenward.statefile import LeftOver, StateFile

BLOCK = Block(scope=Scope(workload="app", credential="api"), reason="leaked", by="uid 0", since=5.0)
LEFT = LeftOver(accessor="acc", workload="app", credential="api", ends=9.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


def test_what_was_saved_is_there_again_and_is_nobody_elses(path: Path) -> None:
    StateFile(str(path)).save([BLOCK], [LEFT])
    assert StateFile(str(path)).load() == ((BLOCK,), (LEFT,))
    assert path.stat().st_mode & 0o777 == 0o600
    StateFile(str(path)).save([], [])
    assert StateFile(str(path)).load() == ((), ())


def test_without_anything_to_remember_no_file_is_made(path: Path) -> None:
    state = StateFile(str(path))
    assert state.load() == ((), ())
    state.save([], [])
    assert not path.exists()


def test_a_file_that_cannot_be_written_says_so_and_leaves_what_was_there(path: Path) -> None:
    state = StateFile(str(path))
    state.save([BLOCK], [])
    Path(f"{path}.new").mkdir()
    with pytest.raises(TokenwardError, match="cannot be written"):
        state.save([], [])
    assert state.load() == ((BLOCK,), ())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format":1,"more":2}', b"\xff", b'{"blocks":[{}]}'])
def test_a_state_that_cannot_be_understood_is_not_ignored(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(TokenwardError, match="not a state"):
        StateFile(str(path)).load()


def test_a_state_that_others_may_write_is_not_believed(path: Path) -> None:
    StateFile(str(path)).save([BLOCK], [])
    path.chmod(0o620)
    with pytest.raises(TokenwardError, match="nobody else may write"):
        StateFile(str(path)).load()


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_something_else_in_its_place_is_not_read(path: Path, kind: str) -> None:
    if kind == "link":
        StateFile(f"{path}.other").save([BLOCK], [])
        path.symlink_to(f"{path}.other")
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.mkdir()
    with pytest.raises(TokenwardError):
        StateFile(str(path)).load()
