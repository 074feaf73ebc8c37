"""Properties of `decide`: deny in doubt, whatever the configuration."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.making import workload
from tokenward.core.identity import Selector
from tokenward.core.model import Attestation, Process, Workload
from tokenward.core.policy import Ambiguous, CouldNotTell, Matched, Unmatched, decide

_KINDS = ("unix:uid", "unix:path", "systemd:unit", "k8s:sa")
_selectors = st.frozensets(st.builds(Selector, st.sampled_from(_KINDS), st.sampled_from("ab")), max_size=4)
_unreadable = st.dictionaries(st.sampled_from(_KINDS), st.just("no"), max_size=2)


@st.composite
def _workloads(draw: st.DrawFn) -> list[Workload]:
    chosen = draw(st.lists(_selectors, max_size=4))
    return [replace(workload(f"w{number}"), selectors=selectors) for number, selectors in enumerate(chosen)]


@st.composite
def _attestations(draw: st.DrawFn) -> Attestation:
    unreadable = draw(_unreadable)
    selectors = frozenset(selector for selector in draw(_selectors) if selector.kind not in unreadable)
    return Attestation(process=Process(pid=1, uid=1, gid=1), selectors=selectors, unreadable=unreadable)


@given(_workloads(), _attestations())
def test_a_match_has_all_its_selectors_and_at_least_one(workloads: list[Workload], seen: Attestation) -> None:
    decision = decide(workloads, seen)
    if isinstance(decision, Matched):
        assert decision.workload.selectors
        assert decision.workload.selectors <= seen.selectors


@given(_workloads(), _attestations())
def test_the_order_of_workloads_never_matters(workloads: list[Workload], seen: Attestation) -> None:
    assert decide(workloads, seen) == decide(reversed(workloads), seen)


@given(_workloads(), _attestations(), _selectors)
def test_what_was_unreadable_never_turns_a_definite_answer_round(
    workloads: list[Workload], seen: Attestation, hidden: frozenset[Selector]
) -> None:
    """Whatever stood behind the unreadable types: a match stays the match, and no match stays no match."""
    decision = decide(workloads, seen)
    revealed = seen.selectors | {selector for selector in hidden if selector.kind in seen.unreadable}
    truth = decide(workloads, replace(seen, selectors=revealed, unreadable={}))
    match decision:
        case Matched() | Unmatched():
            assert truth == decision
        case Ambiguous(names):
            assert isinstance(truth, Ambiguous)
            assert set(names) <= set(truth.workloads)
        case CouldNotTell(unreadable):
            assert unreadable
            assert unreadable.keys() <= seen.unreadable.keys()


@given(_workloads(), _attestations(), _workloads())
def test_another_workload_never_gives_a_process_an_identity_that_it_had_not(
    workloads: list[Workload], seen: Attestation, more: list[Workload]
) -> None:
    before = decide(workloads, seen)
    after = decide([*workloads, *more], seen)
    if isinstance(after, Matched) and after.workload in workloads:
        assert before == after
