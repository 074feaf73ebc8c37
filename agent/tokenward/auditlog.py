"""The audit file: appends records to the chain before an answer leaves.

Owns the descriptor and the state of the chain. Keeps the invariant that `append` either handed the whole line to the
kernel or raised AuditError, in which case the caller gets nothing. `core.audit` decides what a line looks like.
"""

from __future__ import annotations

import errno
import fcntl
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from hashlib import sha256

from tokenward.clock import Clock
from tokenward.core.audit import Chain, Record
from tokenward.core.secret import Secret
from tokenward.errors import AuditError

_TAIL_BYTES = 1 << 16


class AuditLog:
    """An append-only file of audit lines, mode 0600, written by one agent at a time.

    A file that is there is continued: the chain goes on from its last line. Half a line, left by a crash or a full
    disk, is cut off before the next one is written: nothing was served for it.
    """

    def __init__(self, *, path: str, clock: Clock, fingerprint_key: bytes | None = None) -> None:
        """`fingerprint_key` is that of the agent before, where its values are taken over; else a new one is made."""
        self._path = path
        self._clock = clock
        self._fd = -1
        self._chain = Chain()
        self._size = 0
        """Bytes of whole lines in the file."""
        self._whole = True
        """False while the file may hold more than that: the beginning of a line that failed."""
        self.fingerprint_key = fingerprint_key or secrets.token_bytes(32)

    def open(self) -> None:
        """Opens or makes the file. Raises AuditError when it is not ours, not writable, or another agent's."""
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise AuditError(f"the audit file {self._path} cannot be opened: {error.strerror}") from error
        try:
            self._claim()
            self._resume()
        except OSError as error:
            self.close()
            raise AuditError(f"the audit file {self._path} cannot be continued: {error.strerror}") from error
        except AuditError:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def is_writable(self) -> bool:
        """Whether the last append succeeded; the next one may still fail."""
        return self._fd >= 0 and self._whole

    def append(self, record: Record) -> None:
        """Writes `record` as the next line of the chain, to the kernel, now.

        Raises:
            AuditError: it is not written; nothing that it records may leave. The next append tries again.
        """
        if self._fd < 0:
            raise AuditError("the audit file is not open; nothing is served without a record")
        try:
            self._write(record)
        except OSError as error:
            raise AuditError(
                f"the audit file {self._path} cannot be written ({error.strerror}); nothing is served without a record"
            ) from error

    def fingerprint(self, values: Mapping[str, Secret]) -> str:
        """16 hex digits that are equal for equal values within the life of this agent, and say nothing else of them."""
        keyed = hmac.new(self.fingerprint_key, digestmod=sha256)
        for name, value in sorted(values.items()):
            for part in (name, value.reveal()):
                data = part.encode("utf-8", "surrogatepass")
                keyed.update(len(data).to_bytes(8, "big") + data)
        return keyed.hexdigest()[:16]

    def _write(self, record: Record) -> None:
        if not self._whole:
            os.ftruncate(self._fd, self._size)
            self._whole = True
        line = self._chain.line(record, self._clock.now().wall)
        data = line + b"\n"
        self._whole = False
        written = os.write(self._fd, data)
        if written != len(data):
            raise OSError(errno.ENOSPC, "only a part of the line was taken")
        self._whole = True
        self._size += written
        self._chain.advance(line)

    def _claim(self) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise AuditError(
                f"the audit file {self._path} must be a regular file of the agent's own user that nobody else may write"
            )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AuditError(f"the audit file {self._path} is in use by another agent; give each its own") from error

    def _resume(self) -> None:
        end = os.fstat(self._fd).st_size
        tail = os.pread(self._fd, _TAIL_BYTES, max(0, end - _TAIL_BYTES))
        whole, newline, torn = tail.rpartition(b"\n")
        self._size = end - len(torn)
        self._chain = Chain()
        if newline:
            try:
                self._chain = Chain.after(whole.rpartition(b"\n")[2])
            except ValueError as error:
                raise AuditError(f"the audit file {self._path} does not end in an audit line; move it away") from error
        if torn:
            self._whole = False
            self._write(Record(event="recover", detail=f"cut off {len(torn)} bytes of a line that was never finished"))
