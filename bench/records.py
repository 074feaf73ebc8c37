"""Audit files as the proof that requests were answered as they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Records:
    """The lines of a JSON log that were not looked at yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Every line since the last look."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().splitlines()
            self._offset = file.tell()
        return [json.loads(line) for line in lines]

    def count(self, matches: Callable[[dict[str, Any]], bool]) -> int:
        """How many of them match."""
        return sum(map(matches, self.new()))


def is_answered_get(line: dict[str, Any]) -> bool:
    """In the agent's audit file: a credential that left. The outcome `ok` is not written out."""
    record = line["record"]
    return bool(record["event"] == "get" and record.get("outcome", "ok") == "ok" and record["version"] > 0)


def is_request_for(path: str) -> Callable[[dict[str, Any]], bool]:
    """In the vault's audit file: a request for `path` that reached the vault."""
    return lambda line: line["type"] == "request" and line["request"]["path"] == path
