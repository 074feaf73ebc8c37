"""The lines of /proc/<pid>/cgroup: the kernel's form and nothing else."""

from __future__ import annotations

import pytest

from tokenward.attest import pods, systemd
from tokenward.attest.cgroup import Membership, parse_memberships
from tokenward.core.identity import Selector

_ID = "4f" * 32


def test_version_two_and_the_root_of_version_one() -> None:
    assert parse_memberships("4:cpu,cpuacct:/\n0::/a.slice/b:c.service\n") == (
        Membership(frozenset({"cpu", "cpuacct"}), ()),
        Membership(frozenset(), ("a.slice", "b:c.service")),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "0::",
        "0:/a",
        "x::/a",
        "\u00b2::/a",
        "0::a",
        "0::/a//b",
        "0::/a/",
        "0::/a/../b",
        "0::/./a",
        "0::/a\n\n0::/a\n",
        "0::/system.slice/gone.service (deleted)\n",
    ],
)
def test_what_the_kernel_would_not_write_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"form|path|removed"):
        parse_memberships(text)


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\r", "\x1c", "\x85", "\u2028"])
def test_a_cgroup_name_cannot_start_a_line_of_its_own(separator: str) -> None:
    """A user may put anything but a newline into the name of a delegated cgroup."""
    text = f"0::/user.slice/user@1000.service/x{separator}1:name=systemd:/system.slice/victim.service\n"
    memberships = parse_memberships(text)
    assert len(memberships) == 1
    assert systemd.read(memberships, private=False).selectors == {
        Selector("systemd:unit", "user@1000.service"),
        Selector("systemd:slice", "user.slice"),
    }


def test_systemds_escape_is_taken_off_its_own_names() -> None:
    memberships = parse_memberships("0::/system.slice/_cpu.service\n")
    assert Selector("systemd:unit", "cpu.service") in systemd.read(memberships, private=False).selectors


def test_units_that_contradict_each_other_are_no_unit() -> None:
    memberships = parse_memberships("1:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n")
    reading = systemd.read(memberships, private=False)
    assert not reading.selectors
    assert reading.unreadable.keys() == systemd.KINDS


def test_controllers_other_than_systemds_say_nothing_of_the_unit() -> None:
    memberships = parse_memberships("4:memory:/system.slice/a.service\n1:name=other:/system.slice/b.service\n")
    assert systemd.read(memberships, private=False).selectors == frozenset()


def test_a_process_between_slices_has_a_slice_and_no_unit() -> None:
    memberships = parse_memberships("0::/a.slice/a-b.slice/loose\n")
    assert systemd.read(memberships, private=False).selectors == {Selector("systemd:slice", "a-b.slice")}


@pytest.mark.parametrize("part", [_ID[:-1], _ID + "0", _ID.upper(), f"docker-{_ID}.service", f"xdocker-{_ID}.scope"])
def test_only_an_exact_spelling_is_a_container(part: str) -> None:
    memberships = parse_memberships(f"0::/system.slice/{part}\n")
    assert not pods.read(memberships, private=False).selectors


@pytest.mark.parametrize("spelling", ["pod{}", "kubepods-pod{}.slice"])
def test_a_pod_within_a_pod_is_not_believed(spelling: str) -> None:
    first, second = spelling.format("1" * 32), spelling.format("2" * 32)
    reading = pods.read(parse_memberships(f"0::/kubepods/{first}/{second}/{_ID}\n"), private=False)
    assert not reading.selectors
    assert "another cgroup" not in reading.unreadable["container:id"]


def test_an_unprintable_owner_is_not_repeated() -> None:
    reading = pods.read(parse_memberships(f"0::/x\x1b[31m/{_ID}\n"), private=False)
    assert "another cgroup" in reading.unreadable["container:id"]
