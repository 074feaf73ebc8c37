"""Which workload a process is, and which grant it may use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.making import kv_grant, workload
from tokenward.core.identity import Selector
from tokenward.core.model import Attestation, JwtGrant, Process
from tokenward.core.policy import Ambiguous, CouldNotTell, Matched, Unmatched, audience_of, decide, granted

_PROCESS = Process(pid=1, uid=1000, gid=1000)


def seen(*selectors: str, **unreadable: str) -> Attestation:
    return Attestation(
        process=_PROCESS,
        selectors=frozenset(map(Selector.parse, selectors)),
        unreadable={kind.replace("_", ":"): cause for kind, cause in unreadable.items()},
    )


# -- which workload -------------------------------------------------------------------------------------------------


def test_a_workload_matches_when_all_its_selectors_were_seen() -> None:
    app = workload("app", "unix:uid:1", "unix:gid:2")
    assert decide([app], seen("unix:uid:1", "unix:gid:2", "unix:gid:3")) == Matched(app)


@pytest.mark.parametrize("selectors", [(), ("unix:uid:1",), ("unix:gid:2",), ("unix:uid:2", "unix:gid:2")])
def test_one_selector_short_is_no_match(selectors: tuple[str, ...]) -> None:
    assert decide([workload("app", "unix:uid:1", "unix:gid:2")], seen(*selectors)) == Unmatched()


def test_without_workloads_nobody_matches() -> None:
    assert decide([], seen("unix:uid:1")) == Unmatched()


def test_a_workload_without_selectors_matches_nobody() -> None:
    empty = replace(workload("app"), selectors=frozenset())
    assert decide([empty], seen("unix:uid:1", unix_path="EACCES")) == Unmatched()


def test_two_matches_are_no_identity_and_both_are_named_in_order() -> None:
    workloads = [workload("b", "unix:uid:1"), workload("a", "unix:gid:2"), workload("c", "unix:uid:9")]
    assert decide(workloads, seen("unix:uid:1", "unix:gid:2")) == Ambiguous(("a", "b"))


def test_what_could_not_be_read_is_told_with_its_cause() -> None:
    app = workload("app", "unix:uid:1", "unix:path:/bin/app")
    assert decide([app], seen("unix:uid:1", unix_path="EACCES")) == CouldNotTell({"unix:path": "EACCES"})


def test_what_could_not_be_read_does_not_matter_to_a_workload_that_fails_anyway() -> None:
    app = workload("app", "unix:uid:1", "unix:path:/bin/app")
    assert decide([app], seen("unix:uid:2", unix_path="EACCES")) == Unmatched()


def test_a_match_does_not_count_while_another_workload_might_match_too() -> None:
    workloads = [workload("a", "unix:uid:1"), workload("b", "unix:path:/bin/b")]
    assert decide(workloads, seen("unix:uid:1", unix_path="EACCES")) == CouldNotTell({"unix:path": "EACCES"})


def test_two_matches_are_told_even_while_a_third_is_in_doubt() -> None:
    workloads = [workload("a", "unix:uid:1"), workload("b", "unix:uid:1"), workload("c", "unix:path:/bin/c")]
    assert decide(workloads, seen("unix:uid:1", unix_path="EACCES")) == Ambiguous(("a", "b"))


def test_a_selector_that_was_seen_counts_although_its_type_was_not_readable_elsewhere() -> None:
    app = workload("app", "k8s:pod-uid:u")
    assert decide([app], seen("k8s:pod-uid:u", **{"k8s_pod-uid": "hidden"})) == Matched(app)


# -- which grant ----------------------------------------------------------------------------------------------------

_ONE = JwtGrant(name="one", audiences=("https://a.example",))
_TWO = JwtGrant(name="two", audiences=("https://a.example", "https://b.example"))
_APP = workload("app", grants={"api": kv_grant("api"), "one": _ONE, "two": _TWO})


@pytest.mark.parametrize(
    ("credential", "audience", "expected"),
    [
        ("api", "", _APP.grants["api"]),
        ("api", "https://a.example", None),
        ("one", "", _ONE),
        ("one", "https://a.example", _ONE),
        ("one", "https://b.example", None),
        ("two", "", None),
        ("two", "https://b.example", _TWO),
        ("none", "", None),
        ("", "", None),
    ],
)
def test_a_grant_is_used_by_its_name_and_for_its_audiences_only(
    credential: str, audience: str, expected: JwtGrant | None
) -> None:
    assert granted(_APP, credential, audience) == expected


def test_the_only_audience_need_not_be_named() -> None:
    assert audience_of(_ONE, "") == "https://a.example"
    assert audience_of(_ONE, "https://b.example") == "https://b.example"
    assert audience_of(_TWO, "") == ""
    assert audience_of(_APP.grants["api"], "") == ""
