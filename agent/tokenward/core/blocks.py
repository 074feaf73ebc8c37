"""What an operator has revoked, and so nobody gets until an operator lifts it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tokenward.core.model import Key
from tokenward.errors import Reason, RevokedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """One credential of a workload, all of a workload's, or everything: an empty name stands for all."""

    workload: str = ""
    credential: str = ""

    def covers(self, key: Key) -> bool:
        """Whether `key` is within."""
        return self.workload in {"", key.workload} and self.credential in {"", key.credential}

    def __str__(self) -> str:
        if not self.workload:
            return "everything"
        return f"{self.workload}/{self.credential}" if self.credential else f"workload {self.workload}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`scope` was revoked at `since` (seconds since the epoch) by `by`, because of `reason`."""

    scope: Scope
    reason: str
    by: str
    since: float


class Blocks:
    """The blocks in force: at most one per scope, the first one's reason counts."""

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self._by_scope = {block.scope: block for block in blocks}

    def add(self, block: Block) -> None:
        """From now on `block` holds."""
        self._by_scope.setdefault(block.scope, block)

    def lift(self, scope: Scope) -> bool:
        """Ends the block of exactly this scope; False when there is none. A wider one goes on."""
        return self._by_scope.pop(scope, None) is not None

    def verify(self, key: Key) -> None:
        """Raises RevokedError when a block covers `key`."""
        for block in self._by_scope.values():
            if block.scope.covers(key):
                text = f"{block.scope} was revoked by an operator ({block.reason}); an operator must lift it"
                raise RevokedError(Reason.REVOKED, text)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._by_scope.values())
