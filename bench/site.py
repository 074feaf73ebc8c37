"""What is measured against what: one real vault, and the files of the agents and of the proxies in front of it.

Owns the vault, what is in it, and the configurations: both sides read the same secrets of the same vault and log in
with a JWT that the same key signed. Leaves running them to `servers`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from bench.records import Records
from bench.servers import Agent, BenchError, Proxy
from bench.unix_http import UnixHttp
from tokenward import config as configuration
from tokenward.clock import SystemClock
from tokenward.core.secret import Secret
from tokenward.vault import setup
from tokenward.vault.client import InlineAuth, VaultClient
from tokenward.vault.embedded import EmbeddedVault
from tokenward.vault.exchange import claims_of
from tokenward.vault.signer import Signer

SECRETS = tuple(f"s{number:04}" for number in range(1200))
"""Secrets in the vault, and credentials of the same names."""
ROTATING = "rotating"
"""One more, looked at every second."""
VALUE = "forty characters as an API key often has"

_TRUST_DOMAIN = "spiffe://bench.example"
_CONFIG = """
trust_domain = "bench.example"

[environment]
name = "bench"
vault_paths = ["bench"]

[listen]
workload_socket = "{place}/workload.sock"

[vault]
addresses = ["{vault}"]

[vault.login]
method = "jwt"
role = "tokenward"

[vault.signing]
key_file = "{key}"

[limits]
request_rate         = "100000/s"
accept_rate          = "10000/s"
connections_per_uid  = 2048
streams_per_uid      = 2048

[audit]
file = "{place}/audit.jsonl"

[workloads.bench]
selectors = ["unix:uid:{uid}"]
exchange = {{ method = "signed_jwt" }}
"""
_CREDENTIAL = """
[workloads.bench.credentials.{name}]
kind = "kv"
path = "bench/{name}"
poll = "{poll}"
"""
_PROXY = """
vault {{
  address = "{vault}"
}}
auto_auth {{
  method "jwt" {{
    config = {{
      path = "{place}/jwt"
      role = "proxy"
    }}
  }}
}}
api_proxy {{
  use_auto_auth_token = true
}}
cache {{}}
listener "unix" {{
  address = "{place}/proxy.sock"
  tls_disable = true
}}
"""
_PROXY_POLICY = """
path "bench/data/*" { capabilities = ["read"] }
path "auth/token/create" { capabilities = ["create", "update"] }
"""


class Site:
    """A vault with everything that agents and proxies need of it, while entered. `directory` is ours alone."""

    def __init__(self, *, directory: Path) -> None:
        self._directory = directory
        self._signer = _make_signer(directory / "signing.pem")
        self._vault = EmbeddedVault(directory=str(directory), audit_file=str(directory / "vault.jsonl"))
        self.vault_audit = Records(directory / "vault.jsonl")
        self.vault_socket = self._vault.address.removeprefix("unix://")
        self._connection = UnixHttp(self.vault_socket)

    def __enter__(self) -> Self:
        self._vault.start()
        try:
            self._fill()
        except BaseException:
            self._vault.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._vault.stop()

    def agent(self, name: str, credentials: Iterable[str]) -> Agent:
        """An agent that does not run yet; we are its one workload and have these credentials."""
        place = self._directory / name
        place.mkdir()
        place.joinpath("tokenward.toml").write_text(self._config(place, credentials))
        return Agent(place)

    def proxy(self, name: str, *, mode: str = "proxy") -> Proxy:
        """A proxy that does not run yet; start it at once, since the JWT that it logs in with lasts a minute."""
        place = self._directory / name
        place.mkdir()
        place.joinpath("proxy.hcl").write_text(_PROXY.format(vault=self._vault.address, place=place))
        place.joinpath("jwt").write_text(self._jwt(f"{_TRUST_DOMAIN}/proxy", {}).reveal())
        return Proxy(place, mode=mode)

    def workload_headers(self) -> dict[str, str]:
        """For reading a secret as the agent does for its workload: the login goes with the call. Good for a minute."""
        (workload,) = self._loaded(self._directory, []).workloads.values()
        jwt = self._jwt(str(workload.spiffe_id), claims_of(workload.selectors))
        return InlineAuth("auth/jwt/login", {"role": workload.exchange.role, "jwt": jwt}).headers()

    def proxy_headers(self) -> dict[str, str]:
        """For reading a secret with a token that has the proxy's rights."""
        answer = self.admin("POST", "auth/token/create", {"policies": ["proxy"]})
        return {"X-Vault-Token": answer["auth"]["client_token"]}

    def put(self, secret: str, value: str) -> None:
        """Gives a secret a new value."""
        self.admin("POST", f"bench/data/{secret}", {"data": {"api_key": value}})

    def admin(self, method: str, path: str, body: object) -> dict[str, Any]:
        """One call to the vault with all rights. Raises BenchError when it is refused."""
        headers = {"X-Vault-Token": self._vault.admin_token.reveal()}
        status, answer = self._connection.call(method, path, body, headers)
        if status >= 400:
            raise BenchError(f"the vault refused {method} {path}: {answer.get('errors')}")
        return answer

    # -- within -------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        config = self._loaded(self._directory, [*SECRETS, ROTATING])
        asyncio.run(self._set_up(setup.plan(config, public_key_pem=self._signer.public_pem())))
        self.admin("POST", "sys/policies/acl/proxy", {"policy": _PROXY_POLICY})
        role = {"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["openbao"], "token_ttl": "15m"}
        bound = {"bound_subject": f"{_TRUST_DOMAIN}/proxy", "token_policies": ["proxy"]}
        self.admin("POST", "auth/jwt/role/proxy", role | bound)
        for secret in (*SECRETS, ROTATING):
            self.put(secret, VALUE)

    async def _set_up(self, steps: setup.Plan) -> None:
        client = VaultClient(addresses=[self._vault.address])
        try:
            await setup.apply(client, self._vault.admin_token, steps)
        finally:
            await client.close()

    def _loaded(self, place: Path, credentials: Iterable[str]) -> configuration.Config:
        file = place / "set-up.toml"
        file.write_text(self._config(place, credentials))
        return configuration.load(str(file))

    def _config(self, place: Path, credentials: Iterable[str]) -> str:
        polls = ((name, "1s" if name == ROTATING else "1h") for name in credentials)
        return _CONFIG.format(
            vault=self._vault.address, place=place, key=self._directory / "signing.pem", uid=os.getuid()
        ) + "".join(_CREDENTIAL.format(name=name, poll=poll) for name, poll in polls)

    def _jwt(self, subject: str, claims: dict[str, str]) -> Secret:
        return self._signer.sign(subject=subject, audience="openbao", claims=claims, now=SystemClock().now())


def _make_signer(file: Path) -> Signer:
    """The key that agents and proxies are proved with, in `file` as the agent reads it."""
    key = ec.generate_private_key(ec.SECP256R1())
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return Signer(key=key, issuer=_TRUST_DOMAIN)
