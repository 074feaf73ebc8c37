"""`VaultClient`: one call to the vault, at whichever of its addresses can answer, off the event loop.

Owns the order in which addresses are asked, the bounded thread pool, the deadline, and who a call is made as. Leaves
the wire to `transport` and the meaning of an answer to `reply`. Invariants: a call that makes a lease is never sent
again once a vault may have seen it; a caller has its answer or its error when twice `timeout_s` is over; a token goes
nowhere but to a configured address.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import msgspec

from tokenward.core.secret import Secret
from tokenward.errors import InvalidRequestError, Reason, VaultBadReplyError, VaultUnavailableError
from tokenward.vault import reply as replies
from tokenward.vault.connections import TlsFiles
from tokenward.vault.reply import AuthReply, Refusal, Reply, Seconds, WrapInfo, refusal_of
from tokenward.vault.transport import Answer, Transport, Unusable

__all__ = [
    "AddressHealth",
    "Auth",
    "AuthReply",
    "InlineAuth",
    "Refusal",
    "Reply",
    "Seconds",
    "State",
    "VaultClient",
    "VaultRequest",
    "WrapInfo",
    "refusal_of",
]

T = TypeVar("T")

_GRACE_S = 0.25
_GATEWAY = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class VaultRequest:
    """What to ask: `path` is raw text without `/v1/`, not percent-encoded; a `Secret` may stand anywhere in `body`."""

    method: str
    path: str
    body: Mapping[str, object] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    """False for a call that makes a lease or spends something: never sent again once it may have been done."""
    after_index: str = ""
    """`Reply.index` of a write that this read must see; a standby that has not then asks the active node."""

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class InlineAuth:
    """OpenBao's inline authentication: the login at `path` (`auth/jwt/login`) goes with the call, no token is made."""

    path: str
    parameters: Mapping[str, Secret | str]

    def headers(self) -> dict[str, str]:
        made = {"X-Vault-Inline-Auth-Path": self.path}
        for number, (key, value) in enumerate(self.parameters.items(), start=1):
            pair = _to_json({"key": key, "value": value})
            encoded = base64.urlsafe_b64encode(pair).rstrip(b"=").decode()
            made[f"X-Vault-Inline-Auth-Parameter-{number}"] = encoded
        return made


Auth = Secret | InlineAuth | None


class State(StrEnum):
    """What an address said of itself."""

    ACTIVE = "active"
    STANDBY = "standby"
    SEALED = "sealed"
    UNINITIALIZED = "uninitialized"
    UNREACHABLE = "unreachable"


_STATES = {200: State.ACTIVE, 429: State.STANDBY, 472: State.STANDBY, 473: State.STANDBY}
_STATES |= {501: State.UNINITIALIZED, 503: State.SEALED}


@dataclass(frozen=True, slots=True)
class AddressHealth:
    """One address and its state; `why` says more where it is unreachable."""

    address: str
    state: State
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Failure:
    address: str
    reason: Reason
    why: str


class VaultClient:
    """Calls the vault at `addresses`, each tried in turn, beginning with the one that answered last.

    `timeout_s` bounds one address, twice that the whole call. `client_cert` is a certificate's and its key's PEM file.
    """

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        namespace: str = "",
        ca_file: str = "",
        client_cert: tuple[str, str] | None = None,
        timeout_s: float = 2.0,
        max_reply_bytes: int = 1 << 20,
        threads: int = 8,
    ) -> None:
        cert_file, key_file = client_cert or ("", "")
        tls = TlsFiles(ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        self._transports = tuple(
            Transport(address=address, tls=tls, max_reply_bytes=max_reply_bytes, connections=threads)
            for address in addresses
        )
        self._namespace = namespace
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="vault")
        self._good = 0

    async def call(self, request: VaultRequest, *, into: type[T], auth: Auth = None) -> Reply[T]:
        """The vault's answer, its data decoded strictly into `into`.

        Raises VaultDeniedError (400, 403 and other refusals), NotFoundError, VaultUnavailableError, VaultBadReplyError,
        and InvalidRequestError for a path that leads elsewhere.
        """
        _verify_path(request.path)
        deadline = time.monotonic() + 2 * self._timeout_s
        job = functools.partial(self._perform, request, into, auth, deadline)
        try:
            async with asyncio.timeout(2 * self._timeout_s + _GRACE_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, job)
        except TimeoutError:
            text = "the vault, or the queue of calls to it, took too long: check its load and vault.addresses"
            raise VaultUnavailableError(Reason.VAULT_UNREACHABLE, text) from None

    async def health(self) -> tuple[AddressHealth, ...]:
        """The state of each address, asked now; never raises for what an address does."""
        run = asyncio.get_running_loop().run_in_executor
        return tuple(await asyncio.gather(*(run(self._threads, self._health_of, each) for each in self._transports)))

    async def close(self) -> None:
        """Waits for calls under way, which their deadline bounds, and closes every connection."""
        await asyncio.to_thread(self._threads.shutdown)
        for transport in self._transports:
            transport.close()

    # -- on a thread of the pool ------------------------------------------------------------------------------------

    def _perform(self, request: VaultRequest, into: type[T], auth: Auth, deadline: float) -> Reply[T]:
        headers = self._headers(request, auth)
        body = _to_json(request.body) if request.body is not None else None
        answer = self._ask_in_turn(request, headers, body, deadline)
        if not replies.is_success(answer.status):
            wait_s = replies.seconds_of(answer.retry_after)
            raise replies.error_of(answer.status, answer.body, what=str(request), retry_after_s=wait_s)
        made = replies.decode(answer.body, into)
        return msgspec.structs.replace(made, index=answer.index)

    def _ask_in_turn(
        self, request: VaultRequest, headers: Mapping[str, str], body: bytes | None, deadline: float
    ) -> Answer:
        failures: list[_Failure] = []
        wait_s: float | None = None
        first = self._good
        for step in range(len(self._transports)):
            number = (first + step) % len(self._transports)
            transport = self._transports[number]
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            got = _ask(transport, request, headers, body, timeout_s=min(self._timeout_s, left_s))
            if isinstance(got, Answer):
                failure = _busy(transport.address, got)
                if failure is None:
                    self._good = number
                    return got
                maybe_done = replies.not_serving(got.status, got.body) is None
                wait_s = replies.seconds_of(got.retry_after) or wait_s
            else:
                if got.refused:
                    raise VaultBadReplyError(f"the vault at {transport.address} {got.why}")
                failure = _Failure(transport.address, Reason.VAULT_UNREACHABLE, got.why)
                maybe_done = got.sent
            failures.append(failure)
            if maybe_done and not request.repeatable:
                self._good = (number + 1) % len(self._transports)  # the next call begins elsewhere
                break
        raise _unavailable(failures, wait_s)

    def _headers(self, request: VaultRequest, auth: Auth) -> dict[str, str]:
        made = {"X-Vault-Namespace": self._namespace} if self._namespace else {}
        if request.body is not None:
            made["Content-Type"] = "application/json"
        if request.after_index:
            made |= {"X-Vault-Index": request.after_index, "X-Vault-Inconsistent": "forward-active-node"}
        if isinstance(auth, Secret):
            made["X-Vault-Token"] = auth.reveal()
        elif auth is not None:
            made |= auth.headers()
        return made

    def _health_of(self, transport: Transport) -> AddressHealth:
        got = transport.send("GET", "sys/health", query={}, headers={}, body=None, timeout_s=self._timeout_s)
        if isinstance(got, Unusable):
            return AddressHealth(transport.address, State.UNREACHABLE, got.why)
        state = _STATES.get(got.status, State.UNREACHABLE)
        why = f"answered its health check with HTTP {got.status}" if state is State.UNREACHABLE else ""
        return AddressHealth(transport.address, state, why)


def _ask(
    transport: Transport, request: VaultRequest, headers: Mapping[str, str], body: bytes | None, *, timeout_s: float
) -> Answer | Unusable:
    """One address's answer; a read whose connection broke is sent once more, since the connection was an old one."""
    send = functools.partial(transport.send, query=request.query, headers=headers, body=body, timeout_s=timeout_s)
    got = send(request.method, request.path)
    if isinstance(got, Unusable) and got.broken and request.repeatable:
        got = send(request.method, request.path)
    return got


def _busy(address: str, answer: Answer) -> _Failure | None:
    """Why to ask the next address; None when this one has answered."""
    known = replies.not_serving(answer.status, answer.body)
    if known is not None:
        return _Failure(address, *known)
    if answer.status in _GATEWAY:
        return _Failure(address, Reason.VAULT_ERROR, f"or a proxy before it answered HTTP {answer.status}")
    return None


def _unavailable(failures: Sequence[_Failure], retry_after_s: float | None) -> VaultUnavailableError:
    """One error for all addresses: the reason is the most telling one, the text has each."""
    reasons = {failure.reason for failure in failures}
    telling = (Reason.VAULT_SEALED, Reason.VAULT_ERROR, Reason.VAULT_UNREACHABLE)
    reason = next((one for one in telling if one in reasons), Reason.VAULT_UNREACHABLE)
    said = "; ".join(f"{failure.address} {failure.why}" for failure in failures) or "there was no time left to ask it"
    return VaultUnavailableError(reason, f"the vault is not available: {said}", retry_after_s=retry_after_s)


def _verify_path(path: str) -> None:
    """Raises InvalidRequestError for a path that a server would read as another one."""
    if not path or path.startswith("/") or any(segment in {".", ".."} for segment in path.split("/")):
        raise InvalidRequestError(f"{path!r} is no vault path: it has no leading slash and no segment '.' or '..'")


def _to_json(value: object) -> bytes:
    return msgspec.json.encode(value, enc_hook=_reveal)


def _reveal(value: object) -> str:
    """msgspec's `enc_hook`: a secret goes out to the vault, and nothing else is known."""
    if isinstance(value, Secret):
        return value.reveal()
    raise NotImplementedError(f"a request's body cannot hold a {type(value).__name__}")
