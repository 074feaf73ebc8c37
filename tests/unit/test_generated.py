"""The stubs that are checked in are what the .proto files say."""

from __future__ import annotations

from pathlib import Path

from tests.generate import ROOT, generate


def test_the_stubs_do_not_drift_from_the_protos(tmp_path: Path) -> None:
    """Red? Run `python -m tests.generate`."""
    generate(tmp_path)
    made = {path.name: path.read_text() for path in (tmp_path / "tokenward" / "v1").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "agent" / "tokenward" / "v1").glob("*_pb2*.py*")}
    assert made == kept
