"""From the wire back to the same classes with the same reason, whatever an agent sends."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.agent import details
from tokenward import errors
from tokenward.client.errors import again, error_from, error_of_problem
from tokenward.errors import Reason, TokenwardError
from tokenward.serve.status import code_of
from tokenward.v1 import credentials_pb2 as pb

CODE = grpc.StatusCode

SAMPLES: list[TokenwardError] = [
    errors.InvalidRequestError("a name is needed"),
    errors.DeniedError(Reason.NO_MATCHING_WORKLOAD, "no workload matches"),
    errors.DeniedError(Reason.NOT_GRANTED, "have a grant added"),
    errors.RevokedError(Reason.REVOKED, "revoked"),
    errors.NotFoundError(Reason.SECRET_NOT_FOUND, "write it first"),
    errors.VaultDeniedError(Reason.VAULT_DENIED, "run vault-setup"),
    errors.VaultDeniedError(Reason.LOGIN_FAILED, "check the role"),
    errors.RateLimitedError("slower", retry_after_s=1.5),
    errors.AttestationError(Reason.ATTESTATION_INCOMPLETE, "share the pid namespace"),
    errors.VaultUnavailableError(Reason.VAULT_SEALED, "unseal it"),
    errors.ValidationError("look at the far end", retry_after_s=2),
    errors.VaultBadReplyError("see the log"),
    errors.AuditError("free some disk"),
]


@pytest.mark.parametrize("sent", SAMPLES, ids=lambda error: f"{type(error).__name__}-{error.reason}")
def test_what_the_agent_raises_is_raised_again(sent: TokenwardError) -> None:
    got = error_from(code_of(sent), sent.public, details(sent.reason, retry_after_s=sent.retry_after_s))
    assert type(got) is type(sent)
    assert (got.reason, got.public, got.retry_after_s) == (sent.reason, sent.public, sent.retry_after_s)
    assert got.retryable == sent.retryable


@pytest.mark.parametrize("sent", SAMPLES, ids=lambda error: f"{type(error).__name__}-{error.reason}")
def test_a_problem_of_a_watch_is_the_same_error(sent: TokenwardError) -> None:
    got = error_of_problem(pb.Problem(reason=sent.reason, message=sent.public, retryable=sent.retryable))
    assert type(got) is type(sent)
    assert (got.reason, got.public) == (sent.reason, sent.public)


@pytest.mark.parametrize(
    ("code", "cls", "retryable"),
    [
        (CODE.UNAVAILABLE, errors.UnavailableError, True),
        (CODE.PERMISSION_DENIED, errors.DeniedError, False),
        (CODE.FAILED_PRECONDITION, TokenwardError, False),
        (CODE.RESOURCE_EXHAUSTED, errors.UnavailableError, True),
    ],
)
def test_a_reason_of_a_newer_agent_falls_back_to_the_code(
    code: grpc.StatusCode, cls: type[TokenwardError], retryable: bool
) -> None:
    got = error_from(code, "something new", details("MOON_PHASE"))
    assert type(got) is cls
    assert got.retryable is retryable
    assert "something new" in got.public
    assert "MOON_PHASE" in got.public


def test_another_domains_details_count_as_none() -> None:
    got = error_from(CODE.PERMISSION_DENIED, "no", details("NOT_GRANTED", domain="other.example"))
    assert type(got) is errors.DeniedError
    assert got.reason is Reason.INTERNAL


def test_the_agent_decides_whether_to_retry_not_the_reason() -> None:
    """A login that failed may be for ever (the role is wrong) or for now (the vault's helper is down)."""
    assert not error_from(CODE.FAILED_PRECONDITION, "x", details("LOGIN_FAILED")).retryable
    later = error_from(CODE.UNAVAILABLE, "x", details("LOGIN_FAILED"))
    assert isinstance(later, errors.VaultUnavailableError)
    assert later.reason is Reason.LOGIN_FAILED


def test_a_server_that_is_no_agent_says_so() -> None:
    assert "older than this client" in error_from(CODE.UNIMPLEMENTED, "Method not found!", None).public


def test_an_error_that_is_raised_again_is_a_new_object() -> None:
    """One object raised many times would make its traceback grow."""
    first = errors.UnavailableError(Reason.RATE_LIMITED, "slower", retry_after_s=2)
    second = again(first)
    assert second is not first
    assert (type(second), second.reason, second.retry_after_s) == (type(first), first.reason, 2)


@given(st.sampled_from(list(CODE)), st.text(max_size=50), st.none() | st.binary(max_size=200))
def test_any_bytes_as_details_give_one_of_our_errors(code: grpc.StatusCode, text: str, sent: bytes | None) -> None:
    got = error_from(code, text, sent)
    assert isinstance(got, TokenwardError)
    assert got.public


@given(st.text(max_size=30), st.text(max_size=50), st.booleans())
def test_any_problem_gives_one_of_our_errors(reason: str, message: str, retryable: bool) -> None:
    got = error_of_problem(pb.Problem(reason=reason, message=message, retryable=retryable))
    assert got.retryable is retryable
