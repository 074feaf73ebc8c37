"""What one user can send the agent in bulk, and what it does to the agent and to the others.

A stranger's floods and a workload's own: neither may get another's secret, cost the bystander an answer, or leave
anything behind. TOKENWARD_ATTACKS=full makes them longer and wider.
"""

from __future__ import annotations

import grpc
import pytest

from tests.attacks.rig import FULL, LOUD, SECONDS, Child, Meter, descriptors, resident_mib
from tokenward.v1 import admin_pb2, admin_pb2_grpc

_ROTATIONS = 1000 if FULL else 200
_MOST_MIB = 256.0
"""More than the agent may be brought to take by any one of these, in all."""
_LOUDEST = ("hpack_bomb", "rapid_reset", "continuations", "message_bomb", "garbage_frames")


@pytest.mark.parametrize(
    "name",
    [
        "huge_headers",
        "hpack_bomb",
        "continuations",
        "continuations_with_fields",
        "rapid_reset",
        "made_you_reset",
        "wide",
        "settings_flood",
        "ping_flood",
        "priority_flood",
        "empty_data",
        "window_updates",
        "message_bomb",
        "giant_message",
        "half_a_frame",
        "garbage",
        "garbage_frames",
        "whole_openings",
        "slowly",
    ],
)
def test_a_stranger_floods_and_gets_nothing(meter: Meter, name: str) -> None:
    cost = meter.flood(name)
    assert cost.tally["sent"] > 0
    assert cost.peak_mib < _MOST_MIB


@pytest.mark.parametrize("name", ["zero_window", "never_reading", "wide", "watchers"])
def test_a_workload_floods_with_what_it_may_ask_for(meter: Meter, name: str) -> None:
    cost = meter.flood(name, LOUD)
    assert cost.tally["sent"] > 0
    assert cost.peak_mib < _MOST_MIB


def test_watchers_that_never_read_hold_up_nobody_while_there_is_one_version_after_the_other(meter: Meter) -> None:
    with (
        meter.attacked("deaf_watcher") as cost,
        Child("tests.attacks.attacker", "deaf_watcher", LOUD, meter.target.socket, 1.0, 0) as attacker,
        grpc.insecure_channel(f"unix:{meter.target.admin_socket}") as channel,
    ):
        assert attacker.line() == "begun"
        attacker.told()  # they watch, and hold on
        operate = admin_pb2_grpc.AdminServiceStub(channel)
        for _ in range(_ROTATIONS):
            operate.Rotate(admin_pb2.RotateRequest(workload="loud", credential="token", reason="test"))
        cost.tally = {"rotations": _ROTATIONS}
        cost.descriptors = (0, descriptors(meter.agent.pid), 0)
    assert cost.peak_mib < _MOST_MIB


def test_after_many_attacks_memory_and_descriptors_are_what_they_were(meter: Meter) -> None:
    """The loudest, round after round: what the first rounds made the allocator take is not taken again."""
    rounds = 10 if FULL else 3
    seconds = SECONDS / 5
    after = []
    for number in range(rounds):
        for name in _LOUDEST:
            meter.flood(name, seconds=seconds)
        after.append((resident_mib(meter.agent.pid), descriptors(meter.agent.pid)))
        print(f"round {number + 1}: {after[-1][0]:.1f} MiB, {after[-1][1]} descriptors")
    assert after[-1][0] <= after[0][0] * 1.1
    assert after[-1][1] <= after[0][1] * 1.1
