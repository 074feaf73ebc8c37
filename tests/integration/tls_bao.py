"""An OpenBao that listens with TLS beside its Unix socket, and an administrator's hand to set it up."""

from __future__ import annotations

import ipaddress
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.fakes.authority import AnyKey, Authority, Form, ca_form, ec_key, pem
from tests.openbao import Bao
from tokenward.core.model import Instant
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.keeper import NoData


class TlsBao(Bao):
    """Listens at `tls_address` with a certificate for 127.0.0.1 that `ca_file` trusts; `other_ca_file` does not."""

    def __init__(self, *, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.root(ca_form("vault CA", now=time.time()))
        self.ca_file = self.write("ca.pem", pem(self.authority.certificate))
        other = Authority.root(ca_form("another CA", now=time.time()))
        self.other_ca_file = self.write("other-ca.pem", pem(other.certificate))
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        cert_file, key_file = self.issue("server", names=(address,), common_name="vault")
        self._port = _free_port()
        self.tls_address = f"https://127.0.0.1:{self._port}"
        super().__init__(
            directory=directory,
            extra_config=f'listener "tcp" {{\n  address = "127.0.0.1:{self._port}"\n'
            f'  tls_cert_file = "{cert_file}"\n  tls_key_file = "{key_file}"\n}}\n',
        )

    @property
    def address_by_name(self) -> str:
        """The same listener under a name that its certificate does not have."""
        return f"https://localhost:{self._port}"

    def issue(self, name: str, *, names: tuple[x509.GeneralName, ...] = (), common_name: str = "") -> tuple[str, str]:
        """Paths of a new certificate of the CA and of its key."""
        key = ec_key()
        form = Form(common_name=common_name, names=names, begins=time.time() - 60, ends=time.time() + 3600)
        cert_file = self.write(f"{name}.pem", pem(self.authority.sign(form, key.public_key())))
        return cert_file, self.write(f"{name}.key", key_pem(key))

    def write(self, name: str, content: str) -> str:
        path = self.directory / name
        path.write_text(content)
        return str(path)

    async def admin(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, namespace: str = ""
    ) -> dict[str, Any]:
        """What the administrator's call answers; empty where it answers nothing."""
        client = VaultClient(addresses=[self.address], namespace=namespace, timeout_s=10.0, threads=1)
        try:
            reply = await client.call(VaultRequest(method, path, body), into=NoData, auth=self.admin_token)
        finally:
            await client.close()
        return reply.data or {}

    async def enable_kv(self, mount: str = "secret", *, namespace: str = "", **fields: str) -> None:
        """A KV engine with `fields` in its secret `a`, and the policy `reader` that may read it."""
        kv = {"type": "kv", "options": {"version": "2"}}
        await self.admin("POST", f"sys/mounts/{mount}", kv, namespace=namespace)
        await self.admin("POST", f"{mount}/data/a", {"data": fields or {"k": "v"}}, namespace=namespace)
        policy = f'path "{mount}/data/*" {{ capabilities = ["read"] }}'
        await self.admin("POST", "sys/policies/acl/reader", {"policy": policy}, namespace=namespace)


@contextmanager
def running() -> Iterator[TlsBao]:
    """One such vault, in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="tokenward-tls-") as directory, TlsBao(directory=Path(directory)) as made:
        yield made


def key_pem(key: AnyKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def now() -> Instant:
    return Instant(time.time(), time.monotonic())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
