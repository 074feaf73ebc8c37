"""Which socket the agent is at, and why it could not be reached there.

Owns the order in which a socket is chosen, and the texts for a socket that does not answer. Invariant: a socket in a
directory that somebody else can write is never chosen by default, so nobody can pose as the agent there.
"""

from __future__ import annotations

import os
import socket
import stat

from tokenward.errors import InvalidRequestError, Reason, UnavailableError

VARIABLE = "TOKENWARD_SOCKET"
SYSTEM_SOCKET = "/run/tokenward/workload.sock"
_LONGEST_PATH = 107  # sun_path of sockaddr_un has 108 bytes, the last is NUL


def socket_path(explicit: str | None = None) -> str:
    """The path of the agent's workload socket.

    It is `explicit`, else `TOKENWARD_SOCKET`, each a path or `unix:PATH`; else the system agent's, else that of this
    user's `tokenward dev`. Raises InvalidRequestError.
    """
    if explicit is not None:
        return _parse(explicit, "the socket")
    named = os.environ.get(VARIABLE)
    if named:
        return _parse(named, VARIABLE)
    if os.path.exists(SYSTEM_SOCKET):
        return SYSTEM_SOCKET
    dev = f"/tmp/tokenward-dev-{os.getuid()}"  # noqa: S108 -- trusted only when it is ours alone, checked next
    if is_private(dev) and os.path.exists(f"{dev}/workload.sock"):
        return f"{dev}/workload.sock"
    return SYSTEM_SOCKET


def is_private(directory: str) -> bool:
    """Whether `directory` is a real directory of this user that nobody else can write to."""
    try:
        found = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _parse(text: str, source: str) -> str:
    path = text.removeprefix("unix:")
    if not path or "\0" in path or "://" in path:
        raise InvalidRequestError(f"{source} must be the path of a Unix socket, such as {SYSTEM_SOCKET}, not {text!r}")
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise InvalidRequestError(
            f"{source} is longer than the {_LONGEST_PATH} bytes that a Unix socket's path may have"
        )
    return path


def unreachable(path: str) -> UnavailableError | None:
    """Why nobody can be talked to at `path`, found by trying; None when somebody answers there."""
    attempt = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        attempt.connect(path)
    except OSError as refused:
        return UnavailableError(Reason.AGENT_UNREACHABLE, _advice(path, refused))
    finally:
        attempt.close()
    return None


def _advice(path: str, refused: OSError) -> str:
    match refused:
        case FileNotFoundError() | NotADirectoryError():
            return (
                f"there is no socket at {path}: start the agent (`tokenward run --config FILE`, or `tokenward dev` "
                f"to try it), or name its socket in {VARIABLE}"
            )
        case PermissionError():
            return (
                f"uid {os.geteuid()} may not open the socket {path}: have this user added to the socket's group, "
                "or the mode of the socket or of its directory changed"
            )
        case ConnectionRefusedError() if not _is_socket(path):
            return f"{path} is not a socket: name the agent's socket in {VARIABLE}"
        case ConnectionRefusedError():
            return f"nobody listens at {path}: the agent has stopped; start it again"
        case BlockingIOError():
            return f"the agent at {path} does not accept connections: it is overloaded or stuck; its log may say why"
        case _:
            return f"the socket {path} cannot be used: {refused.strerror}"


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
