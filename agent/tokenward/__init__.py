"""tokenward: credentials for attested local processes. What applications import from here is the client.

`Client` and `AsyncClient` are loaded at their first use, and gRPC with them: importing `tokenward` alone costs next to
nothing, and nothing of the agent is ever imported from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tokenward.errors import (
    AttestationError,
    AuditError,
    ConfigError,
    DeniedError,
    InvalidRequestError,
    NotFoundError,
    Reason,
    RevokedError,
    TokenwardError,
    UnavailableError,
    VaultBadReplyError,
    VaultDeniedError,
    VaultUnavailableError,
)

if TYPE_CHECKING:
    from tokenward.client import (
        AsyncClient,
        AsyncCredentialHandle,
        Change,
        Client,
        Credential,
        CredentialHandle,
        GrantInfo,
        Identity,
        PreviousValues,
        Values,
        socket_path,
    )

__all__ = [
    "Client",
    "AsyncClient",
    "CredentialHandle",
    "AsyncCredentialHandle",
    "Credential",
    "PreviousValues",
    "Values",
    "Change",
    "GrantInfo",
    "Identity",
    "socket_path",
    "Reason",
    "TokenwardError",
    "AttestationError",
    "AuditError",
    "ConfigError",
    "DeniedError",
    "InvalidRequestError",
    "NotFoundError",
    "RevokedError",
    "UnavailableError",
    "VaultBadReplyError",
    "VaultDeniedError",
    "VaultUnavailableError",
]


def __getattr__(name: str) -> object:
    """The client's names, at their first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module("tokenward.client"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
