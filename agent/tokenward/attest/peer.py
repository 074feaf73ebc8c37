"""The process at the other end of a Unix socket, as the kernel described it when it connected.

Owns the pidfd that follows that process, from `peer_of` until `Peer.close`. Leaves to `attestor` what the process is.
The invariant: a `Peer` stands for one process. Its pid may be given to another one later, so whatever is read under
/proc/<pid> counts only if `is_alive()` still holds after the reading.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

from tokenward.attest import procfs
from tokenward.errors import AttestationError, DeniedError, Reason

_SO_PEERSEC = 31
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77  # Linux 6.5

_PYTHONS_LARGEST_OPTION = 1024
_MAX_GROUPS = 65536  # NGROUPS_MAX
_UNMAPPED = frozenset({65534, 0xFFFFFFFF})
"""What the kernel says for an id that has no mapping into our user namespace, and for no id at all."""

_REAPED = frozenset({errno.ESRCH, errno.EINVAL, errno.ENODATA})
"""How kernels before 6.16 refuse a pidfd of a peer that is no more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Peer:
    """One connected process. `close` it when its connection ends."""

    pid: int
    """0 when the process lives in a pid namespace that we cannot see: then nothing of it is in our /proc."""
    uid: int
    gid: int
    groups: tuple[int, ...]
    """Supplementary groups."""
    label: str
    """Security label (SO_PEERSEC); empty when the kernel gives none."""
    pidfd: int
    """Readable once the process has exited; -1 after `close`."""
    start_time: int | None = None
    """Clock ticks since boot, where the pidfd was opened by pid and so needs a second witness."""

    def is_alive(self) -> bool:
        """Whether the process that connected still runs. A zombie does not."""
        if self.pidfd < 0:
            return False
        exited = select.poll()
        exited.register(self.pidfd, select.POLLIN)
        if exited.poll(0):
            return False
        return self.start_time is None or _started(self.pid) == self.start_time

    def close(self) -> None:
        """Lets go of the process. Harmless when repeated."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            object.__setattr__(self, "pidfd", -1)  # frozen for everyone else: a closed number may be reused


def credentials_of(sock: socket.socket) -> tuple[int, int, int]:
    """Pid, uid and gid of whoever connected `sock` (SO_PEERCRED, unix(7)). Raises OSError."""
    pid, uid, gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def gone() -> DeniedError:
    """The answer to a connection whose process ended."""
    return DeniedError(Reason.PEER_GONE, "the process that opened this connection has ended; connect again")


def peer_of(sock: socket.socket, *, ask_peerpidfd: bool = True) -> Peer:
    """The process that connected `sock`. `ask_peerpidfd=False` goes the way of kernels before 6.5.

    Raises:
        DeniedError: it has ended (PEER_GONE), or its ids mean nothing in our user namespace (UNKNOWN_PEER).
        AttestationError: the kernel did not tell.
    """
    try:
        pid, uid, gid = credentials_of(sock)
        if uid in _UNMAPPED or gid in _UNMAPPED:
            raise DeniedError(
                Reason.UNKNOWN_PEER,
                "the calling process has no uid or gid where the agent runs; run both in one user namespace",
            )
        pid = max(pid, 0)
        groups = _groups(sock)
        label = _label(sock)
    except OSError as error:
        raise AttestationError(
            Reason.ATTESTATION_INCOMPLETE, f"the kernel did not tell who connected: {error}"
        ) from error
    pidfd, start_time = _pidfd(sock, pid, uid, ask_peerpidfd=ask_peerpidfd)
    peer = Peer(pid=pid, uid=uid, gid=gid, groups=groups, label=label, pidfd=pidfd, start_time=start_time)
    if not peer.is_alive():
        peer.close()
        raise gone()
    return peer


def _pidfd(sock: socket.socket, pid: int, uid: int, *, ask_peerpidfd: bool) -> tuple[int, int | None]:
    if ask_peerpidfd:
        try:
            return struct.unpack("=i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0], None
        except OSError as error:
            if error.errno in _REAPED:
                raise gone() from error
            if error.errno != errno.ENOPROTOOPT:
                raise AttestationError(
                    Reason.ATTESTATION_INCOMPLETE, f"the calling process cannot be followed: {error.strerror}"
                ) from error
    return pidfd_of_pid(pid, uid)


def pidfd_of_pid(pid: int, uid: int) -> tuple[int, int]:
    """A pidfd for `pid`, and its start time, where the kernel cannot give the peer's own (before Linux 6.5).

    The pid may have been given to another process since it connected. One of another uid is refused. One of the same
    uid that took the pid over before we accepted cannot be told apart.

    Raises:
        DeniedError: no such process, or not one of `uid` (PEER_GONE).
        AttestationError: the process cannot be followed.
    """
    if pid <= 0:
        raise AttestationError(
            Reason.ATTESTATION_INCOMPLETE,
            "the calling process is in another pid namespace, where only Linux 6.5 or newer can follow it",
        )
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise gone() from error
    except OSError as error:
        raise AttestationError(
            Reason.ATTESTATION_INCOMPLETE, f"the calling process cannot be followed: {error.strerror}"
        ) from error
    try:
        start_time = procfs.start_time(pid)
        if procfs.owner(pid) != uid:
            raise gone()
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd, start_time


def _started(pid: int) -> int | None:
    try:
        return procfs.start_time(pid)
    except AttestationError:
        return None


def _groups(sock: socket.socket) -> tuple[int, ...]:
    """Supplementary groups (SO_PEERGROUPS) that have a meaning in our user namespace."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _PYTHONS_LARGEST_OPTION)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        raw = _many_groups(sock)
    return tuple(gid for (gid,) in struct.iter_unpack("=I", raw) if gid not in _UNMAPPED)


def _many_groups(sock: socket.socket) -> bytes:
    """As getsockopt, which Python limits to 1024 bytes: 256 groups, fewer than directory services hand out."""
    raw = ctypes.create_string_buffer(4 * _MAX_GROUPS)
    size = ctypes.c_uint32(len(raw))
    getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt
    if getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, raw, ctypes.byref(size)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return raw.raw[: size.value]


def _label(sock: socket.socket) -> str:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERSEC, _PYTHONS_LARGEST_OPTION)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:  # no security module that labels sockets
            return ""
        raise
    label = raw.rstrip(b"\0").decode("utf-8", "replace")
    return label if label.isprintable() else ""
