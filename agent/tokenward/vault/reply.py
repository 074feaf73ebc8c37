"""What a vault's answer means: a typed `Reply`, or the error that it stands for.

Pure: bytes and a status in, values or errors of ours out. Invariant: no text of the vault's gets into an error, since
its error strings may quote secrets; texts that we know become a `Refusal` with words of ours, all others a status
number. A body that is not exactly of the type asked for is refused, naming the place and never the content.
"""

from __future__ import annotations

import functools
import re
from enum import StrEnum
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec

from tokenward.core.model import Instant, VaultToken
from tokenward.core.secret import Secret
from tokenward.errors import (
    NotFoundError,
    Reason,
    TokenwardError,
    VaultBadReplyError,
    VaultDeniedError,
    VaultUnavailableError,
)

T = TypeVar("T")

Seconds = Annotated[int, msgspec.Meta(ge=0)]
_TOKEN = re.compile(r"[!-~]{1,65536}")
_MAX_RETRY_AFTER_S = 3600.0
_PLAIN_TO_TLS = b"Client sent an HTTP request to an HTTPS server"


class WrapInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A response that the vault keeps back, to be fetched once with `token`."""

    token: Secret
    ttl: Seconds
    creation_path: str = ""


class AuthReply(msgspec.Struct, frozen=True, kw_only=True):
    """The token that a login, a creation or a renewal gave."""

    client_token: Secret
    lease_duration: Seconds
    accessor: str = ""
    renewable: bool = False
    policies: tuple[str, ...] | None = None
    orphan: bool = False
    """Otherwise it is a child of the token that made it, and ends with that whatever its own duration says."""

    def held_from(self, sent: Instant) -> VaultToken:
        """The token, its life counted from before the request was sent: never longer than the vault's own count."""
        ends = sent.mono + self.lease_duration if self.lease_duration else None
        return VaultToken(token=self.client_token, accessor=self.accessor, expires_mono=ends, renewable=self.renewable)


class Reply(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A successful answer. Durations in seconds; `index` is the state that a later read must have reached (HA)."""

    request_id: str = ""
    data: T | None = None
    auth: AuthReply | None = None
    wrap_info: WrapInfo | None = None
    lease_id: str = ""
    lease_duration: Seconds = 0
    renewable: bool = False
    index: str = ""

    def require_data(self) -> T:
        """Raises VaultBadReplyError when there is none."""
        if self.data is None:
            raise VaultBadReplyError("the vault's answer has no data: check what its path is")
        return self.data

    def require_auth(self) -> AuthReply:
        """Raises VaultBadReplyError when there is no token, or one that no vault makes."""
        if self.auth is None or not _TOKEN.fullmatch(self.auth.client_token.reveal()):
            raise VaultBadReplyError("the vault's answer has no usable token: check the auth method's mount path")
        return self.auth


class Refusal(StrEnum):
    """What the vault is known to mean by a refusal, in words for the reader. Ask `refusal_of` for it."""

    BAD_TOKEN = "the vault token is expired, revoked or unknown"  # noqa: S105 -- words, not a token
    POLICY = "the token's policies do not allow it"
    LOGIN_ROLE = "the auth method has no such role: run `tokenward vault-setup`, or correct the role's name"
    LOGIN_KEY = "the vault does not know the key that signed the JWT: run `tokenward vault-setup` for this agent's key"
    LOGIN_TIME = "to the vault the JWT is expired or not yet valid: compare the clocks"
    LOGIN_AUDIENCE = "the role binds another audience: check bound_audiences"
    LOGIN_ISSUER = "the auth method binds another issuer: check bound_issuer"
    LOGIN_SUBJECT = "the role binds another subject: check bound_subject"
    LOGIN_CLAIMS = "the role binds other claims: run `tokenward vault-setup` after a change of selectors"
    LOGIN = "the vault did not accept the proof: check what the role binds"
    SECRET_ID = "the secret id is not valid, used up or expired: deliver a new wrapped one"  # noqa: S105 -- words
    WRAPPED = "the wrapping token is used, expired or unknown: deliver a new one, and find out who used the old one"
    NO_COMMON_NAME = "the client certificate has no common name, which the vault's cert method needs: use jwt instead"
    NO_ROLE = "the engine has no such role: run `tokenward vault-setup`, or correct the role's name"
    NO_KEY = "the engine has no such key: run `tokenward vault-setup`, or correct the key's name"
    ALIAS = "the token role does not allow this entity alias: add the SPIFFE ID to its allowed_entity_aliases"
    LEASE_GONE = "the lease has ended or was revoked"
    NOT_RENEWABLE = "it cannot be renewed"
    CAS_MISMATCH = "somebody else wrote it in between"
    CAS_REQUIRED = "the secret takes writes by check-and-set alone"
    INLINE_LEASE = "inline authentication cannot make leases: log in for this path"
    DELETED = "the secret's current version is deleted: write it again, or undelete it"
    NO_ENGINE = "no secrets engine or auth method is mounted there"
    NOTHING = "there is nothing at this path"


LOGIN_REFUSALS = frozenset(known for known in Refusal if known.name.startswith("LOGIN"))
"""Those that an auth method gives, so that with inline authentication one can tell the login from the call."""

_KNOWN: tuple[tuple[int, str, Refusal], ...] = (
    (403, "1 error occurred", Refusal.POLICY),
    (403, "", Refusal.BAD_TOKEN),
    (404, "no handler for route", Refusal.NO_ENGINE),
    (404, "unsupported path", Refusal.NO_ENGINE),
    (404, "", Refusal.NOTHING),
    (400, "could not be found", Refusal.LOGIN_ROLE),
    (400, "invalid role name", Refusal.LOGIN_ROLE),
    (400, "unknown role", Refusal.NO_ROLE),
    (400, "signing key not found", Refusal.NO_KEY),
    (400, "invalid role or secret id", Refusal.SECRET_ID),
    (400, "invalid secret id", Refusal.SECRET_ID),
    (400, "invalid role id", Refusal.SECRET_ID),
    (400, "wrapping token is not valid", Refusal.WRAPPED),
    (400, "entity_alias", Refusal.ALIAS),
    (400, "error validating token: error verifying token signature", Refusal.LOGIN_KEY),
    (400, "error validating token: invalid expiration time (exp)", Refusal.LOGIN_TIME),
    (400, "error validating token: invalid not before (nbf)", Refusal.LOGIN_TIME),
    (400, "error validating token: invalid issued at (iat)", Refusal.LOGIN_TIME),
    (400, "error validating token: invalid audience (aud)", Refusal.LOGIN_AUDIENCE),
    (400, "error validating token: invalid issuer (iss)", Refusal.LOGIN_ISSUER),
    (400, "error validating token: invalid subject (sub)", Refusal.LOGIN_SUBJECT),
    (400, "error validating claims", Refusal.LOGIN_CLAIMS),
    (400, "error validating token", Refusal.LOGIN),
    (400, "lease not found", Refusal.LEASE_GONE),
    (400, "invalid lease", Refusal.LEASE_GONE),
    (400, "lease expired", Refusal.LEASE_GONE),
    (400, "not renewable", Refusal.NOT_RENEWABLE),
    (400, "cannot be renewed", Refusal.NOT_RENEWABLE),
    (400, "check-and-set parameter did not match", Refusal.CAS_MISMATCH),
    (400, "check-and-set parameter required", Refusal.CAS_REQUIRED),
    (500, "past the max ttl", Refusal.NOT_RENEWABLE),
    (500, "missing name in alias", Refusal.NO_COMMON_NAME),
    (500, "inline authentication cannot generate leases", Refusal.INLINE_LEASE),
)


class RefusedByVault(Exception):  # noqa: N818 -- a fact behind an error of ours, never raised by itself
    """The cause of a denial: HTTP status, and what the vault is known to mean by it."""

    def __init__(self, status: int, refusal: Refusal | None) -> None:
        super().__init__(f"HTTP {status}: {refusal or 'a refusal that is not known'}")
        self.status = status
        self.refusal = refusal


def refusal_of(error: TokenwardError) -> Refusal | None:
    """What the vault meant, where it is known and the vault said no."""
    return error.__cause__.refusal if isinstance(error.__cause__, RefusedByVault) else None


def decode(body: bytes, into: type[T]) -> Reply[T]:
    """The body as a `Reply[into]`; an empty one (HTTP 204) is an empty reply. Raises VaultBadReplyError."""
    if not body:
        return Reply()
    kind: Any = into  # a type is hashable, whatever it is a type of
    try:
        made: Reply[T] = _decoder(kind).decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # `from None`: the text of some of these quotes the value.
        raise VaultBadReplyError(f"the vault's answer is not what was asked for{_place(error)}") from None
    return made


def secret_hook(kind: type, value: object) -> Any:
    """msgspec's `dec_hook` for fields of type `Secret`: a JSON string and nothing else."""
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise ValueError(f"Expected `str`, got `{type(value).__name__}`")


@functools.lru_cache(maxsize=64)
def _decoder(into: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(Reply[into], dec_hook=secret_hook)


def _place(error: Exception) -> str:
    said = str(error)
    expected = re.match(r"Expected `[a-z0-9 |]+`, got `[a-z]+`", said)
    place = re.search(r"at `(\$[A-Za-z0-9_.\[\]]*)`$", said)
    missing = re.search(r"required field `([A-Za-z0-9_]+)`", said)
    words = [f" {place[1]}" if place else "", f" lacks `{missing[1]}`" if missing else ""]
    words.append(f" {expected[0][0].lower()}{expected[0][1:]}" if expected else "")
    return ":" + "".join(words) if any(words) else ": it is not JSON of that form"


# -- answers that are no success ---------------------------------------------------------------------------------------


class _Errors(msgspec.Struct):
    errors: list[str] = []


class _DeletedMetadata(msgspec.Struct):
    deletion_time: str = ""
    destroyed: bool = False


class _DeletedData(msgspec.Struct):
    metadata: _DeletedMetadata


class _Deleted(msgspec.Struct):
    data: _DeletedData


def is_success(status: int) -> bool:
    """Whether the body is the answer."""
    return 200 <= status < 300


class NotServing(NamedTuple):
    """Why a node cannot answer a call though another may."""

    reason: Reason
    why: str
    serves_others: bool
    """Whether it is a standby that may well answer the next call: reads go on while a leader is elected."""


def not_serving(status: int, body: bytes) -> NotServing | None:
    """Why this node cannot answer though another may, and certainly did nothing; None when it did answer."""
    said = _said(body)
    if status == 400 and body.startswith(_PLAIN_TO_TLS):
        return NotServing(Reason.VAULT_UNREACHABLE, "speaks TLS: its address begins with https://", serves_others=False)
    if status == 503 and "sealed" in said:
        return NotServing(Reason.VAULT_SEALED, "is sealed: unseal it", serves_others=False)
    if status == 503 and ("not initialized" in said or "not yet initialized" in said):
        return NotServing(Reason.VAULT_SEALED, "is not initialized", serves_others=False)
    standby = _standby(status, said)
    return NotServing(Reason.VAULT_ERROR, standby, serves_others=True) if standby else None


def _standby(status: int, said: str) -> str:
    """Why a standby does not answer this call, or nothing."""
    if 300 <= status < 400:
        return "is a standby or moved: it answered with a redirect, and none is followed"
    if status == 503 and "standby" in said:
        return "is a standby"
    if status in {412, 472, 473} or (status == 429 and not said):
        return "is a standby that is behind"
    if status == 500 and "local node not active" in said:
        return "waits for an active node to be elected"
    return ""


def error_of(status: int, body: bytes, *, what: str, retry_after_s: float | None) -> TokenwardError:
    """The error that the answer to `what` stands for, with its cause set."""
    said = _said(body)
    if status == 429:
        text = f"the vault limits the rate of calls, {what} among them: wait, or raise its quota"
        return VaultUnavailableError(Reason.VAULT_RATE_LIMITED, text, retry_after_s=retry_after_s)
    refusal = next((known for code, text, known in _KNOWN if code == status and text in said), None)
    if status == 404 and _is_deleted(body):
        refusal = Refusal.DELETED
    made: TokenwardError
    if status == 404:
        made = NotFoundError(Reason.SECRET_NOT_FOUND, f"the vault answered {what} with 'not found': {refusal}")
    elif refusal is not None or status < 500:
        why = refusal or "check the path, its parameters and the vault's audit log"
        made = VaultDeniedError(Reason.VAULT_DENIED, f"the vault refused {what} (HTTP {status}): {why}")
    else:
        text = f"the vault failed at {what} (HTTP {status}): see the vault's own log"
        return VaultUnavailableError(Reason.VAULT_ERROR, text, retry_after_s=retry_after_s)
    made.__cause__ = RefusedByVault(status, refusal)
    return made


def seconds_of(retry_after: str) -> float | None:
    """`Retry-After` in seconds, an hour at most; None for a date or anything else, which no vault sends."""
    return min(float(retry_after), _MAX_RETRY_AFTER_S) if re.fullmatch(r"[0-9]{1,9}", retry_after) else None


def _said(body: bytes) -> str:
    """The error strings, to compare with known ones and for nothing else."""
    try:
        return "\n".join(msgspec.json.decode(body, type=_Errors).errors).lower()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""


def _is_deleted(body: bytes) -> bool:
    try:
        found = msgspec.json.decode(body, type=_Deleted).data.metadata
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return bool(found.deletion_time) or found.destroyed
