"""The agent's life: build, serve, reload, stop in reverse order. Signals live here and nowhere else."""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from grpc_health.v1 import health_pb2

from tokenward import handover, logs, succession
from tokenward.assembly import SERVICES, Agent, build, platform, verify_validations
from tokenward.config import Config, load
from tokenward.core.audit import Record
from tokenward.errors import Reason, TokenwardError, UnavailableError
from tokenward.vault.client import State
from tokenward.vault.signer import Signer

_log = logging.getLogger(__name__)

_STOP_S = 4.0
_GRACE_S = 0.5
_LOOK_S = 5.0
"""How often the vault is asked how it is."""
_STEP_S = 1.0
"""And how often while something is wrong, on average."""
_FIXED = ("trust_domain", "listen", "limits", "vault", "audit", "state")
"""Sections that a reload cannot replace."""


@dataclass(frozen=True, slots=True)
class Life:
    """Switches of one run: `ready` is set once callers are served, setting `stop` ends the run, `reload` reloads."""

    ready: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reload: asyncio.Event = field(default_factory=asyncio.Event)

    def obey_signals(self) -> None:
        """SIGTERM and SIGINT end the run gracefully, SIGHUP reloads the configuration."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)


async def run(config: Config, *, life: Life, signer: Signer | None = None) -> None:
    """Serves until `life.stop`. `signer` is there when the vault was set up for a key made in memory.

    A vault that cannot be reached is no reason not to start: callers are told, and the agent goes on trying.

    Raises:
        TokenwardError: the agent cannot start: its audit file, its state file, its socket or a key file.
    """
    _raise_descriptor_limit()
    inherited = succession.inherited()  # before the sockets that systemd passes are looked for
    async with AsyncExitStack() as closing:
        key = inherited.fingerprint_key if inherited is not None else None
        try:
            agent = await build(config, signer=signer, fingerprint_key=key, reload=_reload, closing=closing)
        except TokenwardError:
            if inherited is not None:
                await asyncio.to_thread(succession.give_back, inherited)
            raise
        agent.audit.append(Record(event="start", detail=config.environment.name))
        if inherited is not None:
            succession.adopt(agent, inherited)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(agent.door.serve(), name="front door"),
                tasks.create_task(agent.refresher.run(), name="refresher"),
                tasks.create_task(_watch_health(agent), name="health"),
                tasks.create_task(_reload_when_told(agent, life), name="reload"),
                tasks.create_task(agent.operations.finish(), name="left over"),
                tasks.create_task(_feed_watchdog(), name="watchdog"),
            ]
            if agent.admin is not None:
                background.append(tasks.create_task(agent.admin.door.serve(), name="admin door"))
            life.ready.set()
            _log.info("serving on %s", config.listen.workload_socket)
            handover.notify("READY=1", f"STATUS=serving on {config.listen.workload_socket}")
            await life.stop.wait()
            _log.info("stopping")
            handover.notify("STOPPING=1")
            restarting = asyncio.create_task(succession.is_restart(), name="restart?")  # takes its time: asked early
            await _stop_serving(agent)
            for task in background:
                task.cancel()
        await _let_go(agent, restarting)
        agent.audit.append(Record(event="stop"))


# -- the configuration, again -----------------------------------------------------------------------------------------


async def _reload_when_told(agent: Agent, life: Life) -> None:
    while True:
        await life.reload.wait()
        life.reload.clear()
        handover.reloading()
        try:
            await _reload(agent)
        except TokenwardError as error:
            _log.error("the configuration was not replaced: %s", error)
        except Exception:  # noqa: BLE001 -- a bug of ours in reading a file must not end an agent that serves
            _log.exception("the configuration was not replaced")
        handover.notify("READY=1")


async def _reload(agent: Agent) -> None:
    """Replaces the configuration by what its file says now: the whole, or nothing. Raises TokenwardError."""
    before = agent.config
    if not before.source:
        raise TokenwardError(Reason.INVALID_CONFIG, "this configuration did not come from a file")
    after = await asyncio.to_thread(load, before.source)
    fixed = [name for name in _FIXED if getattr(before, name) != getattr(after, name)]
    if fixed:
        raise TokenwardError(Reason.INVALID_CONFIG, f"a change of {', '.join(fixed)} takes effect after a restart only")
    await asyncio.to_thread(verify_validations, after)
    where = await asyncio.to_thread(platform, after)
    agent.audit.append(Record(event="reload", detail=after.environment.name))
    agent.config = after  # from here on nothing fails and nothing waits
    agent.attestor.replace(
        after.workloads.values(),
        platform=where.selectors,
        platform_unreadable=where.unreadable,
        reattest_s=after.attestation.reattest_s,
    )
    found = agent.broker.reconfigure(after.workloads)
    agent.refresher.rate = after.leases.refresh_rate
    agent.presence.linger_s = after.leases.linger_s
    logs.configure(after.log.level, form=after.log.format)
    for warning in after.warnings:
        _log.warning("%s", warning)
    _log.info("the configuration was replaced: %d workloads changed", len(found.workloads))


# -- the end ----------------------------------------------------------------------------------------------------------


async def _stop_serving(agent: Agent) -> None:
    """Lets nobody in any more and ends every stream, so that clients come back to the next agent."""
    agent.door.stop_accepting()
    if agent.admin is not None:
        agent.admin.door.close()
    agent.watchers.end(UnavailableError(Reason.SHUTTING_DOWN, "the agent is being stopped; connect again"))
    await agent.server.stop(_GRACE_S)
    await agent.door.drain(_GRACE_S)


async def _let_go(agent: Agent, restarting: asyncio.Task[bool]) -> None:
    """Hands over what is held, or revokes it as far as that goes within the deadline; TTLs do the rest."""
    try:
        async with asyncio.timeout(_STOP_S):
            if await restarting and await succession.hand_over(agent):
                if agent.session is not None and not succession.has_children(agent.config):
                    await agent.session.revoke()
                return
            if agent.config.leases.on_stop == "keep":
                await agent.broker.halt()
                return
            await agent.broker.close()
            if agent.session is not None:
                await agent.session.revoke()
    except TimeoutError:
        _log.warning("not everything was revoked at the vault within %g s", _STOP_S)
    except TokenwardError as error:
        _log.warning("not everything was revoked at the vault: %s", error)
    finally:
        agent.operations.save()
        left = agent.revoker.stop()
        if left:
            _log.warning("%d leases are left to the agent that starts next, or to their TTL", len(left))


# -- health -----------------------------------------------------------------------------------------------------------


async def _watch_health(agent: Agent) -> None:
    """Keeps the agent logged in, and tells health checks whether callers can be served what is not yet in memory.

    Looks more often while something is wrong: what waits for the vault is tried again as soon as it is seen to be back.
    """
    said, told = "", None
    looked_at = float("-inf")
    while True:
        now = asyncio.get_running_loop().time()
        in_doubt = bool(said) or not agent.client.all_serve
        if in_doubt or now - looked_at >= _LOOK_S:
            looked_at = now
            trouble = await _trouble(agent)
            if trouble and not said:
                _log.warning("not ready: %s", trouble)
            elif said and not trouble:
                _log.info("ready again")
            if trouble != told:
                handover.notify(f"STATUS=not ready: {trouble}" if trouble else "STATUS=ready")
                told = trouble
            if in_doubt and not trouble:
                agent.broker.encourage()
            said = trouble
            status = health_pb2.HealthCheckResponse.NOT_SERVING if trouble else health_pb2.HealthCheckResponse.SERVING
            for service in ("", *SERVICES):
                await agent.health.set(service, status)
        await asyncio.sleep(_STEP_S * random.uniform(0.5, 1.5))  # noqa: S311 -- no secret


async def _feed_watchdog() -> None:
    """Shows the service manager that the event loop goes round, for which it must be fed from there."""
    limit_s = handover.watchdog_s()
    while limit_s is not None:
        handover.notify("WATCHDOG=1")
        await asyncio.sleep(limit_s / 3)


async def _trouble(agent: Agent) -> str:
    """Why the agent is not ready, or nothing."""
    if not agent.audit.is_writable:
        return "the audit log cannot be written"
    states = await agent.client.health()  # which also lets calls pass again to an address that is back
    if not any(each.state in {State.ACTIVE, State.STANDBY} for each in states):
        return "; ".join(f"{each.address} is {each.state} {each.why}".rstrip() for each in states)
    try:
        if agent.session is not None:
            await agent.session.token(agent.clock.now())
    except TokenwardError as error:
        return str(error)
    return ""


def _raise_descriptor_limit() -> None:
    """A connection costs four descriptors; the soft limit is low for programs that still use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
