"""Who passes the turnstile, whose turn it is to be attested, and how many fit on a machine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.making import kv_grant
from tokenward.attest.caller import Turns
from tokenward.config import Limits
from tokenward.core.model import Policy
from tokenward.errors import Reason, TokenwardError, UnavailableError
from tokenward.serve.limits import Room, Turnstile, door_limits, memory_limit, places

ROOM = Room.of(Limits(), places=8)
MIB = 1 << 20


def turnstile(*, rate: float = 1000.0, room: Room = ROOM) -> Turnstile:
    return Turnstile(room=room, rate=rate)


def error_of(made: Turnstile, uid: int, now_mono: float = 0.0, *, stream: bool = False) -> TokenwardError:
    with pytest.raises(UnavailableError) as caught:
        made.enter(uid, now_mono, stream=stream)
    assert caught.value.reason is Reason.RATE_LIMITED
    assert caught.value.retry_after_s is not None
    return caught.value


# -- the turnstile ----------------------------------------------------------------------------------------------------


def test_two_seconds_worth_of_requests_may_come_at_once_and_then_the_rate_holds() -> None:
    made = turnstile(rate=10.0)
    for _ in range(20):
        made.enter(1, 0.0)
        made.leave(1)
    assert error_of(made, 1).retry_after_s == pytest.approx(0.1)
    made.enter(2, 0.0)
    made.enter(1, 0.1)
    error_of(made, 1, 0.1)


@pytest.mark.parametrize("stream", [False, True])
def test_one_uid_has_half_of_the_places_and_all_have_no_more_than_there_are(stream: bool) -> None:
    made = turnstile()
    for _ in range(4):
        made.enter(1, 0.0, stream=stream)
    assert "of uid 1" in error_of(made, 1, stream=stream).public
    made.enter(1, 0.0, stream=not stream)
    for uid in (2, 2, 3, 3):
        made.enter(uid, 0.0, stream=stream)
    error_of(made, 4, stream=stream)
    made.leave(1, stream=stream)
    made.enter(4, 0.0, stream=stream)
    error_of(made, 1, stream=stream)


def test_who_has_left_is_forgotten() -> None:
    made = turnstile()
    for _ in range(100):
        made.enter(1, 0.0)
        made.enter(1, 0.0, stream=True)
        made.leave(1)
        made.leave(1, stream=True)
    assert (made.requests, made.streams) == (0, 0)


def test_a_policys_rate_is_per_workload_and_credential() -> None:
    made = turnstile()
    paced, free = kv_grant("paced", policy=Policy(rate=0.5)), kv_grant("free")
    made.charge("app", [paced, free], 0.0)
    with pytest.raises(UnavailableError) as caught:
        made.charge("app", [free, paced], 0.0)
    assert caught.value.reason is Reason.RATE_LIMITED
    assert caught.value.retry_after_s == pytest.approx(2.0)
    assert "paced" in caught.value.public
    assert "30 times a minute" in caught.value.public
    made.charge("app", [free], 0.0)
    made.charge("other", [paced], 0.0)
    made.charge("app", [paced], 2.0)


def test_who_asks_for_several_pays_for_all_or_for_none() -> None:
    made = turnstile()
    first, second = (kv_grant(name, policy=Policy(rate=0.1)) for name in ("first", "second"))
    made.charge("app", [second], 0.0)
    for _ in range(5):
        with pytest.raises(UnavailableError):
            made.charge("app", [first, second], 0.0)
    made.charge("app", [first], 0.0)


# -- what is recorded -------------------------------------------------------------------------------------------------


def test_one_refusal_a_second_of_each_caller_is_recorded_and_the_next_record_has_the_number_of_the_others() -> None:
    made = turnstile()
    assert made.refused(1, "", 10.0) == ""
    assert [made.refused(1, "", 10.0 + at / 10) for at in range(9)] == [None] * 9
    assert made.refused(2, "", 10.5) == "", "another uid"
    assert made.refused(1, "", 11.0) == "9 more were refused by rate since the last record of it"
    assert made.refused(1, "app", 11.0) == "", "a workload is a caller of its own"
    assert [made.refused(1, "", 11.5), made.refused(1, "app", 11.5)] == [None, None]
    assert made.owed(2, "app") == "", "of another uid"
    assert made.owed(1, "app").startswith("2 more"), "also of those before its workload was known"
    assert made.owed(1, "app") == "", "it is said once"
    assert made.refused(1, "", 20.0) == ""


# -- turns ------------------------------------------------------------------------------------------------------------


class Attested:
    """Attestations that last until they are told to end, in the order in which they began."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, *names: str) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._attest(name))
        await settled()

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
        await settled()

    async def _attest(self, name: str) -> None:
        async with self._turns.turn(ord(name[0])):
            self.begun.append(name)
            await self._ends[name].wait()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_uid_has_half_of_the_attestations_and_another_waits_for_none_of_them() -> None:
    attested = Attested(Turns(most=4))
    await attested.begin(*(f"a{at}" for at in range(10)))
    assert attested.begun == ["a0", "a1"]
    await attested.begin("b0")
    assert attested.begun == ["a0", "a1", "b0"]
    await attested.end(*attested.tasks)
    assert attested.begun[3:] == [f"a{at}" for at in range(2, 10)], "first come, first served within a uid"


async def test_when_all_are_taken_the_uids_take_turns() -> None:
    attested = Attested(Turns(most=4))
    running = ["a0", "a1", "b0", "b1"]
    await attested.begin(*running, "c0", "c1", "c2", "d0", "d1")
    assert attested.begun == running
    for name in (*running, "c0"):
        await attested.end(name)
    assert attested.begun == [*running, "c0", "d0", "c1", "d1", "c2"]
    await attested.end("c1", "c2", "d0", "d1")


async def test_who_gives_up_waiting_leaves_its_place_in_the_queue() -> None:
    attested = Attested(Turns(most=1))
    await attested.begin("a0", "b0", "b1", "c0")
    attested.tasks["b0"].cancel()
    attested.tasks["c0"].cancel()
    await settled()
    await attested.end("a0")
    assert attested.begun == ["a0", "b1"]
    await attested.begin("c1")
    await attested.end("b1", "c1")
    assert attested.begun == ["a0", "b1", "c1"]


@pytest.mark.parametrize("called_first", [True, False])
async def test_a_turn_that_comes_as_its_owner_gives_up_is_the_next_ones(called_first: bool) -> None:
    turns = Turns(most=1)
    attested = Attested(turns)
    async with turns.turn(1):
        await attested.begin("b0", "c0")
        if not called_first:
            attested.tasks["b0"].cancel()
    if called_first:
        attested.tasks["b0"].cancel()
    await settled()
    assert attested.begun == ["c0"]
    await attested.end("c0")
    async with turns.turn(1):
        pass


async def test_who_waits_too_long_for_its_turn_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenward.attest.caller._TURN_S", 0.01)
    turns = Turns(most=1)
    async with turns.turn(1):
        with pytest.raises(UnavailableError) as caught:
            async with turns.turn(2):
                pass
        assert caught.value.reason is Reason.RATE_LIMITED
    async with turns.turn(2):
        pass


# -- what fits --------------------------------------------------------------------------------------------------------


def test_what_is_not_said_follows_from_the_number_of_connections_and_one_uid_has_half() -> None:
    room = Room.of(Limits(connections=50, streams=10, requests_per_uid=50), places=1000)
    assert (room.connections, room.connections_per_uid) == (50, 25)
    assert (room.streams, room.streams_per_uid) == (10, 5)
    assert (room.requests, room.requests_per_uid) == (50, 50)
    assert Room.of(Limits(), places=33).connections == 33
    assert Room.of(Limits(connections=1), places=33).connections_per_uid == 1


def test_places_follow_from_descriptors_and_from_memory_beyond_the_idle_agents() -> None:
    assert places(max_descriptors=1024, max_memory_bytes=None) == 192
    assert places(max_descriptors=-1, max_memory_bytes=None) == 4096
    small = places(max_descriptors=1 << 20, max_memory_bytes=96 * MIB)
    assert 100 < small < 300
    assert 64 * MIB + small * 80 * 1024 < 96 * MIB
    assert places(max_descriptors=1 << 20, max_memory_bytes=1) == 32, "and some, wherever it runs"


def test_a_low_rate_leaves_room_to_begin_a_connection_and_to_be_refused() -> None:
    assert door_limits(Limits(request_rate=0.1), ROOM).intake_bytes_per_s == 32 << 10
    assert door_limits(Limits(request_rate=1000.0), ROOM).intake_bytes_per_s == 128_000


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "104857600"}, 100),
        ("0::/a\n", {"a/memory.max": "52428800", "memory.max": "104857600"}, 50),
        ("0::/\n", {"memory.max": "104857600"}, 100),
        ("0::/../c\n", {"memory.max": "104857600"}, 100),
        ("4:memory:/a\n0::/a\n", {"memory/a/memory.limit_in_bytes": "52428800"}, 50),
    ],
    ids=["parent", "nearest", "container", "outside", "v1"],
)
def test_the_limit_of_memory_is_the_least_of_all_cgroups_above(
    tmp_path: Path, own: str, files: dict[str, str], expected: int
) -> None:
    tmp_path.joinpath("own").write_text(own)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    found = memory_limit(cgroups=str(tmp_path / "cgroup"), own=str(tmp_path / "own"))
    assert found == expected * MIB


def test_without_a_cgroup_the_machines_memory_is_the_limit(tmp_path: Path) -> None:
    found = memory_limit(cgroups=str(tmp_path), own=str(tmp_path / "none"))
    assert found is not None
    assert found > 64 * MIB
