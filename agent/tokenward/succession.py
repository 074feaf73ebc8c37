"""From one agent to the next: what the agent before left with the service manager, and what this one leaves.

Owns the meeting of `handover`, which moves the bytes, `core.handover`, which says what is in them, and the parts that
hold it. Invariant: a value is taken over for exactly the grant that it was obtained for; every other lease is revoked.
"""

from __future__ import annotations

import asyncio
import logging

from tokenward import handover
from tokenward.assembly import Agent
from tokenward.config import Config
from tokenward.core.audit import Record
from tokenward.core.handover import State, alive, decode, digest_of, encode
from tokenward.core.model import TokenRole

_log = logging.getLogger(__name__)


def inherited() -> State | None:
    """What the agent before left with the service manager, if it is good."""
    data = handover.take()
    if data is None:
        return None
    try:
        return decode(data)
    except ValueError as error:
        _log.warning("what the agent before left is not taken over: %s", error)
        return None
    finally:
        handover.wipe(data)


def give_back(state: State) -> None:
    """Leaves what could not be taken over where it was, for the next attempt to start."""
    handover.offer(encode(state))


def _digests(config: Config) -> dict[tuple[str, str], str]:
    """What each grant is, by workload and credential: a value is taken over for exactly the same one."""
    vault = " ".join((*config.vault.addresses, config.vault.namespace, config.environment.name))
    return {
        (workload.name, grant.name): digest_of(grant, workload, vault=vault)
        for workload in config.workloads.values()
        for grant in workload.grants.values()
    }


def adopt(agent: Agent, inherited: State) -> None:
    """Goes on with what the agent before held. Raises AuditError."""
    state = alive(inherited, agent.clock.now(), _digests(agent.config))
    detail = f"took over {len(state.credentials)} credentials, and {len(state.pending)} leases to revoke"
    agent.audit.append(Record(event="handover", detail=detail))
    agent.store.count_on(state.numbers)
    for held in state.credentials:
        agent.store.adopt(held, agent.config.workloads[held.key.workload].grants[held.key.credential])
    for key, issued in state.pending:
        agent.revoker.end(key, (issued,), why="left over by the agent before")
    _log.info("%s", detail)


async def is_restart() -> bool:
    """Whether a service manager stops us to start the next agent at once. Not, where that cannot be told."""
    if not handover.is_managed():
        return False
    restart = await asyncio.to_thread(handover.is_restart)
    if restart is None:
        _log.warning("it cannot be told whether this is a restart: nothing is handed over")
    return bool(restart)


async def hand_over(agent: Agent) -> bool:
    """Leaves what is held with the service manager for the next agent; False when it was not taken."""
    await agent.broker.halt()
    digests = _digests(agent.config)
    now = agent.clock.now()
    state = State(
        credentials=agent.store.held(now, lambda key: digests[key.workload, key.credential]),
        numbers=agent.store.numbers,
        pending=agent.revoker.pending,
        fingerprint_key=agent.audit.fingerprint_key,
        written=now,
    )
    if not await asyncio.to_thread(handover.offer, encode(state)):
        return False
    agent.revoker.stop()
    detail = f"left {len(state.credentials)} credentials, and {len(state.pending)} leases to revoke"
    agent.audit.append(Record(event="handover", detail=detail))
    _log.info("%s", detail)
    return True


def has_children(config: Config) -> bool:
    """Whether there are tokens that end with the agent's own."""
    return any(isinstance(workload.exchange, TokenRole) for workload in config.workloads.values())
