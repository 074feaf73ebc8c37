"""`VaultClient`: one call to the vault, at whichever of its addresses can answer, off the event loop.

Owns the bounded thread pool, the deadline, and who a call is made as. Leaves which address is asked to `addresses`, the
wire to `transport` and the meaning of an answer to `reply`. Invariants: a call that makes a lease is never sent again
once a vault may have seen it; a caller has its answer or its error when twice `timeout_s` is over, and at once while no
address may be asked; a token goes nowhere but to a configured address.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from tokenward.core.secret import Secret
from tokenward.errors import InvalidRequestError, Reason, VaultUnavailableError
from tokenward.vault import reply as replies
from tokenward.vault.addresses import Addresses, AddressHealth, Outgoing, State
from tokenward.vault.connections import TlsFiles
from tokenward.vault.reply import AuthReply, Refusal, Reply, Seconds, WrapInfo, refusal_of
from tokenward.vault.transport import Transport

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


class VaultClient:
    """Calls the vault at `addresses`, each tried in turn, beginning with the one that answered last.

    `timeout_s` bounds one address, twice that the whole call. `client_cert` is a certificate's and its key's PEM file.
    `now` and `draw` decide how long an address that failed is left alone.
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
        now: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        cert_file, key_file = client_cert or ("", "")
        tls = TlsFiles(ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        transports = [
            Transport(address=address, tls=tls, max_reply_bytes=max_reply_bytes, connections=threads)
            for address in addresses
        ]
        self._addresses = Addresses(transports, timeout_s=timeout_s, now=now, draw=draw)
        self._namespace = namespace
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="vault")

    @property
    def calls(self) -> int:
        """Requests begun at any address so far, each attempt counted, health checks not."""
        return self._addresses.calls

    @property
    def all_serve(self) -> bool:
        """Whether every address may be asked: none of them failed several times in a row just now."""
        return self._addresses.all_serve

    async def call(self, request: VaultRequest, *, into: type[T], auth: Auth = None) -> Reply[T]:
        """The vault's answer, its data decoded strictly into `into`.

        Raises VaultDeniedError (400, 403 and other refusals), NotFoundError, VaultUnavailableError, VaultBadReplyError,
        and InvalidRequestError for a path that leads elsewhere.
        """
        _verify_path(request.path)
        self._addresses.verify_askable()  # here and not on a thread: those may all be waiting for the vault
        deadline = time.monotonic() + 2 * self._timeout_s
        job = functools.partial(self._perform, request, into, auth, deadline)
        try:
            async with asyncio.timeout(2 * self._timeout_s + _GRACE_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, job)
        except TimeoutError:
            text = "the vault, or the queue of calls to it, took too long: check its load and vault.addresses"
            raise VaultUnavailableError(Reason.VAULT_UNREACHABLE, text) from None

    async def health(self) -> tuple[AddressHealth, ...]:
        """The state of each address, asked now; never raises for what an address does.

        An address that is found active or standby is asked again from then on, whatever it did before.
        """
        run = asyncio.get_running_loop().run_in_executor
        asked = (run(self._threads, self._addresses.health_of, number) for number in range(len(self._addresses)))
        return tuple(await asyncio.gather(*asked))

    async def close(self) -> None:
        """Closes every connection and makes no call any more. Does not wait: those under way end by their deadline."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._addresses.close()

    # -- on a thread of the pool ------------------------------------------------------------------------------------

    def _perform(self, request: VaultRequest, into: type[T], auth: Auth, deadline: float) -> Reply[T]:
        outgoing = Outgoing(
            method=request.method,
            path=request.path,
            query=request.query,
            headers=self._headers(request, auth),
            body=_to_json(request.body) if request.body is not None else None,
            repeatable=request.repeatable,
        )
        answer = self._addresses.ask(outgoing, deadline=deadline)
        if not replies.is_success(answer.status):
            wait_s = replies.seconds_of(answer.retry_after)
            raise replies.error_of(answer.status, answer.body, what=str(request), retry_after_s=wait_s)
        made = replies.decode(answer.body, into)
        return msgspec.structs.replace(made, index=answer.index)

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
