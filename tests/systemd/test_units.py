"""The units as files: how much they leave open, and that each point of it has its reason in the guide."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.systemd.machine import ROOT, UNITS

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze: install systemd")

GUIDE = (ROOT / "docs/systemd.md").read_text()
SERVICE = UNITS / "tokenward.service"
NO_PTRACE = UNITS / "drop-ins/no-ptrace.conf"


def security(unit: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", *options, str(unit)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("drop_in", "at_most"), [(None, 15), (NO_PTRACE, 13)])
def test_little_is_left_open(drop_in: Path | None, at_most: int, tmp_path: Path) -> None:
    unit = tmp_path / SERVICE.name
    unit.write_text(SERVICE.read_text() + ("" if drop_in is None else "\n" + drop_in.read_text()))
    done = security(unit, f"--threshold={at_most}")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"\b{at_most / 10}\b", GUIDE)


def test_what_is_left_open_has_a_reason_in_the_guide() -> None:
    points = json.loads(security(SERVICE, "--json=short").stdout)
    left = {point["name"] for point in points if float(point["exposure"] or 0) > 0}
    (table,) = re.findall(r"^## What stays open\n(.*)", GUIDE, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`.*?`) \| ", table, re.MULTILINE)
    named = {name.replace("\\|", "|") for row in rows for name in re.findall(r"`(.*?)`", row)}
    assert left - named == set()
