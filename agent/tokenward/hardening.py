"""What the agent does to its own process before it holds a secret, and what it refuses to start with.

Owns: the process's limits and flags (`protect`), the switches of Python and of gRPC that would show what is in memory
(`verify_switches`), and whether somebody else could change or read a file (`flaw_of`). Leaves to `config` which files
those are. Invariants: after `protect` no process of our own user can look into this one, and it leaves no core; every
refusal says what to do next. `docs/hardening.md` says what each measure is worth and what it costs.

Follows prctl(2), mlockall(2), core(5), ptrace(2) section "Ptrace access mode checking".
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from tokenward.errors import Reason, TokenwardError

_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_PTRACER = 0x59616D61
_MCL_ALL = 1 | 2 | 4
"""MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT: without the last one the stacks of all threads would become resident."""

_MAX_LINKS = 40
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Note:
    """Something to say at start, at a level of `logging`."""

    level: int
    text: str


# -- the process ------------------------------------------------------------------------------------------------------


def protect() -> tuple[Note, ...]:
    """Closes this process to others. To be called before there are threads and secrets; a second call does no harm.

    Returns what could not be had. Raises TokenwardError where the kernel lets others look into this process even so.
    """
    import ctypes  # noqa: PLC0415 -- whoever checks a configuration need not hold it in memory

    quiet_grpc()
    libc = ctypes.CDLL(None)
    libc.prctl.argtypes = [ctypes.c_int, *4 * [ctypes.c_ulong]]
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Should there be a core after all, no page of memory is in it. In a second call the file is not ours to write.
    with suppress(OSError), open("/proc/self/coredump_filter", "wb") as file:
        file.write(b"0")
    libc.prctl(_PR_SET_PTRACER, 0, 0, 0, 0)  # EINVAL where there is no Yama; what was allowed before exec ends
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0:
        text = "the kernel does not let the agent close its memory to others (PR_SET_DUMPABLE): allow it prctl(2)"
        raise TokenwardError(Reason.INTERNAL, text)
    return () if _lock_memory(libc.mlockall) else (_unlocked(),)


def quiet_grpc() -> None:
    """Keeps gRPC from printing what strangers send, line ends and all. To be called before grpc is imported."""
    os.environ["GRPC_VERBOSITY"] = "ERROR"


def _lock_memory(mlockall: Callable[[int], int]) -> bool:
    """Keeps all memory, now and later, out of swap, where no limit could make a later allocation fail.

    The kernel counts reserved addresses, not used memory: any finite limit would be reached in the middle of the work.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = hard == resource.RLIM_INFINITY
    try:
        # With a soft limit of nothing it succeeds for CAP_IPC_LOCK alone, which no limit binds.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY if unlimited else 0, hard))
        return mlockall(_MCL_ALL) == 0
    finally:
        if not unlimited:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def _unlocked() -> Note:
    remedy = "set LimitMEMLOCK=infinity in the unit, or give the container the capability IPC_LOCK"
    if _has_swap():
        return Note(logging.WARNING, f"memory is not locked, so that secrets may reach the swap: {remedy}")
    return Note(logging.INFO, f"memory is not locked, and there is no swap that it could reach; to lock it, {remedy}")


def _has_swap() -> bool:
    try:
        with open("/proc/swaps", encoding="utf-8") as file:
            return len(file.readlines()) > 1  # the first names the columns
    except OSError:
        return True


# -- switches ---------------------------------------------------------------------------------------------------------


def verify_switches(environment: Mapping[str, str] = os.environ) -> tuple[Note, ...]:
    """Returns what is worth a word. Raises TokenwardError for switches that would show what the agent has in memory.

    What has run before us cannot be judged any more: LD_PRELOAD and the like are up to who starts the agent.
    """
    found = [*_python(environment), *_code(environment), *_grpc(environment)]
    if found:
        raise TokenwardError(Reason.INVALID_CONFIG, "\n".join(["the agent does not start like this:", *found]))
    if environment.get("SSLKEYLOGFILE"):
        return (Note(logging.WARNING, "SSLKEYLOGFILE is set; the agent does not obey it, others may: unset it"),)
    return ()


def _python(environment: Mapping[str, str]) -> Iterator[str]:
    import _tracemalloc  # noqa: PLC0415 -- the half in C: the other one costs memory

    obeyed = {} if sys.flags.ignore_environment else environment
    if sys.flags.inspect or obeyed.get("PYTHONINSPECT"):
        yield "PYTHONINSPECT or -i gives a prompt inside of the agent when it ends; take it away"
    if sys.flags.dev_mode:
        yield "PYTHONDEVMODE or -X dev logs what the agent works on; take it away"
    if obeyed.get("PYTHONASYNCIODEBUG"):
        yield "PYTHONASYNCIODEBUG logs what the agent works on; unset it"
    if _tracemalloc.is_tracing():
        yield "PYTHONTRACEMALLOC or -X tracemalloc keeps a trace of every object, without a bound; take it away"


def _code(environment: Mapping[str, str]) -> Iterator[str]:
    """Whoever may write where code is loaded from is the agent."""
    obeyed = {} if sys.flags.ignore_environment else environment
    places = {name: obeyed.get(name, "").split(":") for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE")}
    places["PYTHONPYCACHEPREFIX or -X pycache_prefix"] = [sys.pycache_prefix or ""]
    for name, paths in places.items():
        for path in filter(None, paths):
            flaw = flaw_of(path)
            if flaw is not None:
                yield f"{name} has code loaded from {path}, but {flaw.place} {flaw.why}"


def _grpc(environment: Mapping[str, str]) -> Iterator[str]:
    if environment.get("GRPC_TRACE", "none").lower() not in {"", "none"}:
        yield "GRPC_TRACE prints what callers send and get; unset it"
    if environment.get("GRPC_VERBOSITY", "").lower() == "debug":
        yield "GRPC_VERBOSITY=debug prints what goes on in calls; unset it"


# -- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flaw:
    """`place` lets others do what only root and we may, and `why` says how, and what to do."""

    place: str
    why: str


def flaw_of(path: str, *, is_secret: bool = False) -> Flaw | None:
    """How somebody else than root and we could change what is at `path`, or read it if it `is_secret`; None if nobody.

    Judges every link, directory and file on the way, resolved one name at a time. A sticky directory such as /tmp may
    be on the way: others cannot take away what is there. It cannot be the last: others may add to it. What cannot be
    looked at is left to who opens it.
    """
    place, found = "/", os.lstat("/")
    try:
        for place, found in _on_the_way(path):
            flaw = _changeable(place, found)
            if flaw is not None:
                return flaw
    except FileNotFoundError:
        return _addable(place, found)
    except OSError:
        return None
    if stat.S_ISDIR(found.st_mode):
        return _addable(place, found)
    return _readable(place, found) if is_secret else None


def _on_the_way(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Everything that decides what `path` is, the thing itself last. Raises OSError."""
    names = deque(os.path.join(os.getcwd(), path).split("/"))
    at, links = "/", 0
    yield at, os.lstat(at)
    while names:
        name = names.popleft()
        place = os.path.join(at, name)
        if name in {"", "."}:
            continue
        if name == "..":
            at = os.path.dirname(at)
        elif stat.S_ISLNK((found := os.lstat(place)).st_mode):
            yield place, found
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(place)
            names.extendleft(reversed(target.split("/")))
            at = "/" if target.startswith("/") else at
        else:
            at = place
        yield at, os.lstat(at)


def _changeable(place: str, found: os.stat_result) -> Flaw | None:
    if _is_mounted_for_a_pod(place):
        return None
    if found.st_uid not in {0, os.geteuid()}:
        return Flaw(
            place,
            f"belongs to uid {found.st_uid}, who could change it; give it to root (chown root), or to the user that the"
            f" agent runs as, and run this as that user (now uid {os.geteuid()})",
        )
    is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if stat.S_ISLNK(found.st_mode) or is_sticky or not found.st_mode & _OTHERS_WRITE:
        return None
    return _writable(place, found)


def _addable(place: str, found: os.stat_result) -> Flaw | None:
    if found.st_mode & _OTHERS_WRITE and stat.S_ISDIR(found.st_mode) and not _is_mounted_for_a_pod(place):
        return _writable(place, found)
    return None


def _writable(place: str, found: os.stat_result) -> Flaw:
    return Flaw(place, f"may be written by others (mode {stat.S_IMODE(found.st_mode):04o}); take that away: chmod go-w")


def _readable(place: str, found: os.stat_result) -> Flaw | None:
    if not _is_for_others(found, stat.S_IRGRP, stat.S_IROTH):
        return None
    directory = os.path.dirname(place)
    while _is_for_others(os.lstat(directory), stat.S_IXGRP, stat.S_IXOTH):
        if directory == "/":
            mode = f"mode {stat.S_IMODE(found.st_mode):04o}"
            return Flaw(place, f"is a secret that others may read ({mode}); take that away, and replace it: chmod go-r")
        directory = os.path.dirname(directory)
    return None


def _is_for_others(found: os.stat_result, group_may: int, others_may: int) -> bool:
    """A group of ours is not others, nor is root's: access lists, as on systemd's credentials, show as its rights."""
    is_ours = found.st_gid in {0, os.getegid(), *os.getgroups()}
    return bool(found.st_mode & others_may or (found.st_mode & group_may and not is_ours))


def _is_mounted_for_a_pod(place: str) -> bool:
    """The kubelet's volumes have mode 0777, and are read-only for every container.

    Elsewhere that says nothing: for a unit with ProtectSystem=strict all is read-only, and for nobody else.
    """
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and bool(os.statvfs(place).f_flag & os.ST_RDONLY)
