"""A real OpenBao for the tests: the embedded vault with its audit log in a file, for tests that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenward.vault.embedded import EmbeddedVault


class Bao(EmbeddedVault):
    """`directory` must be one that only we can enter; the audit log is made in it."""

    def __init__(self, *, directory: Path, extra_config: str = "") -> None:
        self.audit_file = directory / "audit.log"
        super().__init__(directory=str(directory), audit_file=str(self.audit_file), extra_config=extra_config)

    def requests(self) -> list[dict[str, Any]]:
        """The `request` part of each audited request so far, in order: `operation`, `path`, `id`, `client_token`."""
        lines = [json.loads(line) for line in self.audit_file.read_text().splitlines()]
        return [line["request"] for line in lines if line["type"] == "request"]
