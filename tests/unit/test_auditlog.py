"""The audit file: written before the answer, continued after a restart, and no answer without it."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.clock import FakeClock
from tokenward.auditlog import AuditLog
from tokenward.core.audit import Record, verify
from tokenward.core.secret import Secret
from tokenward.errors import AuditError, Reason


def log_at(path: Path) -> AuditLog:
    log = AuditLog(path=str(path), clock=FakeClock())
    log.open()
    return log


def append(path: Path, *events: str) -> None:
    log = log_at(path)
    for event in events:
        log.append(Record(event=event))
    log.close()


def events(path: Path) -> list[str]:
    return [json.loads(line)["record"]["event"] for line in path.read_text().splitlines()]


@contextmanager
def at_most(file_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond `file_bytes`, as on a full disk: a write is cut short or fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def test_a_record_is_in_the_file_when_append_returns(path: Path) -> None:
    log = log_at(path)
    log.append(Record(event="get"))
    assert events(path) == ["get"]
    log.close()


def test_the_file_is_for_the_agents_eyes_only(path: Path) -> None:
    append(path, "start")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_restarted_agent_continues_the_chain(path: Path) -> None:
    append(path, "start", "stop")
    append(path, "start")
    assert verify(path.read_bytes().splitlines()).seq == 3


def test_half_a_line_of_a_crash_is_cut_off_and_said_to_be(path: Path) -> None:
    append(path, "start", "get")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq": 2, "ti')
    append(path, "start")
    assert events(path) == ["start", "get", "recover", "start"]
    verify(path.read_bytes().splitlines())


def test_a_first_line_that_was_never_finished_is_cut_off_too(path: Path) -> None:
    path.touch(0o600)
    path.write_bytes(b'{"seq"')
    append(path, "start")
    assert events(path) == ["recover", "start"]


def test_on_a_full_disk_nothing_is_recorded_by_halves_and_it_recovers_by_itself(path: Path) -> None:
    log = log_at(path)
    log.append(Record(event="get"))
    size = path.stat().st_size
    with at_most(size + 40):
        for _ in range(3):
            with pytest.raises(AuditError, match="nothing is served") as caught:
                log.append(Record(event="lost"))
            assert caught.value.reason is Reason.AUDIT_UNAVAILABLE
        while_full = log.is_writable
    log.append(Record(event="get"))
    assert (while_full, log.is_writable) == (False, True)
    log.close()
    assert events(path) == ["get", "get"]
    verify(path.read_bytes().splitlines())


def test_two_agents_cannot_share_a_file(path: Path) -> None:
    log = log_at(path)
    with pytest.raises(AuditError, match="another agent"):
        log_at(path)
    log.close()


def test_a_file_of_something_else_is_not_continued(path: Path) -> None:
    path.touch(0o600)
    path.write_text("127.0.0.1 - GET /\n")
    with pytest.raises(AuditError, match="does not end in an audit line"):
        log_at(path)
    assert path.read_text() == "127.0.0.1 - GET /\n"


def test_a_file_that_others_may_write_is_refused(path: Path) -> None:
    path.touch()
    path.chmod(0o666)
    with pytest.raises(AuditError, match="nobody else may write"):
        log_at(path)


def test_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch(0o600)
    path.symlink_to(target)
    with pytest.raises(AuditError, match="cannot be opened"):
        log_at(path)
    assert target.read_bytes() == b""


def test_nothing_can_be_recorded_before_open_or_after_close(path: Path) -> None:
    log = AuditLog(path=str(path), clock=FakeClock())
    for _ in range(2):
        with pytest.raises(AuditError):
            log.append(Record(event="get"))
        assert not log.is_writable
        log.open()
        log.close()


def test_a_failed_open_leaves_no_descriptor_behind(path: Path) -> None:
    path.touch()
    path.chmod(0o666)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AuditError):
        log_at(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_fingerprints_tell_values_apart_and_agents_too(path: Path, tmp_path: Path) -> None:
    one, other = log_at(path), log_at(tmp_path / "other.jsonl")
    value = {"user": Secret("a"), "password": Secret("b")}
    assert one.fingerprint(value) == one.fingerprint(dict(reversed(value.items())))
    assert one.fingerprint(value) != one.fingerprint({"user": Secret("ab"), "password": Secret("")})
    assert one.fingerprint(value) != other.fingerprint(value)
    one.close()
    other.close()
