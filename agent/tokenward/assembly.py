"""The agent's parts and how they are put together, lowest first. Nothing runs yet when `build` returns.

Owns the wiring, the sockets and the files that are opened for it. Leaves to `daemon` what runs when, and to
`succession` what one agent leaves to the next.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from tokenward.attest.attestor import Attestor
from tokenward.attest.platform import Platform, platform_of, unknown
from tokenward.auditlog import AuditLog
from tokenward.broker import Broker
from tokenward.clock import Clock, SystemClock
from tokenward.config import CertLogin, Config, JwtLogin, KubernetesLogin, Vault
from tokenward.core.blocks import Blocks
from tokenward.core.model import PlatformJwt
from tokenward.core.store import Store
from tokenward.errors import ConfigError, Problem, Reason, TokenwardError
from tokenward.issuers import Issuers
from tokenward.operations import Operations
from tokenward.presence import Presence
from tokenward.refresher import Refresher
from tokenward.revoker import Revoker
from tokenward.serve import limits
from tokenward.serve.credentials import CredentialService, IdentityService
from tokenward.serve.front_door import DoorLimits, FrontDoor
from tokenward.serve.sockets import Sockets, hide, open_sockets
from tokenward.statefile import StateFile
from tokenward.v1 import credentials_pb2, credentials_pb2_grpc
from tokenward.validation import Validator
from tokenward.vault.client import VaultClient
from tokenward.vault.exchange import Exchange
from tokenward.vault.login import AgentSession, read_token
from tokenward.vault.setup import agent_spiffe_id
from tokenward.vault.signer import Signer
from tokenward.watchers import Watchers

_ATTEMPTS = 3
_OPERATORS = 32
"""Connections to the admin socket."""
SERVICES = tuple(service.full_name for service in credentials_pb2.DESCRIPTOR.services_by_name.values())


@dataclass(frozen=True, slots=True)
class Admin:
    """What operators connect to."""

    door: FrontDoor
    server: grpc.aio.Server


@dataclass(slots=True, kw_only=True)
class Agent:
    """Everything that runs, built and not yet serving. `config` is replaced by a reload."""

    config: Config
    audit: AuditLog
    clock: Clock
    client: VaultClient
    session: AgentSession | None
    attestor: Attestor
    store: Store
    watchers: Watchers
    revoker: Revoker
    broker: Broker
    operations: Operations
    refresher: Refresher
    presence: Presence
    door: FrontDoor
    server: grpc.aio.Server
    health: Any
    admin: Admin | None = None


async def build(
    config: Config,
    *,
    signer: Signer | None,
    fingerprint_key: bytes | None,
    reload: Callable[[Agent], Awaitable[None]],
    closing: AsyncExitStack,
) -> Agent:
    """Makes every part, lowest first; `closing` ends those that hold something open, in reverse.

    `signer` is there when the vault was set up for a key made in memory, `fingerprint_key` when values of the agent
    before are taken over; `reload` is what an operator's reload does. Raises TokenwardError.
    """
    verify_validations(config)
    clock = SystemClock()
    audit = AuditLog(path=config.audit.file, clock=clock, fingerprint_key=fingerprint_key)
    audit.open()
    closing.callback(audit.close)
    state = StateFile(config.state.file)
    blocks_before, left_over = state.load()
    sockets = open_sockets(config.listen, closing)  # before there are threads: it sets the umask

    client, session, exchange = _vault(config, signer, closing)
    validator = Validator()
    closing.push_async_callback(validator.close)
    jwt_issuer = f"spiffe://{config.trust_domain}"
    issuers = Issuers(client=client, exchange=exchange, jwt_issuer=jwt_issuer, validator=validator)

    store = Store(margin_s=_ATTEMPTS * config.vault.timeout_s)
    watchers = Watchers()
    revoker = Revoker(revoke=issuers.revoke, audit=audit, clock=clock)
    blocks = Blocks(blocks_before)
    broker = Broker(
        workloads=config.workloads,
        store=store,
        issuers=issuers,
        revoker=revoker,
        watchers=watchers,
        audit=audit,
        clock=clock,
        blocks=blocks,
    )
    refresher = Refresher(
        store=store,
        broker=broker,
        watchers=watchers,
        clock=clock,
        rate=config.leases.refresh_rate,
        calls=lambda: client.calls,
    )
    operations = Operations(
        broker=broker,
        revoker=revoker,
        blocks=blocks,
        state=state,
        left_over=left_over,
        exchange=exchange,
        audit=audit,
        clock=clock,
    )
    presence = Presence(linger_s=config.leases.linger_s, on_gone=broker.let_go)
    closing.callback(presence.close)

    attestor = _attestor(config)
    door, turnstile = _door(config, sockets, attestor, closing)
    credentials = CredentialService(
        door=door,
        broker=broker,
        watchers=watchers,
        presence=presence,
        turnstile=turnstile,
        audit=audit,
        clock=clock,
    )
    identity = IdentityService(door=door, turnstile=turnstile, audit=audit, clock=clock)
    server = grpc.aio.server(options=limits.server_options(config.limits))
    guarded = limits.Guarded(server, door=door, turnstile=turnstile, clock=clock)
    health_service = await _serve(server, guarded, (credentials, identity), sockets.inner, closing)
    door.inner_path = hide(sockets.inner, closing)
    agent = Agent(
        config=config,
        audit=audit,
        clock=clock,
        client=client,
        session=session,
        attestor=attestor,
        store=store,
        watchers=watchers,
        revoker=revoker,
        broker=broker,
        operations=operations,
        refresher=refresher,
        presence=presence,
        door=door,
        server=server,
        health=health_service,
    )
    if sockets.admin is not None:
        agent.admin = await _admin(agent, sockets.admin, sockets.inner_admin, reload, closing)
    return agent


def _vault(
    config: Config, signer: Signer | None, closing: AsyncExitStack
) -> tuple[VaultClient, AgentSession | None, Exchange]:
    """The way to the vault, the agent's own login where it has one, and what proves workloads."""
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
    return client, session, exchange


def _attestor(config: Config) -> Attestor:
    where = platform(config)
    return Attestor(
        workloads=config.workloads.values(),
        platform=where.selectors,
        platform_unreadable=where.unreadable,
        reattest_s=config.attestation.reattest_s,
    )


def _door(
    config: Config, sockets: Sockets, attestor: Attestor, closing: AsyncExitStack
) -> tuple[FrontDoor, limits.Turnstile]:
    """The callers' door, and what their requests pass behind it."""
    room = limits.Room.of(config.limits, places=limits.places_here())
    door = FrontDoor(
        listener=sockets.workload,
        inner_path=sockets.inner,
        attestor=attestor,
        limits=limits.door_limits(config.limits, room),
    )
    closing.callback(door.close)
    return door, limits.Turnstile(room=room, rate=config.limits.request_rate)


async def _serve(
    server: grpc.aio.Server,
    guarded: limits.Guarded,
    ours: tuple[CredentialService, IdentityService],
    path: str,
    closing: AsyncExitStack,
) -> Any:
    """Starts the callers' server, whose other services are `guarded`. The service on which health is set."""
    credentials_pb2_grpc.add_CredentialServiceServicer_to_server(ours[0], server)
    credentials_pb2_grpc.add_IdentityServiceServicer_to_server(ours[1], server)
    health_service = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    health_pb2_grpc.add_HealthServicer_to_server(health_service, guarded)
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflected = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]  # nor this
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, guarded)
    server.add_insecure_port(f"unix:{path}")
    await health_service.set("", health_pb2.HealthCheckResponse.NOT_SERVING)  # SERVING until the first look otherwise
    await server.start()
    closing.push_async_callback(server.stop, None)
    return health_service


async def _admin(
    agent: Agent,
    listening: socket.socket,
    inner: str,
    reload: Callable[[Agent], Awaitable[None]],
    closing: AsyncExitStack,
) -> Admin:
    """The operators' door and server: apart from the callers', so that neither reaches the other's services."""
    from tokenward.serve.admin import AdminService  # noqa: PLC0415 -- an agent without one need not know it
    from tokenward.v1 import admin_pb2_grpc  # noqa: PLC0415 -- as above

    operators = DoorLimits(max_connections=_OPERATORS, max_connections_per_uid=_OPERATORS)
    door = FrontDoor(listener=listening, inner_path=inner, attestor=agent.attestor, limits=operators)
    closing.callback(door.close)
    server = grpc.aio.server(options=limits.server_options(agent.config.limits))
    service = AdminService(
        door=door,
        operations=agent.operations,
        environment=agent.config.environment.name,
        reload=functools.partial(reload, agent),
    )
    admin_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{inner}")
    await server.start()
    closing.push_async_callback(server.stop, None)
    door.inner_path = hide(inner, closing)
    return Admin(door=door, server=server)


# -- from the configuration -------------------------------------------------------------------------------------------


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


def platform(config: Config) -> Platform:
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


def verify_validations(config: Config) -> None:
    """Raises TokenwardError when the values of some grant could not be tried as it asks."""
    grants = [grant for workload in config.workloads.values() for grant in workload.grants.values()]
    if missing := Validator.missing(grants):
        raise TokenwardError(Reason.INVALID_CONFIG, "; ".join(missing))
