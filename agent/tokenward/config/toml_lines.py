"""TOML tables that remember where each key stands, read key by key, with every mistake kept for one report.

Owns: splitting TOML text into statements, merging several documents into one tree of `Table`, and the reports that
need a line: bad syntax, the same key twice, a missing key, an unknown key. Leaves to others what the values mean:
`values` parses one value, `form` and the readers above it know the sections.

`tomllib` gives no lines and stops at the first mistake, and no library gives both lines and values (tomlkit keeps no
positions). So each statement is cut out here and handed to `tomllib` alone, which makes its line known. The whole text
goes through `tomllib` too: nothing is accepted that is not TOML.

Invariant: reading never raises. A mistake becomes a Problem, and every later read goes on as if it were not there.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Generic, TypeVar

from tokenward.errors import Problem

T = TypeVar("T")
D = TypeVar("D")
Parse = Callable[[object], T]
"""Turns what TOML gave into what we want. Raises ValueError with the text that follows the key in the report."""

_MAX_DEPTH = 16
_TOO_DEEP = "nested deeper than anything that is known here"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_WHERE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_TOKEN = re.compile(
    r"""
      (?P<blank>   [\ \t\r]+ | \#[^\n]* )
    | (?P<newline> \n )
    | (?P<open>    [\[{] )
    | (?P<close>   [\]}] )
    | (?P<comma>   , )
    | (?P<text>    \"{3} (?: \\. | [^\\] )*? \"{3,5} | '{3} .*? '{3,5} | " (?: \\. | [^"\\\n] )* " | ' [^'\n]* '
                   | [^\s\#\[\]{},"']+ | . )
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Value:
    """Anything that is not a table. `element_lines` has the line of each element when it is an array."""

    place: Place
    value: object
    element_lines: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Each(Generic[T]):
    """How to read an array: `parse` for each element, all of them different; `least` is 0 or 1."""

    parse: Parse[T]
    least: int = 0


class Table:
    """One table of the merged documents. Asking for a key makes it known; `report_unknown` reports the others."""

    def __init__(self, *, key: tuple[str, ...], place: Place, problems: list[Problem]) -> None:
        self.key = key
        self.place = place
        self.problems = problems
        self.entries: dict[str, Table | Value] = {}
        self.headers: list[Place] = []
        self.elsewhere: Mapping[str, str] = {}
        """For a key that is not known here, where it would be."""
        self._asked: set[str] | None = set()

    def __contains__(self, key: str) -> bool:
        self._ask(key)
        return key in self.entries

    def report(self, key: str, expected: str, *, element: int | None = None) -> None:
        """Adds what `problem` makes to the problems of all tables."""
        self.problems.append(self.problem(key, expected, element=element))

    def problem(self, key: str, expected: str, *, element: int | None = None) -> Problem:
        """A problem at `key`, at the table's own line where that key is not set; at the table itself for ""."""
        entry = self.entries.get(key)
        place = entry.place if entry else self.place
        name = _dotted((*self.key, key) if key else self.key)
        if element is not None:
            name += f"[{element}]"
            if isinstance(entry, Value) and element < len(entry.element_lines):
                place = Place(place.file, entry.element_lines[element])
        return Problem(place.file, place.line, name, expected)

    def require(self, key: str) -> None:
        """Reports `key` where it is not set."""
        if key not in self.entries:
            self.report(key, "is required")

    def take(self, key: str, parse: Parse[T], default: D) -> T | D:
        """The value of `key`, or `default` where it is not set or cannot be used (which is then reported)."""
        self._ask(key)
        entry = self.entries.get(key)
        if entry is None:
            return default
        try:
            return parse(entry.value if isinstance(entry, Value) else entry)
        except ValueError as error:
            self.report(key, str(error))
            return default

    def take_each(self, key: str, each: Each[T], default: D) -> tuple[T, ...] | D:
        """As `take`, for an array, each mistake at the line of its element."""
        self._ask(key)
        entry = self.entries.get(key)
        if entry is None:
            return default
        value = entry.value if isinstance(entry, Value) else None
        if not isinstance(value, list) or len(value) < each.least:
            self.report(key, f'expected a list{" of at least one" if each.least else ""}, such as ["..."]')
            return default
        parsed: list[T] = []
        for index, element in enumerate(value):
            try:
                one = each.parse(element)
                if one in parsed:
                    raise ValueError("is listed twice")
                parsed.append(one)
            except ValueError as error:
                self.report(key, str(error), element=index)
        return tuple(parsed) if len(parsed) == len(value) else default

    def child(self, key: str) -> Table:
        """The table at `key`; an empty one at this place where there is none, so that defaults need no second path.

        Where something else is there, that is reported and nothing more: the empty table then reports to nobody.
        """
        self._ask(key)
        entry = self.entries.get(key)
        if isinstance(entry, Table):
            return entry
        if entry is None:
            return Table(key=(*self.key, key), place=self.place, problems=self.problems)
        self.report(key, f"expected a table, written [{_dotted((*self.key, key))}]")
        return Table(key=(*self.key, key), place=entry.place, problems=[])

    def children(self) -> Iterator[tuple[str, Table]]:
        """Every table in this one by name: for tables whose keys are names that the user chooses."""
        for name in list(self.entries):
            yield name, self.child(name)

    def ignore_rest(self) -> None:
        """What else stands in this table cannot be judged (its kind is not known): report none of it."""
        self._asked = None

    def report_unknown(self) -> None:
        """Reports every key, here and below, that nobody asked for."""
        if self._asked is None:
            return
        for key, entry in self.entries.items():
            if key in self._asked:
                if isinstance(entry, Table):
                    entry.report_unknown()
            elif key in self.elsewhere:
                self.report(key, self.elsewhere[key])
            else:
                self.report(key, f"unknown key; {nearest(key, self._asked)}")

    def declare(self, place: Place, *, once: bool) -> bool:
        """Notes a `[header]` of this table; a second one in the same file, or anywhere if `once`, is reported."""
        before = [header for header in self.headers if once or header.file == place.file]
        if not self.headers:
            self.place = place
        self.headers.append(place)
        if before:
            name = _dotted(self.key)
            self.problems.append(Problem(place.file, place.line, name, f"is already declared at {before[0]}"))
        return not before

    def open(self, key: str, place: Place) -> Table | None:
        """The table at `key`, made if need be; None, reported, where something else is there or it is too deep."""
        entry = self.entries.get(key)
        if entry is None and len(self.key) < _MAX_DEPTH:
            entry = self.entries[key] = Table(key=(*self.key, key), place=place, problems=self.problems)
        if isinstance(entry, Table):
            return entry
        why = f"is already set at {entry.place}" if entry else _TOO_DEEP
        self.problems.append(Problem(place.file, place.line, _dotted((*self.key, key)), why))
        return None

    def merge(self, parsed: Mapping[str, object], place: Place, element_lines: tuple[int, ...]) -> None:
        """Adds what one statement says; a key that is set already is reported with both places."""
        for key, value in parsed.items():
            if isinstance(value, dict):
                table = self.open(key, place)
                if table is not None:
                    table.merge(value, place, element_lines)
            elif key in self.entries:
                why = f"is already set at {self.entries[key].place}"
                self.problems.append(Problem(place.file, place.line, _dotted((*self.key, key)), why))
            else:
                self.entries[key] = Value(place, value, element_lines if isinstance(value, list) else ())

    def _ask(self, key: str) -> None:
        if self._asked is not None:
            self._asked.add(key)


def nearest(word: str, known: Iterable[str]) -> str:
    """What to write instead of `word`: the nearest of `known`, or all of them where none is near."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names) or 'none'}"


def read(documents: Mapping[str, str], *, unique_in: frozenset[str]) -> tuple[Table, bool]:
    """All documents (file name to text) as one table, and whether each of them is TOML.

    Tables merge across documents, keys do not: the same one twice is reported. A table right below a table named in
    `unique_in` is a thing with a name, and stands in one document only.
    """
    first = next(iter(documents), "")
    root = Table(key=(), place=Place(first, 1), problems=[])
    is_toml = True
    for file, text in documents.items():
        seen = len(root.problems)
        well_formed = _read_statements(root, file, text.replace("\r\n", "\n"), unique_in)
        is_toml = is_toml and well_formed
        if len(root.problems) == seen and isinstance(failure := _parse(text), _Failure):
            root.problems.append(Problem(file, failure.line, "syntax", failure.why))
            is_toml = False
    return root, is_toml


@dataclass(frozen=True, slots=True)
class _Statement:
    line: int
    text: str
    element_lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Failure:
    line: int
    why: str


def _read_statements(root: Table, file: str, text: str, unique_in: frozenset[str]) -> bool:
    well_formed = True
    table: Table | None = root
    for statement in _statements(text):
        place = Place(file, statement.line)
        is_header = statement.text.startswith("[")
        parsed = _parse(statement.text)
        if isinstance(parsed, _Failure):
            line = statement.line + parsed.line - 1
            root.problems.append(Problem(file, line, "syntax", parsed.why))
            well_formed = False
            table = None if is_header else table
        elif is_header:
            table = _open_header(root, parsed, place, unique_in)
        elif table is not None:
            table.merge(parsed, place, statement.element_lines)
    return well_formed


def _open_header(root: Table, parsed: Mapping[str, object], place: Place, unique_in: frozenset[str]) -> Table | None:
    """The table that a header opens, which was parsed to `{"a": {"b": {}}}`; None where it is to be passed over."""
    table = root
    below: object = parsed
    while isinstance(below, dict) and below:
        name, below = next(iter(below.items()))
        opened = table.open(name, place)
        if opened is None:
            return None
        table = opened
    if isinstance(below, list):  # [[name]]
        root.problems.append(Problem(place.file, place.line, _dotted(table.key), "expected one table, written [name]"))
        return None
    once = len(table.key) > 1 and table.key[-2] in unique_in
    return table if table.declare(place, once=once) else None


def _statements(text: str) -> Iterator[_Statement]:
    """Cuts `text` into headers and `key = value` pairs, each with its first line and the lines of array elements."""
    line = begin_line = 1
    begin: int | None = None
    depth = 0
    element_next = False
    elements: list[int] = []
    for token in _TOKEN.finditer(text + "\n"):
        what = token.lastgroup
        if what == "newline" and begin is not None and (depth == 0 or text[begin] == "["):  # a header is one line
            yield _Statement(begin_line, text[begin : token.start()], tuple(elements))
            begin, depth, elements = None, 0, []
        elif what not in {"newline", "blank"}:
            if begin is None:
                begin, begin_line = token.start(), line
            if depth == 1 and element_next and what != "close":
                elements.append(line)
                element_next = False
            depth = max(0, depth + {"open": 1, "close": -1}.get(what or "", 0))
            element_next = element_next or (depth == 1 and what in {"open", "comma"})
        line += token[0].count("\n")
    if begin is not None:  # a bracket is open to the end
        yield _Statement(begin_line, text[begin:], tuple(elements))


def _parse(text: str) -> dict[str, object] | _Failure:
    try:
        return tomllib.loads(text)
    except RecursionError:
        return _Failure(1, _TOO_DEEP)
    except ValueError as error:  # TOMLDecodeError, and int()'s own for a number of thousands of digits
        where = _WHERE.search(str(error))
        return _Failure(int(where[1]) if where and where[1] else 1, _WHERE.sub("", str(error)))


def _dotted(key: tuple[str, ...]) -> str:
    """The key as TOML writes it; quoting also keeps terminal escapes out of reports."""
    return ".".join(part if _BARE_KEY.fullmatch(part) else json.dumps(part) for part in key)
