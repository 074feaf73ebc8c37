"""errors: one tree, and a document that has every reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenward import errors
from tokenward.errors import ConfigError, Problem, Reason, TokenwardError, UnavailableError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_documented(reason: Reason) -> None:
    assert f"| `{reason}` |" in DOCUMENT.read_text()


def test_every_error_has_one_root_and_says_whether_to_retry() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    ours = [each for each in classes if issubclass(each, TokenwardError)]
    assert ours == classes
    assert all(each.retryable == issubclass(each, UnavailableError) for each in ours)


def test_a_configuration_error_tells_every_mistake_with_its_place() -> None:
    error = ConfigError((Problem("a.toml", 3, "vault", "expected a table"), Problem("a.toml", 9, "x", "unknown")))
    assert error.public == "a.toml:3: vault: expected a table\na.toml:9: x: unknown"
