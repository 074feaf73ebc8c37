"""`Secret`: whatever is done to it but `.reveal()`, the value does not show."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import msgspec
import pytest

from tests.making import instant, issued
from tokenward.core.handover import Held, State
from tokenward.core.model import Issued, Key, Lease, Served, VaultToken, Version
from tokenward.core.secret import Secret
from tokenward.errors import ConfigError, Problem, Reason, TokenwardError, ValidationError, VaultBadReplyError
from tokenward.vault import reply as replies
from tokenward.vault.addresses import Outgoing
from tokenward.vault.client import InlineAuth, VaultRequest
from tokenward.vault.reply import AuthReply, Reply, WrapInfo
from tokenward.vault.signer import Signer

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


def test_it_does_not_hand_out_its_state() -> None:
    """`copyreg`, and whoever copies objects by himself, ask for it."""
    with pytest.raises(TypeError, match="never pickled"):
        Secret(VALUE).__getstate__()
    with pytest.raises(TypeError, match="never pickled"):
        Secret(VALUE).__reduce_ex__(2)


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


# -- what holds secrets -----------------------------------------------------------------------------------------------


def token() -> VaultToken:
    return VaultToken(token=Secret(VALUE), accessor="accessor", expires_mono=None, renewable=True)


def leased() -> Issued:
    return replace(issued(value=VALUE), lease=Lease(token=token(), lease_id="database/creds/app/1"))


def version() -> Version:
    return Version(
        number=1, issued=leased(), since=instant(0), draw=0.5, due=instant(60), fingerprint="0123456789abcdef"
    )


def state() -> State:
    held = Held(key=Key("app", "db"), grant_digest="d", current=version(), used_mono=0.0)
    pending = ((Key("app", "old"), issued(value=VALUE)),)
    return State(credentials=(held,), numbers={}, pending=pending, fingerprint_key=VALUE.encode(), written=instant(0))


HOLDERS: dict[str, Callable[[], object]] = {
    "Issued": leased,
    "Lease": lambda: leased().lease,
    "Version": version,
    "Served": lambda: Served(key=Key("app", "db"), kind="leased", current=version(), previous=version()),
    "VaultToken": token,
    "State, handed over": state,
    "VaultRequest": lambda: VaultRequest("POST", "auth/jwt/login", {"role": "a", "jwt": Secret(VALUE)}),
    "InlineAuth": lambda: InlineAuth("auth/jwt/login", {"role": "a", "jwt": Secret(VALUE)}),
    "AuthReply": lambda: AuthReply(client_token=Secret(VALUE), lease_duration=60),
    "Reply": lambda: Reply(wrap_info=WrapInfo(token=Secret(VALUE), ttl=60)),
}


def traceback_of(held: object) -> str:
    try:
        raise ValueError(held)
    except ValueError as error:
        return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


TEXTS: dict[str, Callable[[object], str]] = {
    "repr": repr,
    "str": str,
    "format": format,
    "in a list": lambda held: f"{[held]}",
    "in an exception": lambda held: repr(ValueError(held)),
    "in a traceback": traceback_of,
}
COPIES: dict[str, Callable[[object], object]] = {
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "vars": vars,
    "asdict": asdict,  # type: ignore[dict-item]
    "json": lambda held: json.dumps(held, default=vars),
    "msgspec": msgspec.json.encode,
    "msgspec to builtins": msgspec.to_builtins,
}


@pytest.mark.parametrize("show", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_no_text_of_what_holds_it_shows_the_value(make: Callable[[], object], show: Callable[[object], str]) -> None:
    assert VALUE not in show(make())


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_nothing_writes_out_what_holds_it(make: Callable[[], object], duplicate: Callable[[object], object]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        duplicate(make())
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize("show", TEXTS.values(), ids=TEXTS)
def test_a_request_on_its_way_shows_neither_who_asks_nor_what(show: Callable[[object], str]) -> None:
    """Here the secret is plain text: it is made on the thread that sends it, and goes nowhere else."""
    body, headers = VALUE.encode(), {"X-Vault-Token": VALUE}
    made = Outgoing(method="POST", path="a/b", query={}, headers=headers, body=body, repeatable=True)
    assert VALUE not in show(made).replace(f"body = {body!r}", "").replace(f"headers = {headers!r}", "")


def test_a_signer_gives_nothing_of_its_key() -> None:
    signer = Signer.generate(issuer="https://agent")
    assert "PRIVATE" not in repr(signer) + str(vars(signer))
    for duplicate in (pickle.dumps, json.dumps):
        with pytest.raises(TypeError):
            duplicate(signer)


# -- errors -----------------------------------------------------------------------------------------------------------


def _every_class(root: type[TokenwardError]) -> list[type[TokenwardError]]:
    return [root, *(below for each in root.__subclasses__() for below in _every_class(each))]


def _made(kind: type[TokenwardError], text: str) -> TokenwardError:
    try:
        return kind(Reason.INTERNAL, text)
    except TypeError:  # one that has its own reason
        return kind((Problem("f", 1, "k", text),)) if kind is ConfigError else kind(text)  # type: ignore[arg-type,call-arg]


@pytest.mark.parametrize("kind", _every_class(TokenwardError), ids=lambda kind: kind.__name__)
def test_an_error_about_a_secret_shows_it_nowhere(kind: type[TokenwardError]) -> None:
    error = _made(kind, f"refused {Secret(VALUE)} of {version()}")
    told = repr(error) + str(error) + str(vars(error)) + repr(error.args) + traceback_of(error)
    assert "Secret(***)" in told
    assert VALUE not in told


def test_every_error_there_is_was_looked_at() -> None:
    assert {ConfigError, ValidationError, VaultBadReplyError} < set(_every_class(TokenwardError))


class _Wanted(msgspec.Struct):
    password: Secret


@pytest.mark.parametrize(
    "body",
    [
        f'{{"data": {{"password": ["{VALUE}"]}}}}',
        f'{{"data": "{VALUE}"}}',
        f'{{"data": {{"password": "{VALUE}"',
        f'{{"auth": {{"client_token": "{VALUE}", "lease_duration": "{VALUE}"}}}}',
        VALUE,
    ],
)
def test_a_reply_that_cannot_be_used_is_not_quoted(body: str) -> None:
    for data in (body.encode(), body.encode() + b"\xff"):
        with pytest.raises(VaultBadReplyError) as caught:
            replies.decode(data, _Wanted)
        assert VALUE not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 503])
def test_nor_is_a_refusal_with_a_secret_in_it(status: int) -> None:
    body = json.dumps({"errors": [f"no such token {VALUE}"], "data": {"password": VALUE}}).encode()
    error = replies.error_of(status, body, what="GET a/b", retry_after_s=None)
    assert VALUE not in "".join(traceback.format_exception(error)) + str(vars(error)) + repr(error.__cause__)


def test_nor_is_a_key_that_cannot_be_read() -> None:
    pem = f"-----BEGIN PRIVATE KEY-----\n{VALUE}\n-----END PRIVATE KEY-----\n".encode()
    with pytest.raises(ValueError, match="expected an unencrypted private key") as caught:
        Signer.from_pem(pem, issuer="https://agent")
    assert VALUE not in "".join(traceback.format_exception(caught.value))
