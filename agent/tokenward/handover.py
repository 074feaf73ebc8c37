"""Between two lives of the agent: live credentials left with systemd, in memory and without a file.

Owns: the sealed memfd in the service manager's descriptor store, the manager's notification socket, and the question
whether we are being stopped or restarted. Leaves to `core.handover` what is in the bytes. Invariants: what `take`
returns was written in this boot, by a process of our own user, and cannot have changed since; it is never there for a
second agent, since that would bring back values which the first has replaced.

Follows sd_notify(3), sd_listen_fds(3) and systemd's file descriptor store. `docs/handover.md` is about the whole.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import stat
import subprocess
import time
from typing import Final

from tokenward.attest import systemd
from tokenward.attest.cgroup import parse_memberships

_log = logging.getLogger(__name__)

NAME: Final = "tokenward-handover"
"""What it is called in the manager's store (FDNAME=)."""
MAX_BYTES: Final = 64 << 20

_FIRST_PASSED_FD: Final = 3  # SD_LISTEN_FDS_START
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_NOEXEC_SEAL: Final = 0x8  # Linux 6.3; the os module knows it from Python 3.13 on
_SEND_S: Final = 1.0
_TAKEN_S: Final = 2.0
_ASK_S: Final = 2.0
_PATH: Final = "/usr/bin:/bin"
_UNTIL_UP_AGAIN: Final = frozenset({"restart", "try-restart", "start"})
"""Types of jobs after which the unit runs. `start` is the second half of a restart, and `start` on a stopping unit."""


# -- telling the manager ------------------------------------------------------------------------------------------


def notify(*lines: str) -> None:
    """Tells the service manager `lines` such as `READY=1`; nothing happens where there is none.

    A line break within a line becomes a space: it would begin another assignment.
    """
    try:
        with _Manager() as manager:
            manager.send(*(" ".join(line.splitlines()) for line in lines))
    except OSError as error:
        _log.warning(
            "the service manager could not be told %s: %s", lines[0].partition("=")[0], error.strerror or error
        )


def watchdog_s() -> float | None:
    """How long the manager goes without `WATCHDOG=1` before it takes us for stuck; None where it does not watch us.

    Follows sd_watchdog_enabled(3): the variables may be meant for a parent that passed its environment on.
    """
    pid, usec = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if pid not in {"", str(os.getpid())} or not (usec.isascii() and usec.isdecimal()):
        return None
    return int(usec) / 1_000_000 or None


def reloading() -> None:
    """Tells the manager that a reload begins; `notify("READY=1")` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


# -- leaving and taking -------------------------------------------------------------------------------------------


def offer(data: bytes | bytearray) -> bool:
    """Leaves `data` with the service manager for the next agent; True when it took it.

    Otherwise there is nothing that a next agent could take. Waits for the manager, a few seconds at most. A bytearray
    is wiped in either case.
    """
    try:
        if not is_managed() or len(data) > MAX_BYTES - len(_boot_id()):
            return False
        with _Manager() as manager:
            manager.send("FDSTOREREMOVE=1", f"FDNAME={NAME}")  # there must be one, and not an older one
            fd = _sealed(data)
            try:
                manager.send("FDSTORE=1", f"FDNAME={NAME}", "FDPOLL=0", fd=fd)
            finally:
                os.close(fd)
            # Without a store (FileDescriptorStoreMax=0) the manager drops the descriptor and says nothing.
            if manager.wait_until_done() and _stored() != 0:
                return True
            manager.send("FDSTOREREMOVE=1", f"FDNAME={NAME}")  # it may take it yet: too late
            _log.warning("the service manager did not take the live credentials")
    except OSError as error:
        _log.warning("the live credentials could not be left with the service manager: %s", error.strerror or error)
    finally:
        if isinstance(data, bytearray):
            wipe(data)
    return False


def take() -> bytearray | None:
    """What the agent before left with the service manager, which forgets it; None when there is nothing that is ours.

    To be called once, before `serve.listener.from_systemd`: both read LISTEN_FDS, and this takes its part out of it.
    Whoever gets the bytes wipes them.
    """
    fds = _passed()
    if not fds:
        return None
    notify("FDSTOREREMOVE=1", f"FDNAME={NAME}")
    try:
        if len(fds) > 1:  # nobody could say which one is newer
            raise ValueError("there are several")
        return _read(fds[0])
    except (OSError, ValueError) as error:
        _log.warning("what the service manager kept for us is refused: %s", error)
    finally:
        for fd in fds:
            os.close(fd)
    return None


def wipe(data: bytearray) -> None:
    """Overwrites `data`. Copies that Python made on the way there are not reached."""
    data[:] = bytes(len(data))


def is_managed() -> bool:
    """Whether a service manager listens to us."""
    return bool(_address())


def is_restart() -> bool | None:
    """Whether the stop that we are in is half of a restart; None when it cannot be told within two seconds.

    Asks the manager for the unit's job, which any user may: a restart is a job of its own type until the unit is down.
    """
    unit = _own_unit()
    listed = _systemctl("list-jobs", "--no-legend", "--plain", "--full", unit) if unit else None
    if listed is None:
        return None
    jobs = [line.split() for line in listed.splitlines()]  # JOB UNIT TYPE STATE
    return any(len(job) == 4 and job[1] == unit and job[2] in _UNTIL_UP_AGAIN for job in jobs)


# -- within: the memfd ----------------------------------------------------------------------------------------------


def _sealed(data: bytes | bytearray) -> int:
    """A memfd with `data` that nobody can change any more, not even we."""
    fd = _memfd()
    try:
        os.fchmod(fd, 0o600)
        for part in (_boot_id(), data):
            left = memoryview(part)
            while left:
                left = left[os.write(fd, left) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(NAME, flags | _MFD_NOEXEC_SEAL)
    except OSError:  # a kernel before 6.3 knows no such flag
        return os.memfd_create(NAME, flags)


def _read(fd: int) -> bytearray:
    """What was sealed in `fd`, if it was by our user and in this boot. Raises ValueError, OSError."""
    found = os.fstat(fd)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError("it is not a memfd") from error
    # A file in /dev/shm has seals to ask for as well, but can never have these, and has a name.
    if seals & _SEALS != _SEALS or not stat.S_ISREG(found.st_mode) or found.st_nlink:
        raise ValueError("it is not a sealed memfd")
    if found.st_uid != os.geteuid():
        raise ValueError(f"it is of uid {found.st_uid}, and we are {os.geteuid()}")
    boot = _boot_id()
    if not len(boot) <= found.st_size <= MAX_BYTES:
        raise ValueError(f"it has {found.st_size} bytes")
    if os.pread(fd, len(boot), 0) != boot:
        raise ValueError("it is of another boot")
    data = bytearray(found.st_size - len(boot))
    left, at = memoryview(data), len(boot)
    while left:
        count = os.preadv(fd, [left], at)
        left, at = left[count:], at + count
    return data


def _boot_id() -> bytes:
    """Names this boot: monotonic times of another one mean nothing."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read()


def _passed() -> list[int]:
    """Our descriptors among those that the manager passed; the variables then tell of the others alone."""
    count, names = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_FDNAMES", "").split(":")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count != str(len(names)) or NAME not in names:
        return []
    passed = [(_FIRST_PASSED_FD + place, name) for place, name in enumerate(names)]
    ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, passed[-1][0] + 1) for fd, name in passed if name == NAME]
    others = [(fd, name) for fd, name in passed if name != NAME]
    for place, (fd, _) in enumerate(others, _FIRST_PASSED_FD):  # their numbers have no gaps
        if fd != place:
            os.dup2(fd, place, inheritable=False)
    for fd, _ in passed[len(others) :]:
        os.close(fd)
    os.environ["LISTEN_FDS"] = str(len(others))
    os.environ["LISTEN_FDNAMES"] = ":".join(name for _, name in others)
    return ours


# -- within: the manager --------------------------------------------------------------------------------------------


class _Manager:
    """The manager's notification socket, for one `with` block; without a manager it swallows what it is told."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def __enter__(self) -> _Manager:
        address = _address()
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                self._socket.settimeout(_SEND_S)
                self._socket.connect(address)
            except BaseException:
                self._socket.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()

    def send(self, *lines: str, fd: int | None = None) -> None:
        """One message. Raises OSError, within a second also when the manager does not read."""
        if self._socket is not None:
            socket.send_fds(self._socket, ["\n".join(lines).encode()], [] if fd is None else [fd])

    def wait_until_done(self) -> bool:
        """Whether the manager dealt with all messages so far within two seconds: it then closes what it was sent."""
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self.send("BARRIER=1", fd=theirs)
            finally:
                os.close(theirs)
            waiting = select.poll()
            waiting.register(ours, 0)  # POLLHUP is reported unasked
            return bool(waiting.poll(_TAKEN_S * 1000))
        finally:
            os.close(ours)


def _address() -> str:
    """NOTIFY_SOCKET as the socket module has it, empty without one. Machines have others, services do not."""
    named = os.environ.get("NOTIFY_SOCKET", "")
    if named.startswith("@"):
        return "\0" + named[1:]
    return named if named.startswith("/") else ""


def _stored() -> int | None:
    """How many descriptors the manager keeps for us; None when it cannot be told."""
    unit = _own_unit()
    shown = _systemctl("show", "--property=NFileDescriptorStore", "--value", unit) if unit else None
    return int(shown) if shown is not None and shown.strip().isdecimal() else None


def _own_unit() -> str:
    """The unit of the system's manager that we run in, or nothing. Another manager, such as a user's, is not asked."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            found = systemd.read(parse_memberships(file.read()), private=False)
    except (OSError, ValueError):
        return ""
    units = [each.value for each in found.selectors if each.kind == "systemd:unit"]
    return units[0] if units and not units[0].startswith("user@") else ""


def _systemctl(*arguments: str) -> str | None:
    """What systemctl prints, None when it fails or takes longer than two seconds."""
    try:
        done = subprocess.run(  # noqa: S603 -- our own words and the unit's name from the kernel, without a shell
            ["systemctl", *arguments],  # noqa: S607 -- distributions disagree on where it is; the PATH is ours
            env={"PATH": _PATH, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout
