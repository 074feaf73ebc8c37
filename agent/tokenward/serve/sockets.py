"""The sockets that an agent listens on: the callers', the operators', and grpcio's own behind them.

Owns where they are and who may reach them: what the configuration says, by the rules of `listener`. Invariant: grpcio's
sockets are in a directory that only the agent can enter, and have no name once it listens.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import stat
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from tokenward.config import Listen
from tokenward.errors import ConfigError, Problem, Reason, TokenwardError
from tokenward.serve.listener import Listener, bind, from_systemd


@dataclass(frozen=True, slots=True, kw_only=True)
class Sockets:
    """What is listened on, and where grpcio listens behind it. `admin` is None where there is to be none."""

    workload: socket.socket
    admin: socket.socket | None
    inner: str
    inner_admin: str


def open_sockets(listen: Listen, closing: AsyncExitStack) -> Sockets:
    """The sockets that systemd passes in, else ones of our own. Raises TokenwardError, for an unknown user too."""
    owner, group = listen.workload_socket_owner, listen.workload_socket_group
    workload = from_systemd("workload") or _bind(
        listen.workload_socket, mode=listen.workload_socket_mode, owner=owner, group=group
    )
    closing.callback(workload.close)
    admin = from_systemd("admin")
    if admin is None and listen.admin_socket:
        admin = _bind(listen.admin_socket, mode=listen.admin_socket_mode, group=listen.admin_socket_group)
    if admin is not None:
        closing.callback(admin.close)
    directory = _inner_directory(listen.runtime_dir, closing)
    return Sockets(
        workload=workload.socket,
        admin=admin.socket if admin is not None else None,
        inner=_inner_socket(directory, "grpc.sock", closing),
        inner_admin=_inner_socket(directory, "admin.sock", closing),
    )


def _bind(path: str, *, mode: int, owner: str = "", group: str = "") -> Listener:
    try:
        uid = pwd.getpwnam(owner).pw_uid if owner else None
        gid = grp.getgrnam(group).gr_gid if group else None
    except KeyError as error:
        raise TokenwardError(Reason.INVALID_CONFIG, f"listen: there is no such user or group: {error}") from error
    return bind(path, mode=mode, owner=uid, group=gid)


def _inner_directory(directory: str, closing: AsyncExitStack) -> str:
    """The directory of grpcio's own sockets, that only the agent can enter."""
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        expected = f"{directory} must be a directory of the agent's own user with mode 0700; remove it"
        raise ConfigError((Problem(directory, 1, "listen.runtime_dir", expected),))
    closing.callback(os.rmdir, directory)
    return directory


def _inner_socket(directory: str, name: str, closing: AsyncExitStack) -> str:
    """The path of one of grpcio's own sockets."""
    path = os.path.join(directory, name)

    def remove() -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)

    remove()  # left by an agent that was killed; a live one was found when the public socket was bound
    closing.callback(remove)
    return path


def hide(path: str, closing: AsyncExitStack) -> str:
    """The socket at `path` by another way, that leads there from this process alone; the name is taken away.

    Whoever else could enter the directory (root, our own user) would otherwise be taken for the caller whose abstract
    name it observed and bound in a network namespace of its own.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    closing.callback(os.close, fd)
    os.unlink(path)
    return f"/proc/self/fd/{fd}"
