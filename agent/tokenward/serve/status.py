"""One table from our errors to gRPC, and the `google.rpc` details that go with them."""

from __future__ import annotations

from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration

from tokenward import errors
from tokenward.v1 import credentials_pb2, status_pb2

DOMAIN = "tokenward"

# The nearest class in an error's MRO decides.
_CODES: dict[type[errors.TokenwardError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.RevokedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.VaultDeniedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RateLimitedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.TokenwardError: grpc.StatusCode.INTERNAL,
}


def code_of(error: errors.TokenwardError) -> grpc.StatusCode:
    """The canonical code for `error`."""
    return next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)


async def abort(context: grpc.aio.ServicerContext[object, object], error: errors.TokenwardError) -> NoReturn:
    """Ends the call with `error` as a status with ErrorInfo, and RetryInfo where a delay is known (google.rpc)."""
    code = code_of(error)
    status = status_pb2.RpcStatus(code=code.value[0], message=error.public)
    _add(status, "ErrorInfo", status_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN).SerializeToString())
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        _add(status, "RetryInfo", status_pb2.RetryInfo(retry_delay=delay).SerializeToString())
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, error.public, details)
    raise AssertionError("abort returned")


def _add(status: status_pb2.RpcStatus, name: str, value: bytes) -> None:
    status.details.append(Any(type_url=f"type.googleapis.com/google.rpc.{name}", value=value))


def problem(error: errors.TokenwardError) -> credentials_pb2.Problem:
    """`error` as a watcher sees it."""
    return credentials_pb2.Problem(reason=error.reason, message=error.public, retryable=error.retryable)
