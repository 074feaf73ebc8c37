"""`tokenward dev`: an agent beside an embedded OpenBao, for one developer on one machine.

The vault is a child process with in-memory storage, set up by the same code as `tokenward vault-setup`; its set-up
token is revoked before the agent starts, so nothing privileged remains. All files are in one directory and go
with the agent.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec

from tokenward import daemon, hardening
from tokenward.client import AsyncClient
from tokenward.config import Config, load
from tokenward.core.secret import Secret
from tokenward.errors import Reason, TokenwardError
from tokenward.vault import setup
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.embedded import EmbeddedVault
from tokenward.vault.keeper import NoData
from tokenward.vault.signer import Signer

_CONFIG = """\
# Made by `tokenward dev`; it is gone when that ends. docs/configuration.md explains every key.
trust_domain = "dev.example"

[environment]
name        = "dev"
vault_paths = ["demo", "pki", "transit"]

[listen]
workload_socket = "{directory}/workload.sock"

[vault]
addresses = ["unix://{directory}/vault/bao.sock"]

[vault.login]
method = "jwt"
role   = "tokenward"

[vault.signing]

[audit]
file = "{directory}/audit.jsonl"

[state]
file = "{directory}/state.json"

[workloads.demo]                      # spiffe://dev.example/demo
selectors = ["unix:uid:{uid}"]
exchange  = {{ method = "signed_jwt" }}
owner     = "you"
purpose   = "shows what an application gets"

[workloads.demo.credentials.demo-api-key]
kind = "kv"
path = "demo/api"
poll = "5s"

[workloads.demo.credentials.demo-jwt]
kind      = "jwt"
path      = "transit/keys/tokenward-jwt"
audiences = ["https://api.example"]

[workloads.demo.credentials.demo-x509]
kind = "x509"
path = "pki/sign/tokenward"

[workloads.demo.credentials.demo-vault-token]
kind = "vault_token"
"""

_HINTS = """\
tokenward dev is ready: every process of uid {uid} is workload "demo".
First credential: {name} version {version} with the fields {fields}, fetched in {took_ms:.0f} ms.

  {call} get demo-api-key --field api_key    what an application would use
  {call} get demo-jwt --field token          a JWT for https://api.example
  {call} watch                               every change, as it happens
  {call} whoami                              what the agent knows of you

A process of any other user gets nothing from {socket}.
Configuration: {config}. Audit log: {audit}.
Ctrl-C ends the agent and its vault.
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a dev agent keeps its things."""

    directory: str

    @property
    def config(self) -> str:
        return os.path.join(self.directory, "tokenward.toml")

    @property
    def vault(self) -> str:
        return os.path.join(self.directory, "vault")

    @property
    def audit(self) -> str:
        return os.path.join(self.directory, "audit.jsonl")


def default_directory() -> str:
    """Where the client looks for a dev agent of this user, too."""
    return f"/tmp/tokenward-dev-{os.getuid()}"  # noqa: S108 -- `_claimed` refuses what is not ours


async def run(directory: str, *, as_json: bool) -> None:
    """Runs until SIGINT or SIGTERM; says on stdout when it is ready.

    Raises:
        TokenwardError: something is missing (the `dev` extra), or the directory is not ours or in use.
    """
    hardening.protect()  # what it could not have matters little here
    life = daemon.Life()
    life.obey_signals()
    with _claimed(directory) as place:
        config = _configured(place)
        assert config.vault.signing is not None
        signer = Signer.generate(issuer=config.vault.signing.issuer)
        async with EmbeddedVault(directory=place.vault) as vault:
            await _set_up(config, signer, vault)
            async with asyncio.TaskGroup() as tasks:
                agent = tasks.create_task(daemon.run(config, life=life, signer=signer), name="agent")
                ready = tasks.create_task(life.ready.wait())
                await asyncio.wait({agent, ready}, return_when=asyncio.FIRST_COMPLETED)
                if life.ready.is_set():
                    await _announce(place, config, vault, as_json=as_json)
                ready.cancel()


def _configured(place: Place) -> Config:
    with open(place.config, "w", encoding="utf-8") as file:
        file.write(_CONFIG.format(directory=place.directory, uid=os.getuid()))
    return load(place.config)


async def _set_up(config: Config, signer: Signer, vault: EmbeddedVault) -> None:
    client = VaultClient(addresses=[vault.address])
    try:
        steps = setup.plan(config, public_key_pem=signer.public_pem())
        await setup.apply(client, vault.admin_token, steps)
        secret = {"data": {"api_key": Secret(f"demo-{secrets.token_urlsafe(24)}")}}
        await client.call(VaultRequest("POST", "demo/data/api", secret), into=NoData, auth=vault.admin_token)
        await setup.revoke_admin(client, vault.admin_token)
    finally:
        await client.close()


async def _announce(place: Place, config: Config, vault: EmbeddedVault, *, as_json: bool) -> None:
    """Fetches a first credential the way an application does, then says how to go on."""
    socket = config.listen.workload_socket
    if as_json:
        line = {
            "workload_socket": socket,
            "config": place.config,
            "vault_socket": vault.address.removeprefix("unix://"),
        }
        print(msgspec.json.encode(line).decode(), flush=True)  # noqa: T201 -- the answer of the command
        return
    clock = asyncio.get_running_loop().time
    began = clock()
    async with AsyncClient(socket) as client:
        credential = await client.get("demo-api-key")
    text = _HINTS.format(
        uid=os.getuid(),
        call="tokenward" if place.directory == default_directory() else f"tokenward --socket {socket}",
        socket=socket,
        config=place.config,
        audit=place.audit,
        name=credential.name,
        version=credential.version,
        fields=", ".join(credential.values),
        took_ms=(clock() - began) * 1000,
    )
    print(text, flush=True)  # noqa: T201 -- the answer of the command


@contextmanager
def _claimed(directory: str) -> Iterator[Place]:
    """The directory, made or found to be ours, locked against a second dev agent; emptied of our things at the end."""
    made = False
    with suppress(FileExistsError):
        os.mkdir(directory)
        made = True
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise _unusable(f"{directory} must be your own and writable by nobody else; choose another with --dir")
        if made:
            os.fchmod(fd, 0o755)  # whatever the umask: others may reach the socket, and are refused there
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _unusable(f"another `tokenward dev` uses {directory}; end it or choose another --dir") from error
        place = Place(directory)
        with suppress(FileExistsError):
            os.mkdir(place.vault, 0o700)
        try:
            yield place
        finally:
            for path in (place.config, place.audit):
                with suppress(FileNotFoundError):
                    os.unlink(path)
            os.rmdir(place.vault)
            if made or directory == default_directory():
                with suppress(OSError):  # somebody put a file of theirs there
                    os.rmdir(directory)
    finally:
        os.close(fd)


def _unusable(public: str) -> TokenwardError:
    return TokenwardError(Reason.INVALID_CONFIG, public)
