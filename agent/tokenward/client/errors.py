"""What the agent said went wrong, as our error classes with the same reason.

Owns the way back from the wire (`google.rpc` details of a status, `Problem` of a watch) that `serve.status` owns there.
Invariant: whatever a newer agent sends, the result is one of our classes, and the agent decides if it is retryable.
"""

from __future__ import annotations

from contextlib import suppress

import grpc
from google.protobuf.message import DecodeError

from tokenward import errors
from tokenward.errors import Reason, TokenwardError
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import status_pb2

DOMAIN = "tokenward"
_DETAILS = "grpc-status-details-bin"
_TYPE = "type.googleapis.com/google.rpc."
_Code = grpc.StatusCode

_BY_REASON: dict[Reason, type[TokenwardError]] = {
    Reason.NO_MATCHING_WORKLOAD: errors.DeniedError,
    Reason.AMBIGUOUS_WORKLOAD: errors.DeniedError,
    Reason.IDENTITY_CHANGED: errors.DeniedError,
    Reason.PEER_GONE: errors.DeniedError,
    Reason.UNKNOWN_PEER: errors.DeniedError,
    Reason.NOT_GRANTED: errors.DeniedError,
    Reason.INVALID_ARGUMENT: errors.InvalidRequestError,
    Reason.ATTESTATION_INCOMPLETE: errors.AttestationError,
    Reason.VAULT_UNREACHABLE: errors.VaultUnavailableError,
    Reason.VAULT_SEALED: errors.VaultUnavailableError,
    Reason.VAULT_RATE_LIMITED: errors.VaultUnavailableError,
    Reason.VAULT_ERROR: errors.VaultUnavailableError,
    Reason.VAULT_BAD_REPLY: errors.VaultBadReplyError,
    Reason.VAULT_DENIED: errors.VaultDeniedError,
    Reason.LOGIN_FAILED: errors.VaultDeniedError,
    Reason.VALIDATION_FAILED: errors.ValidationError,
    Reason.SECRET_NOT_FOUND: errors.NotFoundError,
    Reason.REVOKED: errors.RevokedError,
    Reason.RATE_LIMITED: errors.RateLimitedError,
    Reason.AUDIT_UNAVAILABLE: errors.AuditError,
}
# What a code means where the reason says nothing, because it is missing, new, or of another kind than the code.
_BY_CODE: dict[grpc.StatusCode, type[TokenwardError]] = {
    _Code.UNAVAILABLE: errors.UnavailableError,
    _Code.DEADLINE_EXCEEDED: errors.UnavailableError,
    _Code.RESOURCE_EXHAUSTED: errors.UnavailableError,
    _Code.ABORTED: errors.UnavailableError,
    _Code.CANCELLED: errors.UnavailableError,
    _Code.PERMISSION_DENIED: errors.DeniedError,
    _Code.UNAUTHENTICATED: errors.DeniedError,
    _Code.NOT_FOUND: errors.NotFoundError,
    _Code.INVALID_ARGUMENT: errors.InvalidRequestError,
}
_REASON_BY_CODE: dict[grpc.StatusCode, Reason] = {
    _Code.UNAVAILABLE: Reason.AGENT_UNREACHABLE,
    _Code.CANCELLED: Reason.AGENT_UNREACHABLE,
    _Code.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    _Code.RESOURCE_EXHAUSTED: Reason.RATE_LIMITED,
    _Code.INVALID_ARGUMENT: Reason.INVALID_ARGUMENT,
}


def error_from(code: grpc.StatusCode, message: str, details: bytes | None) -> TokenwardError:
    """The error in a status: `details` is the metadata `grpc-status-details-bin`, None where there is none."""
    info, retry_after_s = _parse(details) if details else (None, None)
    reason = _reason(info.reason) if info else None
    cls = _BY_CODE.get(code, TokenwardError)
    if reason is None:
        if info is not None:
            message = f"{message} ({info.reason})"
        elif code is _Code.UNIMPLEMENTED:
            message = "the agent does not know this call: it is older than this client, or no tokenward agent at all"
        return _make(cls, _REASON_BY_CODE.get(code, Reason.INTERNAL) if info is None else Reason.INTERNAL, message)
    return _make(_refined(cls, reason), reason, message, retry_after_s)


def error_of_problem(problem: pb.Problem) -> TokenwardError:
    """The error that a watch told for one credential."""
    cls = errors.UnavailableError if problem.retryable else TokenwardError
    reason = _reason(problem.reason)
    if reason is None:
        return _make(cls, Reason.INTERNAL, f"{problem.message} ({problem.reason})")
    return _make(_refined(cls, reason), reason, problem.message)


def again(error: TokenwardError) -> TokenwardError:
    """The same error, to be raised once more: raising one object many times would make its traceback grow for ever."""
    return _make(type(error), error.reason, error.public, error.retry_after_s)


def details_of(call: grpc.Call) -> bytes | None:
    """The `google.rpc.Status` that the far end sent with a status, serialized; None where it sent none."""
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            return value
    return None


def _refined(cls: type[TokenwardError], reason: Reason) -> type[TokenwardError]:
    """The class of `reason`, unless it would turn a retryable error into a final one or the other way round."""
    named = _BY_REASON.get(reason, cls)
    if named.retryable == cls.retryable:
        return named
    if cls.retryable and named is errors.VaultDeniedError:
        return errors.VaultUnavailableError
    return cls


def _make(
    cls: type[TokenwardError], reason: Reason, message: str, retry_after_s: float | None = None
) -> TokenwardError:
    error = cls.__new__(cls)
    # Some classes fix their reason in their own constructor; on the wire the agent's reason counts.
    TokenwardError.__init__(error, reason, message or "the agent gave no text", retry_after_s=retry_after_s)
    return error


def _reason(text: str) -> Reason | None:
    try:
        return Reason(text)
    except ValueError:
        return None


def _parse(details: bytes) -> tuple[status_pb2.ErrorInfo | None, float | None]:
    """ErrorInfo of our domain and RetryInfo's delay in seconds; what cannot be read counts as not sent."""
    found, retry_after_s = None, None
    with suppress(DecodeError):
        for detail in status_pb2.RpcStatus.FromString(details).details:
            if detail.type_url == f"{_TYPE}ErrorInfo":
                info = status_pb2.ErrorInfo.FromString(detail.value)
                found = info if info.domain == DOMAIN else found
            elif detail.type_url == f"{_TYPE}RetryInfo":
                delay = status_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after_s = delay.seconds + delay.nanos / 1e9
    return found, retry_after_s
