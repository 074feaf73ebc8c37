"""`Secret`: whatever is done to it but `.reveal()`, the value does not show."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tokenward.core.secret import Secret

VALUE = "hunter2-5f3a"


def test_reveal_is_the_way_out() -> None:
    assert Secret(VALUE).reveal() == VALUE


@dataclass(frozen=True)
class Holder:
    name: str
    secret: Secret


SHOWN: dict[str, Callable[[Secret], str]] = {
    "repr": repr,
    "str": str,
    "f-string": lambda secret: f"{secret}",
    "f-string with !r": lambda secret: f"{secret!r}",
    "f-string with a width": lambda secret: f"{secret:>40}",
    "format()": lambda secret: format(secret, "^30"),
    "str.format": "{}".format,
    "percent": lambda secret: "%s %r %a" % (secret, secret, secret),  # noqa: UP031 -- the form under test
    "in a list": lambda secret: str([secret]),
    "in a dict": lambda secret: str({"password": secret}),
    "in a dataclass": lambda secret: repr(Holder("db", secret)),
    "in an exception": lambda secret: repr(ValueError("bad", secret)) + str(ValueError(secret)),
    "dir": lambda secret: " ".join(dir(secret)),
}


@pytest.mark.parametrize("show", SHOWN.values(), ids=SHOWN)
def test_no_text_of_it_shows_the_value(show: Callable[[Secret], str]) -> None:
    assert VALUE not in show(Secret(VALUE))


def test_its_text_says_that_it_is_a_secret() -> None:
    assert str(Secret(VALUE)) == repr(Secret(VALUE)) == "Secret(***)"
    assert f"{Secret(VALUE):>15}" == "    Secret(***)"


def test_its_text_does_not_tell_the_length() -> None:
    assert str(Secret("")) == str(Secret("x" * 1000))


def test_a_log_line_does_not_show_the_value(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").warning("login with %s failed: %r", Secret(VALUE), {"password": Secret(VALUE)})
    assert "Secret(***)" in caplog.text
    assert VALUE not in caplog.text


def test_a_traceback_with_local_values_does_not_show_the_value() -> None:
    def login(password: Secret) -> None:
        raise ValueError(f"no login with {password}")

    try:
        login(Secret(VALUE))
    except ValueError as error:
        told = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "password = Secret(***)" in told
    assert VALUE not in told


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_cannot_be_pickled(protocol: int) -> None:
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(Secret(VALUE), protocol)
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps([{"password": Secret(VALUE)}], protocol)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_it_cannot_be_copied(duplicate: Callable[[Secret], Secret]) -> None:
    with pytest.raises(TypeError):
        duplicate(Secret(VALUE))


def test_it_cannot_be_written_as_json() -> None:
    with pytest.raises(TypeError):
        json.dumps({"password": Secret(VALUE)})


def test_it_has_no_dict_to_look_into() -> None:
    with pytest.raises(TypeError):
        vars(Secret(VALUE))


def test_two_of_one_value_are_equal() -> None:
    assert Secret(VALUE) == Secret(VALUE)
    assert Secret(VALUE) != Secret(VALUE + "x")
    assert Secret("ключ") == Secret("ключ")


def test_it_is_not_equal_to_its_text() -> None:
    """A comparison with a plain text would be an invitation to keep secrets as plain texts."""
    assert Secret(VALUE) != VALUE
    assert Secret(VALUE) != None  # noqa: E711 -- the comparison under test
    assert not Secret(VALUE) == VALUE  # noqa: SIM201 -- __eq__, not __ne__, is under test


def test_it_cannot_be_hashed() -> None:
    """A hash of a short secret could be guessed, and sets and dict keys would keep secrets about."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(Secret(VALUE))
