"""A login is tried: which values go to PostgreSQL at all, and what stands in the way of a check."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest

from tests.making import instant, kv_grant
from tokenward.core.model import HttpValidation, Issued, LeasedGrant, PostgresqlValidation, Template
from tokenward.core.secret import Secret
from tokenward.errors import ValidationError
from tokenward.validation import Validator

NOBODY = LeasedGrant(
    name="db",
    path="database/creds/app",
    validate=PostgresqlValidation(host="127.0.0.1", port=1, database="app", sslmode="disable"),
)


@pytest.fixture
def validator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Validator]:
    for name in ("PGHOSTADDR", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    made = Validator()
    yield made
    asyncio.run(made.close())


def failure_of(validator: Validator, **values: str) -> str:
    secrets = {name: Secret(text) for name, text in values.items()}
    issued = Issued(values=secrets, issued=instant(0), expires=instant(100))
    with pytest.raises(ValidationError) as caught:
        asyncio.run(validator.check(NOBODY, issued))
    assert caught.value.__cause__ is caught.value.__context__ is None
    return caught.value.public


@pytest.mark.parametrize("text", ["", "a\0b", "\ud800"])
@pytest.mark.parametrize("name", ["username", "password"])
def test_a_field_that_libpq_would_read_otherwise_is_refused(validator: Validator, name: str, text: str) -> None:
    values = {"username": "u", "password": "p", name: text}
    assert failure_of(validator, **values).endswith(f"it needs a field {name!r} that is text and not empty")


@pytest.mark.parametrize("name", ["username", "password"])
def test_a_field_that_the_value_lacks_is_named(validator: Validator, name: str) -> None:
    values = {"username": "u", "password": "p"}
    del values[name]
    assert f"it needs a field {name!r}" in failure_of(validator, **values)


def test_nobody_there_is_told(validator: Validator) -> None:
    assert failure_of(validator, username="u", password="p") == (
        "PostgreSQL at 127.0.0.1:1/app could not be asked about the new login: it cannot be reached (Connection"
        " refused)"
    )


def test_only_a_check_by_postgresql_needs_psycopg(validator: Validator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as where it is not installed
    http = HttpValidation(url="https://partner.example", value=Template(("", ""), ("api_key",)))
    assert validator.missing([kv_grant(), LeasedGrant(name="a", path="b/c", validate=http)]) == ()
    told = "a check by PostgreSQL needs psycopg: pip install 'tokenward[postgresql]'"
    assert validator.missing([kv_grant(), NOBODY]) == (told,)
    assert failure_of(validator, username="u", password="p") == told


@pytest.mark.parametrize("name", ["PGHOSTADDR", "PGSERVICE"])
def test_a_variable_that_would_lead_elsewhere_is_told(
    validator: Validator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert validator.missing([NOBODY]) == ()
    monkeypatch.setenv(name, "192.0.2.1")
    told = f"unset {name}: it would lead a check by PostgreSQL elsewhere"
    assert validator.missing([NOBODY]) == (told,)
    assert failure_of(validator, username="u", password="p") == told
