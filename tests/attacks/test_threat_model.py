"""The threat model promises nothing that no test shows: every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.attacks.rig import ROOT

_MODEL = (ROOT / "docs" / "threat-model.md").read_text()
_CLAIMS = sorted(set(re.findall(r"`([a-z_/]+\.py(?:::\w+)+)`", _MODEL)))


def names_in(path: Path) -> set[str]:
    """The tests of a file, those of classes as `Class::test`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}::{each.name}" for each in methods}
    return found


def test_claims_are_found_in_the_text() -> None:
    assert len(_CLAIMS) > 40


@pytest.mark.parametrize("claim", _CLAIMS)
def test_the_test_of_a_claim_exists(claim: str) -> None:
    file, _, name = claim.partition("::")
    assert name in names_in(ROOT / "tests" / file)


def test_every_row_of_what_holds_names_a_test() -> None:
    holds = _MODEL.partition("## What holds")[2].partition("## What does not hold")[0]
    rows = [line for line in holds.splitlines() if line.startswith("| ") and not line.startswith(("| claim", "|---"))]
    assert rows
    assert [row for row in rows if "::test_" not in row] == []
