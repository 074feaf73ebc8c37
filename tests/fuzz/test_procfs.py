"""The parsers of /proc: any text is read or refused, and no name is believed that its parents do not vouch for."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from tokenward.attest import pods, systemd
from tokenward.attest.cgroup import parse_memberships
from tokenward.attest.procfs import parse_start_time
from tokenward.core.identity import Selector

_A, _B = "4f" * 32, "9e" * 32
_VICTIM = "ab" * 32
_POD = "2c48913c-b29f-11e7-9350-020968147796"

_parts = st.one_of(
    st.sampled_from(
        [
            *("system.slice", "user.slice", "kubepods.slice", "kubepods", "burstable", "docker", "libpod_parent", ".."),
            *("user@1000.service", "app.service", "session-1.scope", "containerd.service", "payload", "", ".", "_x"),
            *(_A, _B, f"docker-{_A}.scope", f"libpod-{_B}", f"crio-{_A}.scope", f"libpod-conmon-{_A}.scope"),
            *(f"pod{_POD}", f"kubepods-pod{_POD.replace('-', '_')}.slice", f"system.slice:docker:{_A}"),
        ]
    ),
    st.text(max_size=20),
)
_paths = st.lists(_parts, max_size=7).map(lambda parts: "/" + "/".join(parts))
_lines = st.builds(
    "{}:{}:{}".format, st.integers(0, 12), st.sampled_from(["", "name=systemd", "cpu,cpuacct", "x"]), _paths
)
_texts = st.one_of(st.text(), st.lists(_lines, max_size=5).map("\n".join))


def _read(text: str, *, private: bool) -> tuple[set[Selector], set[str]]:
    memberships = parse_memberships(text)
    unit, container = systemd.read(memberships, private=private), pods.read(memberships, private=private)
    return {*unit.selectors, *container.selectors}, {*unit.unreadable, *container.unreadable}


@given(_texts, st.booleans())
def test_any_text_is_read_or_refused(text: str, private: bool) -> None:
    try:
        selectors, unreadable = _read(text, private=private)
    except ValueError:
        return
    kinds = [selector.kind for selector in selectors]
    assert len(kinds) == len(set(kinds))  # one unit, one container, one pod
    assert not unreadable & set(kinds)
    assert all(selector.value.isprintable() and "/" not in selector.value for selector in selectors)


@given(st.lists(_parts, max_size=5), st.booleans())
def test_what_a_container_makes_below_itself_changes_nothing(below: list[str], private: bool) -> None:
    for top in (f"/docker/{_A}", f"/kubepods/burstable/pod{_POD}/{_A}", f"/system.slice/docker-{_A}.scope"):
        try:
            forged = _read(f"0::{top}/" + "/".join(below), private=private)
        except ValueError:
            continue
        assert forged == _read(f"0::{top}", private=private)


@given(st.lists(_parts | st.just(f"docker-{_VICTIM}.scope") | st.just(_VICTIM), max_size=5))
def test_what_a_user_makes_below_their_own_unit_is_never_believed(below: list[str]) -> None:
    top = "/user.slice/user-1000.slice/user@1000.service"
    try:
        selectors, _ = _read(f"0::{top}/" + "/".join(below), private=False)
    except ValueError:
        return
    assert selectors == {Selector("systemd:unit", "user@1000.service"), Selector("systemd:slice", "user-1000.slice")}


@given(
    st.binary() | st.lists(st.sampled_from([b"(", b")", b" ", b"1", b"-1", b"S", b"\n"]), max_size=60).map(b" ".join)
)
def test_any_stat_has_a_start_time_or_is_refused(stat: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert parse_start_time(stat) >= 0


@given(st.binary(max_size=15), st.integers(0, 2**63))
def test_no_name_moves_the_start_time(name: bytes, ticks: int) -> None:
    rest = b" S" + b" 1" * 18 + b" %d" % ticks + b" 1" * 30
    assert parse_start_time(b"7 (" + name + b")" + rest) == ticks
