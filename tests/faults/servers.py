"""What tests can hurt: a vault that can be sealed, a database that can be restarted, a disk that can be filled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.proxy import UpstreamConnection
from tests.postgres import Postgres
from tokenward.core.secret import Secret
from tokenward.vault.embedded import EmbeddedVault

_SHAMIR = """\
storage "inmem" {{}}
log_level = "error"
listener "unix" {{
  address = {socket}
}}
"""


class SealableVault(EmbeddedVault):
    """A vault in memory with one unseal key, which is ours; unsealed once it is started."""

    def __init__(self, *, directory: Path) -> None:
        self.socket_path = str(directory / "bao.sock")
        self._key = ""
        super().__init__(directory=str(directory))

    def seal(self) -> None:
        self._ask("PUT", "sys/seal", {}, token=self._admin_token.reveal())

    def unseal(self) -> None:
        self._ask("POST", "sys/unseal", {"key": self._key})
        self._wait_for_status(200)

    def _config(self, seal_fd: int, token_fd: int) -> str:
        return _SHAMIR.format(socket=json.dumps(self.socket_path))

    def _wait_until_ready(self) -> None:
        self._wait_for_status(501)
        made = self._ask("POST", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self._key = str(made["keys"][0])
        self._admin_token = Secret(str(made["root_token"]))
        self.unseal()

    def _wait_for_status(self, status: int) -> None:
        give_up_mono = time.monotonic() + self._ready_timeout_s
        while self._status() != status:
            if time.monotonic() > give_up_mono:
                raise self._failed(f"never said {status}")
            time.sleep(0.01)

    def _status(self) -> int:
        with contextlib.closing(UpstreamConnection(self.socket_path)) as connection:
            try:
                connection.request("GET", "/v1/sys/health")
                return connection.getresponse().status
            except OSError:
                return 0

    def _ask(self, method: str, path: str, body: dict[str, object], *, token: str = "") -> dict[str, list[str] | str]:
        with contextlib.closing(UpstreamConnection(self.socket_path)) as connection:
            headers = {"X-Vault-Token": token} if token else {}
            connection.request(method, f"/v1/{path}", body=json.dumps(body), headers=headers)
            answer = connection.getresponse()
            said = answer.read()
        assert answer.status < 300, f"{path}: {answer.status}"
        return dict(json.loads(said)) if said else {}


class RestartablePostgres(Postgres):
    """One whose server can be ended and started again at the same port, with the same data."""

    def _start(self, programs: Path) -> None:
        self._installed = programs
        super()._start(programs)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """No server while the block runs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(10)
        try:
            yield
        finally:
            self._spawn(self._installed)
            self._wait_until_ready()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process hangs (SIGSTOP) while the block runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of `size` at `place`; skips the test where none can be mounted."""
    place.mkdir(mode=0o700)
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    options = f"size={size},mode=0700"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "faults", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small tmpfs needs CAP_SYS_ADMIN: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def full(place: Path) -> Iterator[None]:
    """The file system at `place` has no byte left while the block runs."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass
    try:
        yield
    finally:
        filler.unlink()
