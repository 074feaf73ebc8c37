"""The values that applications get: their shape, and that they show nothing by accident."""

import copy
import json
import pickle
from datetime import UTC, datetime

import pytest

from tokenward.client.credentials import Change, Credential, Values, credential_from
from tokenward.v1 import credentials_pb2 as pb

SECRET = "hunter2-the-password"


def credential() -> Credential:
    message = pb.Credential(
        name="db", kind="leased", version=3, values={"username": "app", "password": SECRET}, stale=True
    )
    message.issued_at.FromDatetime(datetime(2030, 1, 1, tzinfo=UTC))
    message.expires_at.FromDatetime(datetime(2030, 1, 2, tzinfo=UTC))
    message.previous.version = 2
    message.previous.values["password"] = SECRET
    message.previous.retire_at.FromDatetime(datetime(2030, 1, 1, 0, 5, tzinfo=UTC))
    return credential_from(message)


def test_a_message_becomes_the_credential_that_it_says() -> None:
    made = credential()
    assert (made.name, made.kind, made.version, made.stale) == ("db", "leased", 3, True)
    assert dict(made.values) == {"username": "app", "password": SECRET}
    assert made.issued_at == datetime(2030, 1, 1, tzinfo=UTC)
    assert made.expires_at == datetime(2030, 1, 2, tzinfo=UTC)
    assert made.refresh_at is None
    assert made.previous is not None
    assert made.previous.version == 2
    assert made.previous.retire_at == datetime(2030, 1, 1, 0, 5, tzinfo=UTC)


def test_a_time_that_was_not_sent_is_none_and_not_1970() -> None:
    made = credential_from(pb.Credential(name="k", version=1))
    assert made.expires_at is None
    assert made.previous is None


def test_a_field_is_plain_text_once_it_is_asked_for() -> None:
    values = credential().values
    assert values["password"] == SECRET
    assert {**values}["password"] == SECRET
    assert sorted(values) == ["password", "username"]
    assert len(values) == 2
    assert "password" in values
    assert values.get("nothing") is None


def test_a_missing_field_names_those_that_are_there() -> None:
    with pytest.raises(KeyError, match="password, username") as raised:
        credential().values["pasword"]
    assert SECRET not in str(raised.value)


def test_no_way_of_showing_a_credential_shows_its_secrets() -> None:
    made = credential()
    for shown in (
        repr(made),
        str(made),
        f"{made}",
        f"{made.values}",
        repr(Change(name="db", credential=made)),
    ):
        assert SECRET not in shown
        assert "***" in shown


def test_values_are_not_serialized_by_accident() -> None:
    values = credential().values
    with pytest.raises(TypeError):
        json.dumps(values)  # type: ignore[arg-type, unused-ignore]  # refused is the point
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(credential())
    with pytest.raises(TypeError, match="never pickled"):
        copy.deepcopy(values)
    with pytest.raises(TypeError, match="never pickled"):
        values.__getstate__()


def test_values_are_read_only() -> None:
    values = Values({"a": "1"})
    with pytest.raises(TypeError):
        values["a"] = "2"  # type: ignore[index]  # refused is the point
    with pytest.raises(AttributeError):
        values.more = 1  # type: ignore[attr-defined]  # refused is the point


def test_credentials_are_equal_exactly_when_everything_is() -> None:
    assert credential() == credential()
    other = pb.Credential(name="db", kind="leased", version=3, values={"username": "app", "password": "other"})
    assert credential().values != credential_from(other).values
