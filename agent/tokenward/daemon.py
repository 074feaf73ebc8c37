"""The agent's life: build, serve, stop in reverse order. Signals and wiring live here and nowhere else."""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import pwd
import random
import resource
import signal
import stat
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tokenward.attest.attestor import Attestor
from tokenward.attest.platform import Platform, platform_of, unknown
from tokenward.auditlog import AuditLog
from tokenward.broker import Broker
from tokenward.clock import Clock, SystemClock
from tokenward.config import CertLogin, Config, JwtLogin, KubernetesLogin, Listen, Vault
from tokenward.core.audit import Record
from tokenward.core.model import PlatformJwt
from tokenward.core.schedule import backoff_s
from tokenward.core.store import Store
from tokenward.errors import ConfigError, Problem, Reason, TokenwardError
from tokenward.issuers import Issuers
from tokenward.refresher import Refresher
from tokenward.serve.credentials import CredentialService, IdentityService
from tokenward.serve.front_door import DoorLimits, FrontDoor
from tokenward.serve.listener import Listener, bind, from_systemd
from tokenward.v1 import credentials_pb2, credentials_pb2_grpc
from tokenward.vault.client import State, VaultClient
from tokenward.vault.exchange import Exchange
from tokenward.vault.login import AgentSession, read_token
from tokenward.vault.setup import agent_spiffe_id
from tokenward.vault.signer import Signer
from tokenward.watchers import Watchers

_log = logging.getLogger(__name__)

_STOP_S = 5.0
_GRACE_S = 0.5
_ATTEMPTS = 3
_LOGIN_CHECK_S = 5.0
_SERVICES = tuple(service.full_name for service in credentials_pb2.DESCRIPTOR.services_by_name.values())


@dataclass(frozen=True, slots=True)
class Life:
    """Switches of one run: `ready` is set once callers are served, setting `stop` ends the run."""

    ready: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT end the run gracefully."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop.set)


async def run(config: Config, *, life: Life, signer: Signer | None = None) -> None:
    """Serves until `life.stop`. `signer` is there when the vault was set up for a key made in memory.

    A vault that cannot be reached is no reason not to start: callers are told, and the agent goes on trying.

    Raises:
        TokenwardError: the agent cannot start: its audit file, its socket or a key file.
    """
    _raise_descriptor_limit()
    async with AsyncExitStack() as closing:
        agent = await _build(config, signer, closing)
        agent.audit.append(Record(event="start", detail=config.environment.name))
        async with asyncio.TaskGroup() as tasks:
            serving = [
                tasks.create_task(agent.door.serve(), name="front door"),
                tasks.create_task(agent.refresher.run(), name="refresher"),
                tasks.create_task(_watch_health(agent), name="health"),
            ]
            life.ready.set()
            _log.info("serving on %s", config.listen.workload_socket)
            await life.stop.wait()
            _log.info("stopping")
            await agent.server.stop(_GRACE_S)
            for task in serving:
                task.cancel()
        await _let_go(agent)
        agent.audit.append(Record(event="stop"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agent:
    """Everything that runs, built and not yet serving."""

    audit: AuditLog
    clock: Clock
    client: VaultClient
    session: AgentSession | None
    exchange: Exchange
    broker: Broker
    refresher: Refresher
    door: FrontDoor
    server: grpc.aio.Server
    health: Any


async def _build(config: Config, signer: Signer | None, closing: AsyncExitStack) -> _Agent:
    """Makes every part, lowest first; `closing` ends those that hold something open, in reverse."""
    clock = SystemClock()
    audit = AuditLog(path=config.audit.file, clock=clock)
    audit.open()
    closing.callback(audit.close)

    listening = _listen(config.listen)  # before there are threads: it sets the umask
    closing.callback(listening.close)
    inner = _inner_socket(config.listen.runtime_dir, closing)

    vault = config.vault
    signer = signer or signer_of(vault)
    client = client_of(vault)
    closing.push_async_callback(client.close)
    audience = vault.signing.audience if vault.signing is not None else ""
    session = None
    if vault.login is not None:
        subject = agent_spiffe_id(config)
        session = AgentSession(client=client, login=vault.login, signer=signer, subject=subject, audience=audience)
    exchange = Exchange(client=client, session=session, signer=signer, audience=audience, inline=vault.inline_auth)

    store = Store(margin_s=_ATTEMPTS * vault.timeout_s)
    watchers = Watchers()
    issuers = Issuers(client=client, exchange=exchange, jwt_issuer=f"spiffe://{config.trust_domain}")
    broker = Broker(store=store, issuers=issuers, watchers=watchers, audit=audit, clock=clock)
    refresher = Refresher(store=store, broker=broker, watchers=watchers, clock=clock)

    platform = _platform(config)
    attestor = Attestor(
        workloads=config.workloads.values(),
        platform=platform.selectors,
        platform_unreadable=platform.unreadable,
        reattest_s=config.attestation.reattest_s,
    )
    limits = DoorLimits.within(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    door = FrontDoor(listener=listening.socket, inner_path=inner, attestor=attestor, limits=limits)
    closing.callback(door.close)

    server = grpc.aio.server()
    servicer = _add_services(
        server,
        CredentialService(door=door, broker=broker, watchers=watchers, audit=audit, clock=clock),
        IdentityService(door=door, audit=audit, clock=clock),
    )
    server.add_insecure_port(f"unix:{inner}")
    await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)  # it would say SERVING until the first look
    await server.start()
    closing.push_async_callback(server.stop, None)
    return _Agent(
        audit=audit,
        clock=clock,
        client=client,
        session=session,
        exchange=exchange,
        broker=broker,
        refresher=refresher,
        door=door,
        server=server,
        health=servicer,
    )


def _add_services(server: grpc.aio.Server, credentials: CredentialService, identity: IdentityService) -> Any:
    """Has `server` offer ours, health and reflection; returns the one that health is set on."""
    credentials_pb2_grpc.add_CredentialServiceServicer_to_server(credentials, server)
    credentials_pb2_grpc.add_IdentityServiceServicer_to_server(identity, server)
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return servicer


def _listen(listen: Listen) -> Listener:
    """The socket that systemd passes in, else one of our own. Raises TokenwardError, for an unknown user too."""
    passed = from_systemd("workload")
    if passed is not None:
        return passed
    try:
        owner = pwd.getpwnam(listen.workload_socket_owner).pw_uid if listen.workload_socket_owner else None
        group = grp.getgrnam(listen.workload_socket_group).gr_gid if listen.workload_socket_group else None
    except KeyError as error:
        raise TokenwardError(Reason.INVALID_CONFIG, f"listen: there is no such user or group: {error}") from error
    return bind(listen.workload_socket, mode=listen.workload_socket_mode, owner=owner, group=group)


def client_of(vault: Vault) -> VaultClient:
    """A client for the vault of this configuration."""
    certificate = (vault.login.cert_file, vault.login.key_file) if isinstance(vault.login, CertLogin) else None
    return VaultClient(
        addresses=vault.addresses,
        namespace=vault.namespace,
        ca_file=vault.ca_file,
        client_cert=certificate,
        timeout_s=vault.timeout_s,
        max_reply_bytes=vault.max_reply_bytes,
    )


def signer_of(vault: Vault) -> Signer | None:
    """The key that vouches for workloads, where the configuration has one. Raises ConfigError."""
    signing = vault.signing
    if signing is None:
        return None
    if not signing.key_file:
        return Signer.generate(issuer=signing.issuer)
    try:
        with open(signing.key_file, "rb") as file:
            return Signer.from_pem(file.read(), issuer=signing.issuer)
    except (OSError, ValueError) as error:
        expected = (error.strerror or "unreadable") if isinstance(error, OSError) else str(error)
        raise ConfigError((Problem(signing.key_file, 1, "vault.signing.key_file", expected),)) from error


def _platform(config: Config) -> Platform:
    """Where the agent runs, by the pod's token if there is one."""
    files = [each.exchange.token_file for each in config.workloads.values() if isinstance(each.exchange, PlatformJwt)]
    if isinstance(config.vault.login, JwtLogin | KubernetesLogin) and config.vault.login.token_file:
        files.append(config.vault.login.token_file)
    if not files:
        return unknown("the configuration names no projected token")
    try:
        return platform_of(read_token(files[0]).reveal())
    except TokenwardError as error:
        return unknown(error.public)


def _inner_socket(directory: str, closing: AsyncExitStack) -> str:
    """The path of grpcio's own socket, in a directory that only the agent can enter."""
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        expected = f"{directory} must be a directory of the agent's own user with mode 0700; remove it"
        raise ConfigError((Problem(directory, 1, "listen.runtime_dir", expected),))
    path = os.path.join(directory, "grpc.sock")
    with suppress(FileNotFoundError):
        os.unlink(path)  # left by an agent that was killed; a live one was found when the public socket was bound

    def remove() -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.rmdir(directory)

    closing.callback(remove)
    return path


async def _let_go(agent: _Agent) -> None:
    """Revokes what is held at the vault, as far as that goes within the deadline; TTLs do the rest."""
    try:
        async with asyncio.timeout(_STOP_S):
            await agent.broker.close()
            await agent.exchange.close()
            if agent.session is not None:
                await agent.session.revoke()
    except TimeoutError:
        _log.warning("not everything was revoked at the vault within %g s; the rest ends by its TTL", _STOP_S)
    except TokenwardError as error:
        _log.warning("not everything was revoked at the vault; the rest ends by its TTL: %s", error)


async def _watch_health(agent: _Agent) -> None:
    """Keeps the agent logged in, and tells health checks whether callers can be served what is not yet in memory."""
    failures = 0
    while True:
        trouble = await _trouble(agent)
        if trouble and not failures:
            _log.warning("not ready: %s", trouble)
        elif not trouble and failures:
            _log.info("ready again")
        failures = failures + 1 if trouble else 0
        status = health_pb2.HealthCheckResponse.NOT_SERVING if trouble else health_pb2.HealthCheckResponse.SERVING
        for service in ("", *_SERVICES):
            await agent.health.set(service, status)
        pause_s = backoff_s(failures, draw=random.random()) if failures else _LOGIN_CHECK_S  # noqa: S311 -- no secret
        await asyncio.sleep(pause_s)


async def _trouble(agent: _Agent) -> str:
    """Why the agent is not ready, or nothing."""
    if not agent.audit.is_writable:
        return "the audit log cannot be written"
    try:
        if agent.session is not None:
            await agent.session.token(agent.clock.now())
            return ""
    except TokenwardError as error:
        return str(error)
    states = await agent.client.health()
    if any(each.state in {State.ACTIVE, State.STANDBY} for each in states):
        return ""
    return "; ".join(f"{each.address} is {each.state} {each.why}".rstrip() for each in states)


def _raise_descriptor_limit() -> None:
    """A connection costs four descriptors; the soft limit is low for programs that still use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
