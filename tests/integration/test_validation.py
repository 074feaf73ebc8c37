"""A database login is tried against a real PostgreSQL before it is served."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.authority import Authority, Form, ca_form, ec_key, pem
from tests.integration.tls_bao import key_pem
from tests.making import instant
from tests.postgres import Postgres
from tokenward.core.model import Issued, LeasedGrant, PostgresqlValidation
from tokenward.core.secret import Secret
from tokenward.errors import Reason, ValidationError
from tokenward.validation import Validator


@pytest.fixture
def validator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Validator]:
    for name in ("PGHOSTADDR", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    made = Validator()
    yield made
    asyncio.run(made.close())


@pytest.fixture
def role(postgres: Postgres) -> Iterator[str]:
    """A role of this test alone, with the password `right '\\ one`."""
    name = f"try-{secrets.token_hex(4)}"
    postgres.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'right ''\\ one'")
    yield name
    postgres.execute(f'DROP ROLE IF EXISTS "{name}"')


def grant(
    port: int, *, database: str = "postgres", sslmode: str = "disable", ca_file: str = "", timeout_s: float = 20.0
) -> LeasedGrant:
    wanted = PostgresqlValidation(
        host="127.0.0.1", port=port, database=database, sslmode=sslmode, ca_file=ca_file, timeout_s=timeout_s
    )
    return LeasedGrant(name="db", path="database/creds/app", validate=wanted)


def login(user: str, password: str = "right '\\ one") -> Issued:
    values = {"username": Secret(user), "password": Secret(password)}
    return Issued(values=values, issued=instant(0), expires=instant(100))


def failure_of(validator: Validator, wanted: LeasedGrant, value: Issued) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        asyncio.run(validator.check(wanted, value))
    assert caught.value.reason is Reason.VALIDATION_FAILED
    assert not str(caught.value.__context__ or "")
    return caught.value


def test_a_good_login_is_good_and_leaves_no_connection(validator: Validator, postgres: Postgres, role: str) -> None:
    asyncio.run(validator.check(grant(postgres.port), login(role)))
    give_up = time.monotonic() + 10
    while postgres.execute(f"SELECT 1 FROM pg_stat_activity WHERE usename = '{role}'"):
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_wrong_password_is_refused(
    validator: Validator, postgres: Postgres, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        got = failure_of(validator, grant(postgres.port), login(role, "wr0ng"))
    assert got.public == (
        f"PostgreSQL at 127.0.0.1:{postgres.port}/postgres refused the new login: password or role not accepted,"
        " SQLSTATE 28P01"
    )
    assert got.refused
    assert "wr0ng" not in caplog.text
    assert "authentication failed" not in caplog.text


def test_a_role_that_was_dropped_is_refused(validator: Validator, postgres: Postgres, role: str) -> None:
    asyncio.run(validator.check(grant(postgres.port), login(role)))
    postgres.execute(f'DROP ROLE "{role}"')
    assert failure_of(validator, grant(postgres.port), login(role)).refused


@pytest.mark.parametrize(
    ("change", "database", "told", "refused"),
    [
        ("NOLOGIN", "postgres", "role not accepted, SQLSTATE 28000", True),
        ("LOGIN", "no-such", "no such database, SQLSTATE 3D000", True),
        ("CONNECTION LIMIT 0", "postgres", "could not be asked about the new login: it is full, SQLSTATE 53300", False),
    ],
)
def test_other_refusals_are_told_apart(
    validator: Validator, postgres: Postgres, role: str, change: str, database: str, told: str, refused: bool
) -> None:
    postgres.execute(f'ALTER ROLE "{role}" {change}')
    got = failure_of(validator, grant(postgres.port, database=database), login(role))
    assert got.public.endswith(told)
    assert got.refused == refused


def test_a_password_of_the_environment_is_not_tried(
    validator: Validator, postgres: Postgres, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "right '\\ one")
    monkeypatch.setenv("PGUSER", role)
    for value in (login(role, ""), login("")):
        assert "cannot be tried" in failure_of(validator, grant(postgres.port), value).public
    assert failure_of(validator, grant(postgres.port), login(role, "other")).refused


def test_a_server_without_tls_hears_no_login(validator: Validator, postgres: Postgres, role: str) -> None:
    got = failure_of(validator, grant(postgres.port, sslmode="verify-full", ca_file="/nowhere/ca.pem"), login(role))
    assert got.public.endswith("could not be asked about the new login: it speaks no TLS")
    assert not got.refused


def test_a_server_that_is_away_is_not_a_refusal(validator: Validator) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        got = failure_of(validator, grant(free.getsockname()[1]), login("a"))
    assert got.public.endswith("it cannot be reached (Connection refused)")
    assert not got.refused


def test_a_server_that_says_nothing_is_given_up_in_time(validator: Validator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        got = failure_of(validator, grant(silent.getsockname()[1], timeout_s=0.3), login("a"))
        assert time.monotonic() - begun < 1.5
    assert got.public.endswith("it took too long")


# -- TLS: the tests' PostgreSQL is built without it -------------------------------------------------------------------


class TlsServer:
    """Says yes to TLS as PostgreSQL does, and keeps what comes after the handshake."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(20)
        self.port = int(self._listener.getsockname()[1])
        self.heard = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(20)
            assert connection.recv(8) == bytes.fromhex("00000008 04d2162f")  # SSLRequest
            connection.sendall(b"S")
            try:
                with self._context.wrap_socket(connection, server_side=True) as secured:
                    self.heard = secured.recv(1000)
                    text = b"SFATAL\0C57P03\0Mthe database system is starting up\0\0"
                    secured.sendall(b"E" + (len(text) + 4).to_bytes(4) + text)
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()
        self._thread.join()


@contextmanager
def tls_server(authority: Authority, directory: Path) -> Iterator[TlsServer]:
    """Its certificate has no name, but is signed by the authority."""
    key = ec_key()
    form = Form(common_name="db", begins=time.time() - 60, ends=time.time() + 3600)
    (directory / "db.pem").write_text(pem(authority.sign(form, key.public_key())))
    (directory / "db.key").write_text(key_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "db.pem", directory / "db.key")
    server = TlsServer(context)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize(
    ("sslmode", "own_ca", "told"),
    [
        ("verify-full", True, "it showed a TLS certificate of another name"),
        ("verify-full", False, "it showed a TLS certificate that is not trusted: check ca_file"),
        ("verify-ca", False, "it showed a TLS certificate that is not trusted: check ca_file"),
        ("verify-ca", True, "it is starting, stopping or recovering, SQLSTATE 57P03"),
    ],
)
def test_a_certificate_is_verified_before_anything_is_said(
    validator: Validator, tmp_path: Path, sslmode: str, own_ca: bool, told: str
) -> None:
    authority, other = (Authority.root(ca_form(name, now=time.time())) for name in ("database CA", "another CA"))
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text(pem((authority if own_ca else other).certificate))
    with tls_server(authority, tmp_path) as server:
        got = failure_of(validator, grant(server.port, sslmode=sslmode, ca_file=str(ca_file)), login("someone"))
    assert got.public.endswith(told)
    assert (b"someone" in server.heard) == (sslmode == "verify-ca" and own_ca)
