"""Invariant: whatever stands in the files, `parse` returns a Config or raises ConfigError with problems that have
places; and what the lines module accepts is what `tomllib` accepts, with the same values."""

from __future__ import annotations

import contextlib
import tomllib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.config import parse
from tokenward.config.toml_lines import Table, read
from tokenward.errors import ConfigError, Problem

EXAMPLE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text().partition("```toml\n")[2]
EXAMPLE = EXAMPLE.partition("```")[0]

PUNCTUATION = ("[", "]", "[[", "]]", "{", "}", "=", ",", ".", '"', "'", '"""', "'''", "\\", "#")
SPACE = ("\n", "\r\n", "\r", " ", "\t", "\0", "\x1b", "\x85", "\u2028")
WORDS = (
    "a",
    "b",
    "é",
    "[workloads.a]\n",
    "[vault]\n",
    "kind",
    "path",
    "selectors",
    "1",
    "-1",
    "nan",
    "1979-05-27",
    "true",
)
PIECES = st.sampled_from((*PUNCTUATION, *SPACE, *WORDS))
SCALARS = st.sampled_from(
    ("1", "0.5", "true", "nan", "07:32:00", "[]", "{}", "[[1]]", "{a = 1}", "[{a = 1}]", '"5m"', '"/a"', '"a/b"', '""')
)


def check(text: str) -> None:
    problems: tuple[Problem, ...] | None = None
    try:
        parse({"f": text})
    except ConfigError as error:
        problems = error.problems
    assert problems != ()
    for problem in problems or ():
        assert problem.file == "f"
        assert 1 <= problem.line <= text.count("\n") + 1
        assert problem.expected
        assert str(problem).isprintable()


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_arrangement_of_toml_s_pieces(text: str) -> None:
    check(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    check(text)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_example_with_lines_changed(data: st.DataObject) -> None:
    """A value of another type in the place of a good one, a line doubled, dropped or cut."""
    lines = EXAMPLE.splitlines(keepends=True)
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(lines) - 1))
        line = lines[index]
        change = data.draw(st.sampled_from(["value", "double", "drop", "cut", "insert"]))
        if change == "value" and "=" in line:
            lines[index] = line.partition("=")[0] + "= " + data.draw(SCALARS) + "\n"
        elif change == "double":
            lines[index] = line + line
        elif change == "drop":
            lines[index] = "\n"
        elif change == "cut":
            lines[index] = line[: data.draw(st.integers(0, len(line)))] + "\n"
        else:
            lines[index] = data.draw(PIECES) + line
    check("".join(lines))


def plain(table: Table) -> dict[str, object]:
    return {key: plain(one) if isinstance(one, Table) else one.value for key, one in table.entries.items()}


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=25).map("".join))
def test_what_is_accepted_is_what_tomllib_reads(text: str) -> None:
    root, is_toml = read({"f": text}, unique_in=frozenset())
    expected: dict[str, object] | None = None
    with contextlib.suppress(ValueError):
        expected = tomllib.loads(text)
    if expected is None:
        assert not is_toml or root.problems
    elif not root.problems:
        assert repr(plain(root)) == repr(expected)
