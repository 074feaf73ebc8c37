"""The audit chain: what a record holds, how it becomes a line, and how a file of lines is verified. Pure.

Each line is one JSON object that ends with `prev`, the SHA-256 of the bytes of the line before it (without the
newline). A line that was changed, removed or put elsewhere breaks the chain at the line after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import sha256
from typing import Self

import msgspec

from tokenward.core.model import Process

GENESIS = "0" * 64
"""`prev` of the first line of a chain."""


class Peer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The calling process, as the kernel described it."""

    pid: int
    uid: int
    gid: int
    path: str = ""
    sha256: str = ""

    @classmethod
    def of(cls, process: Process) -> Self:
        return cls(process.pid, process.uid, process.gid, process.path, process.sha256)


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One event. No field ever holds a secret; `fingerprint` is a keyed hash."""

    event: str
    """get, watch, list, identity, acknowledge, reject; exchange, issue, renew, validate, revoke; block, unblock,
    rotate; start, reload, handover, stop, recover."""
    outcome: str = "ok"
    """`ok`, or the reason of the error."""
    workload: str = ""
    spiffe_id: str = ""
    peer: Peer | None = None
    credential: str = ""
    audience: str = ""
    version: int = 0
    fingerprint: str = ""
    stale: bool = False
    method: str = ""
    """How the workload was proved to the vault."""
    role: str = ""
    accessor: str = ""
    vault_request_id: str = ""
    detail: str = ""


class _Line(msgspec.Struct, frozen=True):
    seq: int
    time: str
    record: Record
    prev: str


class Chain:
    """Where a chain stands: the number of the next line and the hash of the last one."""

    __slots__ = ("head", "seq")

    def __init__(self, *, seq: int = 0, head: str = GENESIS) -> None:
        self.seq = seq
        self.head = head

    @classmethod
    def after(cls, line: bytes) -> Self:
        """The chain that goes on after `line` (no newline). Raises ValueError when it is not an audit line."""
        return cls(seq=_decode(line).seq + 1, head=sha256(line).hexdigest())

    def line(self, record: Record, wall: float) -> bytes:
        """The next line for `record`, without its newline. The chain stands still until `advance`."""
        time = datetime.fromtimestamp(wall, UTC).isoformat(timespec="microseconds")
        return msgspec.json.encode(_Line(self.seq, time, record, self.head))

    def advance(self, line: bytes) -> None:
        """Moves past `line`, which `line()` made and which is now written."""
        self.seq += 1
        self.head = sha256(line).hexdigest()


class BrokenChainError(ValueError):
    """`number` (from 1) is the first line that does not follow from the one before; `why` says how."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"line {number}: {why}")
        self.number = number
        self.why = why


def verify(lines: Iterable[bytes], chain: Chain | None = None) -> Chain:
    """Follows `lines` (newlines allowed) from `chain`, or from the beginning, to where they lead.

    Raises:
        BrokenChainError: at the first line that was changed, removed, added or reordered.
    """
    chain = chain or Chain()
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip(b"\n")
        try:
            entry = _decode(line)
        except ValueError:
            raise BrokenChainError(number, "not an audit line") from None
        if entry.seq != chain.seq:
            raise BrokenChainError(number, f"has number {entry.seq} where {chain.seq} comes next")
        if entry.prev != chain.head:
            raise BrokenChainError(number, "does not follow from the line before, which was changed or replaced")
        chain.advance(line)
    return chain


_decoder = msgspec.json.Decoder(_Line)


def _decode(line: bytes) -> _Line:
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise ValueError("not an audit line") from error
