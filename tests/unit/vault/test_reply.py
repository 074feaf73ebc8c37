"""What a vault's answer becomes: typed values, or errors of ours that quote nothing."""

from __future__ import annotations

import json
from typing import Literal

import msgspec
import pytest

from tests.making import instant
from tokenward.core.secret import Secret
from tokenward.errors import NotFoundError, Reason, TokenwardError, VaultBadReplyError, VaultDeniedError
from tokenward.vault import reply as replies
from tokenward.vault.reply import LOGIN_REFUSALS, Refusal, decode, error_of, not_serving, refusal_of, seconds_of


class Login(msgspec.Struct):
    username: str
    password: Secret


class Choice(msgspec.Struct):
    colour: Literal["red"]


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def errors(*texts: str) -> bytes:
    return body(errors=list(texts))


def denied(status: int, *texts: str) -> TokenwardError:
    return error_of(status, errors(*texts), what="GET a/b", retry_after_s=None)


def test_data_is_decoded_into_the_struct_asked_for_with_its_secrets_wrapped() -> None:
    made = decode(body(request_id="r", data={"username": "u", "password": "p4ss"}, lease_duration=30), Login)
    assert (made.request_id, made.lease_duration, made.require_data().username) == ("r", 30, "u")
    assert made.require_data().password == Secret("p4ss")
    assert "p4ss" not in repr(made)


def test_an_empty_body_is_an_empty_reply_and_asking_for_its_content_is_refused() -> None:
    made = decode(b"", Login)
    with pytest.raises(VaultBadReplyError, match="no data"):
        made.require_data()
    with pytest.raises(VaultBadReplyError, match="no usable token"):
        made.require_auth()


@pytest.mark.parametrize(
    ("sent", "place"),
    [
        (body(data={"username": "u", "password": 5}), r"\$\.data\.password"),
        (body(data={"username": "u"}), "lacks `password`"),
        (body(data=["s3cret"]), r"\$\.data"),
        (body(data={"username": "u", "password": "s3cret"}, lease_duration=-1), r"\$\.lease_duration"),
        (body(data={"username": "u", "password": "s3cret"}, renewable="yes"), r"\$\.renewable"),
        (b'{"data": "s3cret', "not JSON"),
        (b'{"request_id": "\xff\xfe"}', "not JSON"),
        (b'{"other": ' + b"[" * 100_000, "not JSON"),
    ],
)
def test_a_body_of_another_form_is_refused_naming_the_place_and_not_the_content(sent: bytes, place: str) -> None:
    with pytest.raises(VaultBadReplyError, match=place) as caught:
        decode(sent, Login)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_value_that_the_decoder_would_quote_is_not_quoted() -> None:
    with pytest.raises(VaultBadReplyError, match=r"\$\.data\.colour") as caught:
        decode(body(data={"colour": "s3cret"}), Choice)
    assert "s3cret" not in str(caught.value)


def test_a_tokens_life_counts_from_before_the_request_was_sent_and_zero_is_for_ever() -> None:
    auth = {"client_token": "s.a", "accessor": "acc", "lease_duration": 30, "renewable": True}
    held = decode(body(auth=auth), dict).require_auth().held_from(instant(100))
    assert (held.expires_mono, held.accessor, held.renewable) == (130, "acc", True)
    assert (
        decode(body(auth=auth | {"lease_duration": 0}), dict).require_auth().held_from(instant(100)).expires_mono
        is None
    )


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "x" * 70_000])
def test_a_token_that_no_header_could_carry_is_a_bad_reply(token: str) -> None:
    made = decode(body(auth={"client_token": token, "lease_duration": 1}), dict)
    with pytest.raises(VaultBadReplyError, match="no usable token"):
        made.require_auth()


@pytest.mark.parametrize(
    ("status", "text", "refusal"),
    [
        (403, "permission denied", Refusal.BAD_TOKEN),
        (403, "1 error occurred:\n\t* permission denied\n\n", Refusal.POLICY),
        (400, 'role "x" could not be found', Refusal.LOGIN_ROLE),
        (400, "unknown role: x", Refusal.NO_ROLE),
        (400, "error validating token: invalid expiration time (exp) claim: token is expired", Refusal.LOGIN_TIME),
        (400, "error validating token: something new", Refusal.LOGIN),
        (400, 'error validating claims: claim "unix_uid" is missing', Refusal.LOGIN_CLAIMS),
        (400, "lease not found", Refusal.LEASE_GONE),
        (400, "check-and-set parameter did not match the current version", Refusal.CAS_MISMATCH),
        (500, "missing name in alias", Refusal.NO_COMMON_NAME),
    ],
)
def test_a_refusal_that_is_known_says_what_to_do_and_can_be_asked_for(status: int, text: str, refusal: Refusal) -> None:
    error = denied(status, text)
    assert isinstance(error, VaultDeniedError)
    assert error.reason is Reason.VAULT_DENIED
    assert refusal_of(error) is refusal
    assert refusal in error.public


@pytest.mark.parametrize("status", [400, 403, 404, 405, 429, 500, 502])
def test_no_text_of_the_vaults_gets_into_an_error(status: int) -> None:
    error = denied(status, "pq: password s3cret is wrong")
    chain = [error, error.__cause__, error.__context__]
    assert not any("s3cret" in repr(each) + str(each) for each in chain)


def test_login_refusals_are_told_from_those_of_engines() -> None:
    assert Refusal.LOGIN_ROLE in LOGIN_REFUSALS
    assert Refusal.NO_ROLE not in LOGIN_REFUSALS


def test_a_deleted_version_is_told_from_a_secret_that_never_was() -> None:
    metadata = {"deletion_time": "2026-01-01T00:00:00Z", "destroyed": False}
    gone = error_of(404, body(data={"data": None, "metadata": metadata}), what="GET a", retry_after_s=None)
    never = error_of(404, errors(), what="GET a", retry_after_s=None)
    unmounted = error_of(404, errors('no handler for route "a"'), what="GET a", retry_after_s=None)
    assert [refusal_of(each) for each in (gone, never, unmounted)] == [
        Refusal.DELETED,
        Refusal.NOTHING,
        Refusal.NO_ENGINE,
    ]
    assert isinstance(gone, NotFoundError)
    assert gone.reason is Reason.SECRET_NOT_FOUND


def test_a_rate_limit_says_how_long_to_wait() -> None:
    error = error_of(429, errors("request path ... rate limit quota exceeded"), what="GET a", retry_after_s=3.0)
    assert (error.reason, error.retryable, error.retry_after_s) == (Reason.VAULT_RATE_LIMITED, True, 3.0)


@pytest.mark.parametrize(
    ("status", "sent", "reason"),
    [
        (307, b"", Reason.VAULT_ERROR),
        (503, errors("Vault is sealed"), Reason.VAULT_SEALED),
        (503, errors("server is not yet initialized"), Reason.VAULT_SEALED),
        (429, errors(), Reason.VAULT_ERROR),
        (412, errors("required index state not present"), Reason.VAULT_ERROR),
        (473, b"", Reason.VAULT_ERROR),
        (500, errors("local node not active but active cluster node not found"), Reason.VAULT_ERROR),
    ],
)
def test_a_node_that_cannot_answer_has_certainly_done_nothing(status: int, sent: bytes, reason: Reason) -> None:
    known = not_serving(status, sent)
    assert known is not None
    assert known[0] is reason


@pytest.mark.parametrize(
    ("status", "sent"),
    [(200, b"{}"), (403, errors("permission denied")), (429, errors("rate limit")), (503, b"<html>")],
)
def test_other_answers_do_not_say_that_nothing_was_done(status: int, sent: bytes) -> None:
    assert not_serving(status, sent) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("0", 0.0), ("999999", 3600.0), ("", None), ("-1", None), ("soon", None), ("9" * 5000, None)],
)
def test_retry_after_is_whole_seconds_and_an_hour_at_most(header: str, seconds: float | None) -> None:
    assert seconds_of(header) == seconds


def test_a_secret_field_takes_a_string_and_nothing_else() -> None:
    with pytest.raises(ValueError, match="Expected `str`, got `int`"):
        replies.secret_hook(Secret, 5)
