"""Reading /proc of a process: our own, and a child that runs a copy of a program."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tokenward.attest import procfs
from tokenward.errors import AttestationError, Reason

_CAT = os.path.realpath("/bin/cat")
_SELF = os.getpid()


@contextmanager
def running(*command: str | bytes | Path) -> Iterator[int]:
    """The pid of a child that runs `command`, from when its exec has happened until the end of the block."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"!")
        child.stdin.flush()
        assert child.stdout.read(1) == b"!"
        yield child.pid
        child.stdin.close()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A copy of cat that a test may change."""
    return Path(shutil.copy(_CAT, tmp_path / "program"))


def test_the_executable_is_the_file_that_runs() -> None:
    assert procfs.executable(_SELF) == procfs.Executable.of(os.stat(os.path.realpath(sys.executable)))
    assert procfs.image(_SELF).path == os.path.realpath(sys.executable)
    assert procfs.image(_SELF).executable == procfs.executable(_SELF)
    assert procfs.image(_SELF).is_at_its_path()


def test_a_process_that_is_not_there_has_no_executable() -> None:
    pid = int(Path("/proc/sys/kernel/pid_max").read_text())
    assert procfs.executable(pid) is None
    for read in (procfs.image, procfs.cgroup_text, procfs.start_time, procfs.owner):
        with pytest.raises(AttestationError, match=f"/proc/{pid}/") as caught:
            read(pid)
        assert caught.value.reason is Reason.ATTESTATION_INCOMPLETE
        assert "hidepid" in caught.value.public


def test_a_deleted_executable_is_not_the_file_that_replaced_it(program: Path) -> None:
    with running(program) as pid:
        before = procfs.executable(pid)
        program.unlink()
        shutil.copy(_CAT, program)
        image = procfs.image(pid)
        assert image.path == f"{program} (deleted)"
        assert not image.is_at_its_path()
        assert image.executable != before  # its ctime moved with its link count


def test_a_file_that_is_called_deleted_is_never_believed(program: Path) -> None:
    named = program.rename(program.with_name("program (deleted)"))
    with running(named) as pid:
        assert not procfs.image(pid).is_at_its_path()


def test_a_path_that_is_no_text_is_shown_and_never_believed(program: Path) -> None:
    named = bytes(program.parent) + b"/\xff"
    os.rename(program, named)
    with running(named) as pid:
        assert procfs.image(pid).path.endswith("/\\xff")
        assert not procfs.image(pid).is_at_its_path()


def test_another_file_at_the_same_path_is_not_the_one_that_runs(program: Path) -> None:
    """What a mount namespace of the process's own, or of whoever gave it the file, can make it look like."""
    image = procfs.image(_SELF)
    assert not procfs.Image(image.executable, bytes(program)).is_at_its_path()
    assert not procfs.Image(image.executable, bytes(program / "below-a-file")).is_at_its_path()
    assert not procfs.Image(image.executable, bytes(program.parent / "missing")).is_at_its_path()


def test_the_hash_is_of_the_running_file_even_when_another_took_its_place(program: Path) -> None:
    expected = hashlib.sha256(program.read_bytes()).hexdigest()
    with running(program) as pid:
        program.unlink()
        program.write_bytes(b"another program")
        executable = procfs.executable(pid)
        assert executable is not None
        assert procfs.sha256(pid, executable) == expected


def test_a_hash_of_another_executable_than_expected_is_refused(program: Path) -> None:
    own = procfs.executable(_SELF)
    assert own is not None
    with running(program) as pid, pytest.raises(AttestationError, match="changed"):
        procfs.sha256(pid, own)


def test_a_file_too_large_is_not_hashed() -> None:
    own = procfs.executable(_SELF)
    assert own is not None
    with pytest.raises(AttestationError, match="too many to hash"):
        procfs.sha256(_SELF, own, max_bytes=own.size - 1)
    assert len(procfs.sha256(_SELF, own, max_bytes=own.size)) == 64


def test_a_file_rewritten_in_place_is_another_executable(program: Path) -> None:
    """Same size and times as far as its owner can set them: the kernel's ctime tells."""
    before = procfs.Executable.of(program.stat())
    content = bytearray(program.read_bytes())
    content[-1] ^= 1
    program.write_bytes(content)
    os.utime(program, ns=(before.mtime_ns, before.mtime_ns))
    after = procfs.Executable.of(program.stat())
    assert (after.ino, after.size, after.mtime_ns) == (before.ino, before.size, before.mtime_ns)
    assert after != before


def test_cgroups_and_start_time_are_read() -> None:
    assert procfs.cgroup_text(_SELF) == Path("/proc/self/cgroup").read_text()
    assert procfs.start_time(_SELF) > 0
    assert procfs.start_time(1) <= procfs.start_time(_SELF)
    assert procfs.owner(_SELF) == os.geteuid()


_FIELDS = b" S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0"


@pytest.mark.parametrize("name", [b"cat", b"a b", b")", b") S 1 (", b"\n) R 9 9 9", b""])
def test_a_process_cannot_shift_its_start_time_with_its_name(name: bytes) -> None:
    assert procfs.parse_start_time(b"7 (" + name + b")" + _FIELDS + b"\n") == 4242


@pytest.mark.parametrize("stat", [b"", b"7 (cat", b"7 (cat) S 1 1", b"7 (cat)" + _FIELDS.replace(b"4242", b"-1")])
def test_a_broken_stat_has_no_start_time(stat: bytes) -> None:
    with pytest.raises(ValueError, match="start time"):
        procfs.parse_start_time(stat)


def test_reading_leaves_no_descriptor_open(program: Path) -> None:
    own = procfs.executable(_SELF)
    assert own is not None
    before = os.listdir("/proc/self/fd")
    procfs.image(_SELF)
    procfs.sha256(_SELF, own)
    with running(program) as pid:
        pass
    for read in (lambda: procfs.sha256(pid, own), lambda: procfs.image(pid)):
        with pytest.raises(AttestationError):
            read()
    assert os.listdir("/proc/self/fd") == before
