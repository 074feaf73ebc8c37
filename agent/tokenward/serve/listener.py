"""The public socket: made here under a tight umask, or passed in by systemd.

Owns the socket file from its making to its removal, and the checks on both. Leaves accepting to `front_door`.
Invariants: the file never has a looser mode than asked for; a socket on which somebody listens is never replaced, and
nothing that is not a socket is ever removed.

Two agents that start at once are kept apart by a lock file beside the socket, held only while the old socket is judged
and the new one made. The judgement ("nobody listens, so it may go") and the removal cannot be one step in the kernel:
with a rename over it, both would find the stale file, and the first to replace it would listen where no path leads. The
lock file is ours alone (0600, in a directory that nobody else can write), so nobody else can hold it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import stat
import struct
from collections.abc import Iterator

from tokenward.errors import Reason, TokenwardError

_BACKLOG = 65535
"""The kernel lowers it to somaxconn; connecting to a full one fails at once, so more is better than less."""
_FIRST_PASSED_FD = 3  # SD_LISTEN_FDS_START
_UCRED = struct.Struct("3i")


class Listener:
    """A listening Unix stream socket. `path` is where it is bound; closing removes that file if it is still ours."""

    def __init__(self, *, listening: socket.socket, path: str, made: tuple[int, int] | None) -> None:
        self.socket = listening
        self.path = path
        self._made = made
        """Device and inode of the file that we made; None where systemd did."""

    def bind(self, *, mode: int, owner: int | None, group: int | None) -> None:
        """Make the file and listen. Raises OSError; what was made then is removed by `close`."""
        before = os.umask(0o177)
        try:
            self.socket.bind(self.path)
        finally:
            os.umask(before)
        self._made = _identity(self.path)
        if owner is not None or group is not None:
            os.chown(self.path, -1 if owner is None else owner, -1 if group is None else group)
        os.chmod(self.path, mode)
        self.socket.listen(_BACKLOG)
        self.socket.settimeout(0)

    def close(self) -> None:
        """Remove the file first: while we listen, nobody takes it for stale and puts another in its place."""
        if self._made is not None and _identity(self.path) == self._made:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._made = None
        self.socket.close()


def bind(path: str, *, mode: int = 0o666, owner: int | None = None, group: int | None = None) -> Listener:
    """Listen at `path`, replacing a socket file on which nobody listens.

    `owner` and `group` are ids, unchanged where None. To be called before there are threads: the umask is of the whole
    process. Raises TokenwardError (INVALID_CONFIG) when the directory or what stands at `path` forbids it.
    """
    path = os.path.abspath(path)
    _verify_directory(os.path.dirname(path))
    listener = Listener(listening=socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path=path, made=None)
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        try:
            with _starting(path):
                _remove_stale(path)
                listener.bind(mode=mode, owner=owner, group=group)
        except OSError as error:
            raise _refusal(path, f"cannot listen here: {error.strerror or error}") from error
        undo.pop_all()
    return listener


def from_systemd(name: str | None = None) -> Listener | None:
    """The socket that systemd passed in under `name` (FileDescriptorName=), or the only one; None where it passed none.

    The variables are read and removed at the first call, so that no child takes them for its own. Each socket is handed
    out once. Raises TokenwardError (INVALID_CONFIG) when it is not a listening Unix stream socket.
    """
    passed = _passed_by_systemd()
    if name is None and len(passed) > 1:
        raise _refusal("LISTEN_FDS", f"systemd passed {len(passed)} sockets; name one of {', '.join(sorted(passed))}")
    fd = passed.pop(name if name is not None else next(iter(passed), ""), None)
    if fd is None:
        return None
    try:
        listening = socket.socket(fileno=fd)
        fits = (listening.family, listening.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        fits = fits and bool(listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise _refusal(f"descriptor {fd}", "systemd passed something that is not a socket") from error
    if not fits:
        listening.close()
        raise _refusal(f"descriptor {fd}", "systemd passed a socket that does not listen; use ListenStream=/a/path")
    listening.settimeout(0)
    return Listener(listening=listening, path=os.fsdecode(listening.getsockname()), made=None)


@functools.cache
def _passed_by_systemd() -> dict[str, int]:
    """Descriptors by name, as sd_listen_fds(3) passes them."""
    pid, count, names = (os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    fds = range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count))
    for fd in fds:
        with contextlib.suppress(OSError):  # one that is not open is refused when it is asked for
            os.set_inheritable(fd, False)  # noqa: FBT003 -- positional only
    named = names.split(":") if names else []
    named += [f"unknown-{fd}" for fd in fds[len(named) :]]
    if len(set(named)) < len(fds):
        raise _refusal("LISTEN_FDNAMES", "two sockets have the same name; give each its own FileDescriptorName=")
    return dict(zip(named, fds, strict=False))


def _verify_directory(directory: str) -> None:
    """Who can write the directory can put another socket in our place and hand out false credentials from it.

    That goes for /tmp too: its sticky bit keeps others from removing our file, not from being there before us.
    """
    try:
        found = os.lstat(directory)
    except OSError as error:
        raise _refusal(directory, f"the socket's directory cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise _refusal(directory, "the socket's directory must be a directory itself, not a link to one")
    if found.st_uid not in {0, os.geteuid()}:
        raise _refusal(directory, f"the socket's directory belongs to uid {found.st_uid}; it must be ours or root's")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refusal(directory, "others can write the socket's directory; take that away: chmod go-w")


@contextlib.contextmanager
def _starting(path: str) -> Iterator[None]:
    """Hold the lock file of `path`; it is gone again afterwards. Raises when somebody else holds it."""
    lock_path = f"{path}.lock"
    with contextlib.ExitStack() as held:
        while True:
            fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            held.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _refusal(path, "another agent is starting here at this moment") from error
            locked = os.fstat(fd)
            if _identity(lock_path) == (locked.st_dev, locked.st_ino):
                break
            # Its holder removed it between our open and our lock: this one guards nothing.
        held.callback(os.unlink, lock_path)
        yield


def _remove_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise _refusal(path, "there is something here that is not a socket; move it away or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        answer = probe.connect_ex(path)
        if answer == errno.ECONNREFUSED:
            os.unlink(path)
            return
        if answer not in {0, errno.EAGAIN}:  # EAGAIN: somebody listens, but the backlog is full
            raise _refusal(path, f"cannot tell whether somebody listens here: {os.strerror(answer)}")
        pid, _, _ = _UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    who = f"process {pid}" if pid > 0 else "a process that we cannot see"
    raise _refusal(path, f"{who} listens here already; stop it or choose another path")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _refusal(place: str, text: str) -> TokenwardError:
    return TokenwardError(Reason.INVALID_CONFIG, f"{place}: {text}")
