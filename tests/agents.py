"""Agents as processes of their own, the way users run them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

TOKENWARD = str(Path(sys.executable).parent / "tokenward")
_READY_S = 30.0
_STOP_S = 15.0


class Process:
    """A `tokenward` command that runs until the block ends; its log is in `log`."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._arguments = arguments
        self._environment = environment
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 -- closed in __exit__
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """What it has said on stderr so far."""
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [TOKENWARD, *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,  # or select() would not see lines that were read ahead
            env={**os.environ, **(self._environment or {})},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._log.close()

    def line(self) -> str:
        """The next line of stdout, waited for."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _READY_S)
        text = self._process.stdout.readline().decode() if ready else ""
        assert text, f"no line from {self._arguments}: {self.log()}"
        return text

    def wait_for_log(self, text: str) -> None:
        """Returns when `text` is in the log."""
        give_up = time.monotonic() + _READY_S
        while text not in self.log():
            assert self._process is not None
            assert self._process.poll() is None, f"it ended: {self.log()}"
            assert time.monotonic() < give_up, f"no {text!r} in: {self.log()}"
            select.select([], [], [], 0.02)

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ends it with a signal; returns its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()


class DevAgent(Process):
    """`tokenward dev --json`, ready. `directory` is made and removed by it."""

    def __init__(self, directory: Path, *options: str) -> None:
        super().__init__("dev", "--json", "--dir", str(directory), *options)
        self.workload_socket = ""
        self.config = ""
        self.vault_socket = ""

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            ready = json.loads(self.line())
        except BaseException:
            self.stop()
            raise
        self.workload_socket = ready["workload_socket"]
        self.config = ready["config"]
        self.vault_socket = ready["vault_socket"]
        return self


_AS_USER = """
import os, sys
# All that is imported late: the interpreter's files may be in root's home.
import grpc._channel, grpc._observability, tokenward.cli, tokenward.client.sync
uid = int(sys.argv.pop(1))
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
tokenward.cli.main()
"""


def tokenward(
    socket: str, *arguments: str, uid: int | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one `tokenward` command to its end, as another user where `uid` is given (needs root)."""
    command = [TOKENWARD] if uid is None else [sys.executable, "-c", _AS_USER, str(uid)]
    return subprocess.run(
        [*command, *(["--socket", socket] if socket else []), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environment or {})},
    )
