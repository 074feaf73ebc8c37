"""A site: a real vault that was there before the agent, a real PostgreSQL behind it, and the files of one agent."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psycopg

from tests.agents import TOKENWARD, Process
from tests.openbao import Bao
from tests.postgres import Postgres
from tokenward.vault.client import VaultClient, VaultRequest
from tokenward.vault.keeper import NoData

CONFIG = """
trust_domain = "test.example"

[environment]
name = "test"
vault_paths = ["tests", "database/creds", "nowhere"]

[listen]
workload_socket = "{directory}/workload.sock"
admin_socket = "{directory}/admin/admin.sock"

[vault]
addresses = ["{vault}"]

[vault.login]
method = "jwt"
role = "tokenward"

[vault.signing]
key_file = "{directory}/signing.pem"

[audit]
file = "{directory}/audit.jsonl"

[leases]

[state]
file = "{directory}/state.json"

[policies.short]
overlap = "{overlap}"
max_ttl = "{max_ttl}"

[workloads.connector]
selectors = ["unix:uid:{uid}"]
exchange = {{ method = "signed_jwt" }}

[workloads.connector.credentials.api]
kind = "kv"
path = "tests/api"
poll = "1s"

[workloads.connector.credentials.cold]
kind = "kv"
path = "tests/cold"

[workloads.connector.credentials.missing]
kind = "kv"
path = "tests/missing"

[workloads.connector.credentials.db]
kind = "leased"
path = "database/creds/app"
policy = "short"
"""

CREATE = """CREATE ROLE "{{name}}" WITH LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';"""
REVOKE = [
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename='{{name}}';",
    'DROP ROLE IF EXISTS "{{name}}";',
]


class Site:
    """A vault with a database engine, a PostgreSQL behind it, and the files of one agent."""

    def __init__(
        self, directory: Path, vault: Bao, postgres: Postgres, *, max_ttl: str = "60s", overlap: str = "30s"
    ) -> None:
        self.directory = directory
        (directory / "admin").mkdir(mode=0o700)
        self.vault = vault
        self.postgres = postgres
        self.config = directory / "tokenward.toml"
        self.socket = str(directory / "workload.sock")
        self.config.write_text(
            CONFIG.format(directory=directory, vault=vault.address, uid=os.getuid(), max_ttl=max_ttl, overlap=overlap)
        )
        subprocess.run(
            ["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", str(directory / "signing.pem")],
            check=True,
        )

    async def admin(self, method: str, path: str, body: Mapping[str, object] | None = None) -> None:
        """One call with all rights."""
        client = VaultClient(addresses=[self.vault.address])
        try:
            await client.call(VaultRequest(method, path, body), into=NoData, auth=self.vault.admin_token)
        finally:
            await client.close()

    def vault_setup(self, *arguments: str) -> str:
        """`tokenward vault-setup` for this configuration, with the administrator's token on stdin."""
        done = subprocess.run(
            [TOKENWARD, "vault-setup", "--config", str(self.config), *arguments],
            input=self.vault.admin_token.reveal(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def agent(self) -> Process:
        return Process("run", "--config", str(self.config))

    def logins(self) -> set[str]:
        """The logins that the vault made in PostgreSQL and that are still there."""
        with psycopg.connect(self.postgres.url()) as connection:
            rows = connection.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'v-%'").fetchall()
        return {row[0] for row in rows}

    def audit(self) -> list[dict[str, object]]:
        return [json.loads(line)["record"] for line in (self.directory / "audit.jsonl").read_text().splitlines()]


async def prepared(
    directory: Path, vault: Bao, postgres: Postgres, *, max_ttl: str = "60s", ttl: str = "60s", overlap: str = "30s"
) -> Site:
    site = Site(directory, vault, postgres, max_ttl=max_ttl, overlap=overlap)
    applied = site.vault_setup("--apply", "--token-file", "-")
    assert "created" in applied
    await site.admin("POST", "tests/data/api", {"data": {"api_key": "first", "retries": 3}})
    await site.admin("POST", "tests/data/cold", {"data": {"token": "cold"}})
    await site.admin("POST", "sys/mounts/database", {"type": "database"})
    await site.admin(
        "POST",
        "database/config/pg",
        {
            "plugin_name": "postgresql-database-plugin",
            "allowed_roles": ["app"],
            "connection_url": f"postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{postgres.port}/postgres",
            "username": postgres.superuser,
            "password": postgres.password,
            "password_authentication": "scram-sha-256",
        },
    )
    role: dict[str, object] = {"db_name": "pg", "default_ttl": ttl, "max_ttl": max_ttl, "creation_statements": [CREATE]}
    await site.admin("POST", "database/roles/app", role | {"revocation_statements": REVOKE})
    return site


def until(condition: Callable[[], bool], what: str, within_s: float = 20.0) -> None:
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, f"not within {within_s} s: {what}"
        time.sleep(0.02)
