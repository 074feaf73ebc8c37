"""Where each key of a TOML document stands, over everything that TOML can put around it."""

from __future__ import annotations

import pytest

from tokenward.config.toml_lines import Table, Value, nearest, read

DOCUMENT = '''\
# [not.a.header]
a = "x # no comment [ \\" ]"   # a comment with "quotes" and [
'b c' = \'single # \\\'

[t]     # [u]
many = """
[not.a.header]
k = 1 \\""" still
"""
after.dotted."k.1" = [1, # one
  2, [3,
  3], "]", { x = 1 }
  ,
]
\'\'\'q\'\'\' = 1
'''
VALID = DOCUMENT.replace("'''q''' = 1\n", "") + "[t.sub]\nlast = '''\nx'''''\n[[not_used]]\nignored = 1\n"


def lines_of(table: Table) -> dict[str, int]:
    lines = {}
    for key, entry in table.entries.items():
        lines[".".join((*table.key, key))] = entry.place.line
        if isinstance(entry, Table):
            lines |= lines_of(entry)
    return lines


def test_each_key_has_its_line() -> None:
    root, is_toml = read({"f": VALID}, unique_in=frozenset())
    assert is_toml
    lines = lines_of(root)
    assert lines == {
        "a": 2,
        "b c": 3,
        "t": 5,
        "t.many": 6,
        "t.after": 10,
        "t.after.dotted": 10,
        "t.after.dotted.k.1": 10,
        "t.sub": 15,
        "t.sub.last": 16,
        "not_used": 18,
    }
    assert [(problem.line, problem.key) for problem in root.problems] == [(18, "not_used")]


def test_each_element_of_an_array_has_its_line() -> None:
    root, _ = read({"f": VALID}, unique_in=frozenset())
    entry = root.child("t").child("after").child("dotted").entries["k.1"]
    assert isinstance(entry, Value)
    assert entry.value == [1, 2, [3, 3], "]", {"x": 1}]
    assert entry.element_lines == (10, 11, 11, 12, 12)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\nb = \n", 2),
        ("a = 1\n\n= 2\n", 3),
        ("a = 1 b = 2\n", 1),
        ('a = 1\nb = """x\ny\n', 2),
        ("a = 1\nb = [1,\n2\nc = 3\n", 4),
        ("a = { b = 1,\n c = 2 }\n[x\ny = 2\n", 1),
        ("a = 1\r\nb = ?\r\n", 2),
        ("a = 1\rb = 2\n", 1),
        ("# \x00\n", 1),
        ("\ufeffa = 1\n", 1),
        ("a = 1\nb = " + "9" * 5000 + "\n", 2),
        ("a = 1\nb = " + "[" * 5000 + "\n", 2),
        ("a = { b = 1 }\n[a.c]\n", 2),
        ("a.b = 1\n[a]\n", 2),
    ],
)
def test_what_is_not_toml_is_a_problem_at_its_line(text: str, line: int) -> None:
    root, is_toml = read({"f": text}, unique_in=frozenset())
    assert not is_toml
    assert (root.problems[0].line, root.problems[0].key) == (line, "syntax")


def test_every_statement_that_is_not_toml_is_a_problem() -> None:
    root, _ = read({"f": "a = ?\n[b\nc = 1\n[d]\ne = !\n"}, unique_in=frozenset())
    assert [problem.line for problem in root.problems] == [1, 2, 5]


def test_keys_below_a_header_that_is_not_toml_belong_to_nothing() -> None:
    root, _ = read({"f": "a = 1\n[b\na = 2\n"}, unique_in=frozenset())
    assert [(problem.line, problem.key) for problem in root.problems] == [(2, "syntax")]


def test_the_same_key_twice_names_both_places() -> None:
    text = "[a]\nb.c = 1\nb.c = 2\nb.c.d = 3\nb = 4\n[a]\nx = 1\n"
    root, is_toml = read({"f": text}, unique_in=frozenset())
    assert is_toml  # in form, so its meaning is looked at as well
    assert [f"{problem.line} {problem.key} {problem.expected}" for problem in root.problems] == [
        "3 a.b.c is already set at f:2",
        "4 a.b.c is already set at f:2",
        "5 a.b is already set at f:2",
        "6 a is already declared at f:1",
    ]


def test_tables_merge_across_documents_unless_they_have_names_of_their_own() -> None:
    documents = {"f": "[vault]\na = 1\n[workloads.x]\n", "g": "[vault]\nb = 2\n[workloads.x]\n[workloads.y]\n"}
    root, _ = read(documents, unique_in=frozenset({"workloads"}))
    assert set(root.child("vault").entries) == {"a", "b"}
    assert [str(problem) for problem in root.problems] == ["g:3: workloads.x: is already declared at f:3"]


def test_keys_nested_beyond_reason_are_a_problem() -> None:
    for text in ("a." * 5000 + "b = 1\n", f"[{'a.' * 5000}b]\nx = 1\n"):
        root, _ = read({"f": text}, unique_in=frozenset())
        assert [problem.expected for problem in root.problems] == ["nested deeper than anything that is known here"]


def test_nearest_names_one_or_all() -> None:
    assert nearest("adresses", ["addresses", "timeout"]) == "did you mean 'addresses'?"
    assert nearest("zzz", ["b", "a"]) == "known here: a, b"
    assert nearest("zzz", []) == "known here: none"
