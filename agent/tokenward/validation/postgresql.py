"""Tries a database login: a connection to PostgreSQL with the value's `username` and `password`, and nothing more.

Owns what libpq is told, so that nothing comes from its environment or its files, and what a failure means. psycopg
brings libpq and is imported at first use: most agents have no such check. Invariant: the server's certificate is
verified before it hears anything, unless the configuration has it on this very host.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokenward.core.model import PostgresqlValidation
from tokenward.core.secret import Secret
from tokenward.errors import ValidationError

if TYPE_CHECKING:
    import psycopg

_Known = tuple[tuple[re.Pattern[str], str], ...]
"""What to look for in a text, and our own words for it."""

_USER, _PASSWORD = "username", "password"
_EXTRA = "a check by PostgreSQL needs psycopg: pip install 'tokenward[postgresql]'"
_REDIRECTING = ("PGHOSTADDR", "PGSERVICE")
"""Variables with which libpq would go elsewhere, and that no parameter can overrule."""

# psycopg logs what the server said; nothing that a far end says is written to our log.
logging.getLogger("psycopg").setLevel(logging.CRITICAL)

_FATAL = re.compile(r"FATAL:  (.*)")
# A server's words, which libpq does not give the SQLSTATE of while connecting: known ones become words of ours.
_REFUSALS: _Known = (
    (re.compile(r"(\w+|SASL) authentication failed"), "password or role not accepted, SQLSTATE 28P01"),
    (re.compile(r'role ".*" (does not exist|is not permitted to log in)'), "role not accepted, SQLSTATE 28000"),
    (re.compile(r"(no pg_hba\.conf entry|pg_hba\.conf rejects)"), "not allowed from this host, SQLSTATE 28000"),
    (re.compile(r'database ".*" does not exist'), "no such database, SQLSTATE 3D000"),
    (re.compile(r"permission denied for database"), "no right to connect to this database, SQLSTATE 42501"),
)
_NOT_NOW: _Known = (
    (re.compile(r"(sorry, )?too many (clients|connections)|remaining connection slots"), "full, SQLSTATE 53300"),
    (re.compile(r"the database system is"), "starting, stopping or recovering, SQLSTATE 57P03"),
)
# libpq's and psycopg's own words.
_UNREACHED: _Known = (
    (re.compile(r"server does not support SSL"), "speaks no TLS"),
    (re.compile(r"root certificate file"), "cannot be verified (ca_file cannot be read)"),
    (re.compile(r"certificate verify failed"), "showed a TLS certificate that is not trusted: check ca_file"),
    (re.compile(r"server certificate for .* does not match"), "showed a TLS certificate of another name"),
    (re.compile(r"SSL (error|SYSCALL)"), "failed in TLS"),
    (re.compile(r"failed to resolve host"), "has a name that cannot be resolved"),
    (re.compile(r"timeout expired"), "took too long"),
    (re.compile(r"Connection refused"), "cannot be reached (Connection refused)"),
    (re.compile(r"No such file or directory"), "cannot be reached (no socket there)"),
    (re.compile(r""), "cannot be reached, or broke off"),
)


def check(wanted: PostgresqlValidation, values: Mapping[str, Secret]) -> None:
    """Returns when the value logs in. Blocks. Raises ValidationError."""
    user, password = _field(values, _USER), _field(values, _PASSWORD)
    obstacles = missing()
    if obstacles:
        raise ValidationError("; ".join(obstacles))
    failure = _log_in(wanted, user, password)
    if failure is not None:
        raise failure


def missing() -> tuple[str, ...]:
    """What stands in the way of any such check, one sentence each. Imports psycopg."""
    found = [
        f"unset {name}: it would lead a check by PostgreSQL elsewhere" for name in _REDIRECTING if name in os.environ
    ]
    try:
        importlib.import_module("psycopg")
    except ImportError:  # of psycopg itself, or of libpq, which it looks for
        found.append(_EXTRA)
    return tuple(found)


def where(wanted: PostgresqlValidation) -> str:
    """Host, port and database."""
    host = f"[{wanted.host}]" if ":" in wanted.host else wanted.host
    return f"PostgreSQL at {host}:{wanted.port}/{wanted.database}"


def _field(values: Mapping[str, Secret], name: str) -> str:
    """The field's text. Empty, libpq would look for one in its environment; with a zero byte, send a part of it."""
    text = values[name].reveal() if name in values else ""
    if not text or "\0" in text or not _is_utf8(text):
        why = f"it needs a field {name!r} that is text and not empty"
        raise ValidationError(f"the new value cannot be tried: {why}", refused=True)
    return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _log_in(wanted: PostgresqlValidation, user: str, password: str) -> ValidationError | None:
    """Connects and hangs up; the error to raise where that failed. Returned, so that libpq's text is not its cause."""
    import psycopg  # noqa: PLC0415 -- few agents need it

    try:
        psycopg.connect(
            host=wanted.host,
            port=wanted.port,
            dbname=wanted.database,
            user=user,
            password=password,
            sslmode=wanted.sslmode,
            sslrootcert=wanted.ca_file or None,
            gssencmode="disable",
            target_session_attrs="any",
            connect_timeout=math.ceil(wanted.timeout_s),  # for one address, two seconds at least; `Validator` has ours
            client_encoding="UTF8",
            application_name="tokenward",
        ).close()
    except psycopg.Error as error:
        return _failure(wanted, error)
    return None


def _failure(wanted: PostgresqlValidation, error: psycopg.Error) -> ValidationError:
    text = str(error)
    said = _FATAL.search(text)
    if said is None:
        return _unasked(wanted, _known(_UNREACHED, text))
    not_now, refusal = _known(_NOT_NOW, said[1]), _known(_REFUSALS, said[1])
    if not_now:
        return _unasked(wanted, f"is {not_now}")
    if not refusal and not (error.pgconn and error.pgconn.used_password):
        return _unasked(wanted, "ended the connection before the login; its log says why")
    text = f"{where(wanted)} refused the new login: {refusal or 'its log says why'}"
    return ValidationError(text, refused=True)


def _unasked(wanted: PostgresqlValidation, why: str) -> ValidationError:
    return ValidationError(f"{where(wanted)} could not be asked about the new login: it {why}")


def _known(table: _Known, text: str) -> str:
    return next((ours for pattern, ours in table if pattern.search(text)), "")
