"""Every error that tokenward raises, and the one closed set of reasons behind them.

The tree, by what the reader can do about it:

    TokenwardError
      ConfigError            fix the configuration: every mistake is in `problems`
      InvalidRequestError    fix the call
      DeniedError            we could tell, and no: do not retry
      RevokedError           the credential was ended: do not retry
      NotFoundError          the vault holds no such secret: fix the vault or the grant
      VaultDeniedError       the vault said no to the workload or to the agent: fix the vault's setup
      UnavailableError       not now: retry, after `retry_after_s` where it is given
        RateLimitedError     you take more than your share
        AttestationError     we could not tell who is calling
        VaultUnavailableError   the vault did not answer, or not usefully
        VaultBadReplyError   the vault answered something that was not asked for
        ValidationError      a new value was tried where it is used, and did not pass: it is not served
        AuditError           the record cannot be written, so nothing is served

The agent raises them, `serve.status` puts them on the wire, and the client raises the same classes again with the same
reason. `public` is the text that may leave the agent: it says what to do next and holds no secret and no raw reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """Why a call did not get what it asked for: the `reason` of `google.rpc.ErrorInfo`, stable across releases."""

    NO_MATCHING_WORKLOAD = "NO_MATCHING_WORKLOAD"
    AMBIGUOUS_WORKLOAD = "AMBIGUOUS_WORKLOAD"
    IDENTITY_CHANGED = "IDENTITY_CHANGED"
    PEER_GONE = "PEER_GONE"
    UNKNOWN_PEER = "UNKNOWN_PEER"
    NOT_GRANTED = "NOT_GRANTED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    INVALID_CONFIG = "INVALID_CONFIG"
    ATTESTATION_INCOMPLETE = "ATTESTATION_INCOMPLETE"
    VAULT_UNREACHABLE = "VAULT_UNREACHABLE"
    VAULT_SEALED = "VAULT_SEALED"
    VAULT_RATE_LIMITED = "VAULT_RATE_LIMITED"
    VAULT_ERROR = "VAULT_ERROR"
    VAULT_BAD_REPLY = "VAULT_BAD_REPLY"
    VAULT_DENIED = "VAULT_DENIED"
    LOGIN_FAILED = "LOGIN_FAILED"
    VALIDATION_FAILED = "VALIDATION_FAILED"
    SECRET_NOT_FOUND = "SECRET_NOT_FOUND"  # noqa: S105 -- a reason's name, not a secret
    REVOKED = "REVOKED"
    EXPIRED = "EXPIRED"
    RATE_LIMITED = "RATE_LIMITED"
    AUDIT_UNAVAILABLE = "AUDIT_UNAVAILABLE"
    AGENT_UNREACHABLE = "AGENT_UNREACHABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    CONFIGURATION_CHANGED = "CONFIGURATION_CHANGED"
    INTERNAL = "INTERNAL"


class TokenwardError(Exception):
    """Root of every error of ours.

    `reason` is the stable cause, `public` the text for the caller, `retryable` whether the same call may succeed
    later without anybody changing anything, `retry_after_s` how long to wait first, in seconds, where we know.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, reason: Reason, public: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{reason}: {public}")
        self.reason = reason
        self.public = public
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration file: where it is and what was expected there."""

    file: str
    line: int
    key: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.key}: {self.expected}"


class ConfigError(TokenwardError):
    """The configuration cannot be used; `problems` has every mistake, in file order."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(Reason.INVALID_CONFIG, "\n".join(map(str, problems)))
        self.problems = problems


class InvalidRequestError(TokenwardError):
    """The call itself is malformed; the same call will never succeed."""

    def __init__(self, public: str) -> None:
        super().__init__(Reason.INVALID_ARGUMENT, public)


class DeniedError(TokenwardError):
    """We could tell who is calling or what is asked for, and the answer is no."""


class RevokedError(TokenwardError):
    """The credential was ended, by an operator or at the vault."""


class NotFoundError(TokenwardError):
    """The vault has nothing at the path of the grant."""


class VaultDeniedError(TokenwardError):
    """The vault refused the agent or the workload: a matter of the vault's setup, not of the caller."""


class UnavailableError(TokenwardError):
    """Not now. Nothing is wrong with the call; the same one may succeed later."""

    retryable = True


class RateLimitedError(UnavailableError):
    """The caller takes more than its share; after `retry_after_s` it may go on."""

    def __init__(self, public: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(Reason.RATE_LIMITED, public, retry_after_s=retry_after_s)


class AttestationError(UnavailableError):
    """We could not tell who is calling, which is not the same as a no."""


class VaultUnavailableError(UnavailableError):
    """No address of the vault gave a useful answer."""


class VaultBadReplyError(UnavailableError):
    """The vault's answer is not what was asked for; it was refused and its content forgotten."""

    def __init__(self, public: str) -> None:
        super().__init__(Reason.VAULT_BAD_REPLY, public)


class ValidationError(UnavailableError):
    """A new value did not pass the check that its grant asks for.

    `refused` tells whether the far end said no to it; otherwise it could not be asked, or we are told by an agent.
    """

    refused: bool = False

    def __init__(self, public: str, *, refused: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(Reason.VALIDATION_FAILED, public, retry_after_s=retry_after_s)
        self.refused = refused


class AuditError(UnavailableError):
    """The audit record could not be written, so nothing may leave."""

    def __init__(self, public: str) -> None:
        super().__init__(Reason.AUDIT_UNAVAILABLE, public)
