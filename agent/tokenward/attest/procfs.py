"""What /proc says of one process: which executable it runs, its cgroups, when it started.

Owns the reading and the words for what could not be read. Leaves to `peer` whether the pid still means the same
process, and to `systemd` and `pods` what cgroup names mean. Nothing is opened by a path that the process named: the
executable is read through /proc/<pid>/exe, and its path is believed only if the agent finds the same file there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from dataclasses import dataclass

from tokenward.errors import AttestationError, Reason

MAX_EXECUTABLE_BYTES = 512 << 20
_CHUNK_BYTES = 256 << 10
_MAX_TEXT_BYTES = 64 << 10
_DELETED = b" (deleted)"
_INITIAL_CGROUP_NAMESPACE = "cgroup:[4026531835]"  # PROC_CGROUP_INIT_INO

_TIMESTAMP_STEP_S = 0.02
"""Longer than the step of a file system's timestamps, which is the timer tick: 10 ms at most."""


@dataclass(frozen=True, slots=True)
class Executable:
    """Which file runs, and in which state: equal only while neither the file nor its content was replaced.

    The kernel alone sets ctime, so a file that was rewritten in place cannot pass for what it was.
    """

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Executable:
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Image:
    """The executable of a process and the path that the kernel gives for it, taken together from one open file."""

    executable: Executable
    raw_path: bytes

    @property
    def path(self) -> str:
        """For the record; ends in ` (deleted)` when the file was unlinked."""
        return self.raw_path.decode("utf-8", "backslashreplace")

    def is_at_its_path(self) -> bool:
        """Whether the file at that path, as the agent sees the file system, is this one.

        A path alone proves nothing: whoever can make a mount namespace can show any file under any name, and a
        replaced file leaves its name to the new one.

        Raises:
            AttestationError: the agent may not look there.
        """
        if self.raw_path.endswith(_DELETED) or self.path.encode() != self.raw_path:
            return False
        try:
            found = os.stat(self.raw_path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise AttestationError(
                Reason.ATTESTATION_INCOMPLETE,
                f"{self.path}: the agent cannot see whether this is the file that runs: {error.strerror}",
            ) from error
        return (found.st_dev, found.st_ino) == (self.executable.dev, self.executable.ino)


def executable(pid: int) -> Executable | None:
    """Which executable `pid` runs; None when that cannot be read. One system call: asked on every request."""
    try:
        return Executable.of(os.stat(f"/proc/{pid}/exe"))
    except OSError:
        return None


def image(pid: int) -> Image:
    """The executable of `pid` with its path. Raises AttestationError."""
    try:
        fd = os.open(f"/proc/{pid}/exe", os.O_PATH | os.O_CLOEXEC)
        try:
            return Image(Executable.of(os.fstat(fd)), os.readlink(f"/proc/self/fd/{fd}".encode()))
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(pid, "exe", error) from error


def sha256(pid: int, expected: Executable, *, max_bytes: int = MAX_EXECUTABLE_BYTES) -> str:
    """The hash of the executable that `pid` runs, in hex. Blocks while it reads.

    Raises:
        AttestationError: it cannot be read, has more than `max_bytes`, or is not (or no longer) `expected`.
    """
    if expected.size > max_bytes:
        raise AttestationError(
            Reason.ATTESTATION_INCOMPLETE,
            f"/proc/{pid}/exe: {expected.size} bytes are too many to hash, {max_bytes} are allowed",
        )
    if abs(time.time() - expected.ctime_ns / 1e9) < _TIMESTAMP_STEP_S:
        # A change within the timestamp's step would not show, and the hash is kept: wait until it would.
        time.sleep(_TIMESTAMP_STEP_S)
    try:
        fd = os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)
        try:
            digest = _digest(fd, expected.size)
            same = Executable.of(os.fstat(fd)) == expected
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(pid, "exe", error) from error
    if not same:
        raise AttestationError(
            Reason.ATTESTATION_INCOMPLETE, f"/proc/{pid}/exe: the executable changed while it was read; try again"
        )
    return digest


def _digest(fd: int, size: int) -> str:
    """Reads `size` bytes at most: a file system in user space may never end a file."""
    digest = hashlib.sha256()
    left = size
    while left > 0 and (chunk := os.read(fd, min(_CHUNK_BYTES, left))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def cgroup_text(pid: int) -> str:
    """/proc/<pid>/cgroup as text. Raises AttestationError."""
    return _read(pid, "cgroup").decode("utf-8", "backslashreplace")


def start_time(pid: int) -> int:
    """When `pid` started, in clock ticks since boot. Raises AttestationError."""
    try:
        return parse_start_time(_read(pid, "stat"))
    except ValueError as error:
        raise AttestationError(Reason.ATTESTATION_INCOMPLETE, f"/proc/{pid}/stat: {error}") from error


def parse_start_time(stat: bytes) -> int:
    """Field 22 of /proc/<pid>/stat. Raises ValueError.

    Counted from the last parenthesis: field 2 is a name that the process chooses, spaces and parentheses included.
    """
    fields = stat.rpartition(b")")[2].split()
    if len(fields) < 20 or not fields[19].isdigit():
        raise ValueError("no start time where one belongs")
    return int(fields[19])


def owner(pid: int) -> int:
    """The effective uid of `pid`. Raises AttestationError."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError as error:
        raise _unreadable(pid, "", error) from error


def is_in_private_cgroup_namespace() -> bool:
    """Whether the agent sees cgroup paths relative to its own container instead of the host's root."""
    try:
        return os.readlink("/proc/self/ns/cgroup") != _INITIAL_CGROUP_NAMESPACE
    except OSError:  # a kernel without cgroup namespaces
        return False


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            content = bytearray()
            while chunk := file.read(_CHUNK_BYTES):
                content += chunk
                if len(content) > _MAX_TEXT_BYTES:
                    raise AttestationError(
                        Reason.ATTESTATION_INCOMPLETE, f"/proc/{pid}/{name}: longer than {_MAX_TEXT_BYTES} bytes"
                    )
            return bytes(content)
    except OSError as error:
        raise _unreadable(pid, name, error) from error


def _unreadable(pid: int, name: str, error: OSError) -> AttestationError:
    match error.errno:
        case errno.EACCES | errno.EPERM:
            cause = "permission denied; the agent needs CAP_SYS_PTRACE"
        case errno.ENOENT | errno.ESRCH:
            cause = "not there; if the process lives, /proc is mounted with hidepid and the agent needs CAP_SYS_PTRACE"
        case _:
            cause = error.strerror or str(error)
    return AttestationError(Reason.ATTESTATION_INCOMPLETE, f"/proc/{pid}/{name}: {cause}")
