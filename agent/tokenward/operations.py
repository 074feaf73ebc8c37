"""What an operator does to a running agent: revoke, lift, rotate, and what outlives the agent of that.

Owns the order: first in memory, so that nobody gets the value any more, then on disk, then at the vault for as long as
that takes. Leaves who may do it to the admin plane. Invariant: what was revoked is not served again before it is
lifted, also by the agent that comes after this one; where that cannot be made sure, the operator is told.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from tokenward.auditlog import AuditLog
from tokenward.broker import Broker
from tokenward.clock import Clock
from tokenward.core.audit import Record
from tokenward.core.blocks import Block, Blocks, Scope
from tokenward.core.model import Issued, Key, Served
from tokenward.core.schedule import backoff_s
from tokenward.errors import InvalidRequestError, TokenwardError
from tokenward.revoker import Revoker
from tokenward.statefile import LeftOver, StateFile
from tokenward.vault.exchange import Exchange

_log = logging.getLogger(__name__)

_MAX_REASON = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """What a revocation did: how many values were ended, and what the operator must know of the state file."""

    ended: int
    problem: str = ""


class Operations:
    """One agent's operator's desk."""

    def __init__(
        self,
        *,
        broker: Broker,
        revoker: Revoker,
        blocks: Blocks,
        state: StateFile,
        left_over: Iterable[LeftOver],
        exchange: Exchange,
        audit: AuditLog,
        clock: Clock,
    ) -> None:
        self._broker = broker
        self._revoker = revoker
        self._blocks = blocks
        self._state = state
        self._left_over = list(left_over)
        self._exchange = exchange
        self._audit = audit
        self._clock = clock
        self._waiting: asyncio.Task[None] | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What is revoked now."""
        return tuple(self._blocks)

    @property
    def pending_revocations(self) -> int:
        """Leases whose revocation at the vault is not over."""
        return len(self._unfinished())

    def held(self) -> tuple[tuple[Key, Served], ...]:
        """Every live value."""
        return self._broker.held()

    async def rotate(self, workload: str, credential: str, *, reason: str, by: str) -> tuple[Served, ...]:
        """Obtains a new value of a credential that is held, one for each of its audiences; returns what is there then.

        Raises InvalidRequestError without a reason or when none is held, and what the vault's answer deserves: then
        the old value stays.
        """
        _verify_reason(reason)
        scope = Scope(workload=workload, credential=credential)
        self._record("rotate", scope, reason=reason, by=by)
        return await self._broker.rotate(workload, credential)

    def revoke(self, scope: Scope, *, reason: str, by: str) -> Revoked:
        """Ends all that `scope` covers, and lets nobody have it before it is lifted.

        Raises InvalidRequestError without a reason, AuditError when it cannot be recorded: then it is done all the
        same, since ending a credential must not wait for a disk.
        """
        _verify_reason(reason)
        block = Block(scope=scope, reason=reason, by=by, since=self._clock.now().wall)
        ended = self._broker.revoke(block)
        problem = self._save()
        if self._revoker.pending:
            self._waiting = asyncio.get_running_loop().create_task(self._save_when_settled(), name="state")
        self._record("block", scope, reason=reason, by=by)
        return Revoked(ended=ended, problem=problem)

    def lift(self, scope: Scope, *, reason: str, by: str) -> bool:
        """Lets callers have again what was revoked as exactly this scope; False when nothing was.

        Raises InvalidRequestError without a reason, TokenwardError when it cannot be recorded or saved: then the
        block goes on.
        """
        _verify_reason(reason)
        if all(block.scope != scope for block in self._blocks):
            return False
        self._record("unblock", scope, reason=reason, by=by)
        self._state.save((block for block in self._blocks if block.scope != scope), self._unfinished())
        return self._broker.lift(scope)

    async def finish(self) -> None:
        """Revokes what an agent before this one could not, by the accessors that it wrote down; until that is done."""
        failures = 0
        while self._left_over:
            left = self._left_over[0]
            try:
                if left.ends is None or self._clock.now().wall < left.ends:
                    await self._exchange.revoke_accessor(left.accessor, now=self._clock.now())
                    self._record_revoked(left, "ok")
            except TokenwardError as error:
                if error.retryable:
                    failures += 1
                    await asyncio.sleep(backoff_s(failures, draw=random.random()))  # noqa: S311 -- no secret
                    continue
                _log.error(
                    "a token of %s was not revoked (%s): do it by hand, with `bao token revoke -accessor %s`",
                    left.workload,
                    error.public,
                    left.accessor,
                )
                with suppress(TokenwardError):
                    self._record_revoked(left, error.reason)
            self._left_over.pop(0)
            self._save()

    def save(self) -> None:
        """Writes down what is not over, for the agent after this one."""
        problem = self._save()
        if problem:
            _log.error("%s", problem)

    async def _save_when_settled(self) -> None:
        await self._revoker.settled()
        self.save()

    def _save(self) -> str:
        try:
            self._state.save(self._blocks, self._unfinished())
        except TokenwardError as error:
            return error.public
        return ""

    def _unfinished(self) -> tuple[LeftOver, ...]:
        return (*self._left_over, *(_left_over(key, issued) for key, issued in self._revoker.pending))

    def _record(self, event: str, scope: Scope, *, reason: str, by: str) -> None:
        self._audit.append(
            Record(event=event, workload=scope.workload, credential=scope.credential, detail=f"{by}: {reason}")
        )

    def _record_revoked(self, left: LeftOver, outcome: str) -> None:
        self._audit.append(
            Record(
                event="revoke",
                outcome=outcome,
                workload=left.workload,
                credential=left.credential,
                accessor=left.accessor,
                detail="left over by the agent before",
            )
        )


def _left_over(key: Key, issued: Issued) -> LeftOver:
    assert issued.lease is not None, "only leases are pending"
    return LeftOver(
        accessor=issued.lease.token.accessor,
        workload=key.workload,
        credential=key.credential,
        ends=issued.expires.wall,
    )


def _verify_reason(reason: str) -> None:
    if not reason.strip() or not reason.isprintable() or len(reason) > _MAX_REASON:
        raise InvalidRequestError(f"say why, in one line of at most {_MAX_REASON} printable characters")
