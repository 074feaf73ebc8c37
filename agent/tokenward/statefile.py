"""The state file: what an operator revoked, and the leases whose revocation is not over. It outlives the agent.

Owns the file. It holds no secret: an accessor lets its holder revoke a token, and nothing else of use here. A state
that cannot be read is no state that can be ignored, since it says who must get nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

import msgspec

from tokenward.core.blocks import Block, Scope
from tokenward.errors import Reason, TokenwardError

_MAX_BYTES = 1 << 22


class LeftOver(msgspec.Struct, frozen=True, kw_only=True):
    """A vault token that is still to be revoked, by its accessor. `ends` is in seconds since the epoch."""

    accessor: str
    workload: str = ""
    credential: str = ""
    ends: float | None = None


class _Block(msgspec.Struct, frozen=True, kw_only=True):
    reason: str
    by: str
    since: float
    workload: str = ""
    credential: str = ""


class _State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int = 1
    blocks: tuple[_Block, ...] = ()
    left_over: tuple[LeftOver, ...] = ()


class StateFile:
    """One agent's state, in a file of its own user that nobody else may write."""

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self) -> tuple[tuple[Block, ...], tuple[LeftOver, ...]]:
        """What was saved last; nothing when there is no file. Raises TokenwardError when there is one to distrust."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return (), ()
        except OSError as error:
            raise self._unusable(f"cannot be read: {error.strerror}") from error
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise self._unusable("must be a regular file of the agent's own user that nobody else may write")
            data = os.read(fd, _MAX_BYTES)
        finally:
            os.close(fd)
        try:
            state = msgspec.json.decode(data, type=_State)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._unusable("is not a state that this release wrote") from error
        blocks = tuple(
            Block(
                scope=Scope(workload=one.workload, credential=one.credential),
                reason=one.reason,
                by=one.by,
                since=one.since,
            )
            for one in state.blocks
        )
        return blocks, state.left_over

    def save(self, blocks: Iterable[Block], left_over: Iterable[LeftOver]) -> None:
        """Replaces the file, as a whole and on disk. Raises TokenwardError when that fails: then the old one stays."""
        state = _State(
            blocks=tuple(
                _Block(
                    reason=one.reason,
                    by=one.by,
                    since=one.since,
                    workload=one.scope.workload,
                    credential=one.scope.credential,
                )
                for one in blocks
            ),
            left_over=tuple(left_over),
        )
        if state == _State() and not os.path.lexists(self._path):
            return
        beside = f"{self._path}.new"
        try:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(state)))
                file.flush()
                os.fsync(fd)
            os.replace(beside, self._path)
        except OSError as error:
            raise self._unusable(f"cannot be written: {error.strerror}") from error

    def _unusable(self, why: str) -> TokenwardError:
        text = f"the state file {self._path}, which says what operators have revoked, {why} (state.file)"
        return TokenwardError(Reason.INVALID_CONFIG, text)
