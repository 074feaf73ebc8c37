"""One vault address: a request's bytes out, a bounded answer back, in bounded time.

Owns what a request looks like: no token but the one given, no redirect followed, no content encoding. `connections`
bounds what comes back; `client` knows which address to ask, and `reply` what the answer means. Invariant: `send` never
raises for what the network or the vault did; it says so in `Unusable`.

urllib3 itself and not hvac, which stands on it through requests: those read tokens, proxies and netrc files from the
environment, follow redirects with the token, bound no reply, drop the headers of an error, and cost 8 MiB.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

import urllib3

from tokenward.vault.connections import ReplyTooLongError, Server, TlsFiles, causes

_CHUNK_BYTES = 64 * 1024
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "tokenward",
    "X-Vault-Request": "true",
}
_HEADER_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete HTTP answer. `retry_after` and `index` are headers, empty when absent."""

    status: int
    body: bytes = field(repr=False)
    retry_after: str = ""
    index: str = ""


@dataclass(frozen=True, slots=True)
class Unusable:
    """There was no answer that could be used, and `why`, in words of ours, to follow the address in a sentence."""

    why: str
    sent: bool
    """Whether the vault may have seen, and done, what was asked."""
    refused: bool = False
    """Whether something did come, and was refused for its size or form."""
    broken: bool = False
    """Whether the connection broke before any answer: an idle one that the vault closes just then does that."""
    asked: bool = True
    """Whether the address was tried at all; otherwise what was to be sent cannot be sent to any."""


class Transport:
    """Sends requests to one address: `https://host:port`, `http://host:port` or `unix:///path`.

    Safe to use from several threads. TLS files are read at the first use and again whenever they were replaced.
    """

    def __init__(self, *, address: str, tls: TlsFiles, max_reply_bytes: int, connections: int) -> None:
        self.address = address
        self._server = Server(address=address, tls=tls, max_reply_bytes=max_reply_bytes, connections=connections)

    def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_s: float,
    ) -> Answer | Unusable:
        """One request for `path` (raw text, without `/v1/`), tried once."""
        if not all(map(_HEADER_VALUE.fullmatch, headers.values())):
            return Unusable(
                "was not asked: a token or namespace has characters that no header may have", sent=False, asked=False
            )
        target = "/v1/" + quote_path(path) + (f"?{urlencode(query)}" if query else "")
        began = False
        try:
            with self._server.pool().urlopen(
                method,
                target,
                body=body,
                headers={**_HEADERS, **headers},
                timeout=urllib3.Timeout(connect=timeout_s / 2, read=timeout_s),
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            ) as response:
                began = True
                return _read(response)
        except ReplyTooLongError as error:
            return Unusable(f"answered more than {error.max_bytes} bytes", sent=True, refused=True)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            return _unusable(error, began=began)

    def close(self) -> None:
        """Closes what is idle at once, and what is in use when its answer is there."""
        self._server.close()


def quote_path(path: str) -> str:
    """`path` for a URL. A second slash is percent-encoded: the vault cleans `//`, as in a SPIFFE ID, away."""
    return quote(path, safe="/:@!$&'()*+,;=-._~").replace("//", "/%2F")


# -- what came back ---------------------------------------------------------------------------------------------------


def _read(response: urllib3.BaseHTTPResponse) -> Answer | Unusable:
    """The body as it was sent: an encoding that we did not ask for is refused, never inflated."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        return Unusable("answered with a content encoding that was not asked for", sent=True, refused=True)
    body = b"".join(response.stream(_CHUNK_BYTES, decode_content=False))
    return Answer(
        response.status,
        body,
        retry_after=headers.get("Retry-After", ""),
        index=headers.get("X-Vault-Index", ""),
    )


def _unusable(error: BaseException, *, began: bool) -> Unusable:
    """Our own words for what went wrong, after the answer `began` or not: a library's text may quote the reply."""
    found = list(causes(error))
    before_sending = (
        urllib3.exceptions.NewConnectionError,
        urllib3.exceptions.ConnectTimeoutError,
        ssl.SSLCertVerificationError,
        urllib3.exceptions.LocationValueError,
    )
    sent = not any(isinstance(cause, before_sending) for cause in found)
    broken = sent and not began and any(isinstance(cause, ConnectionError) for cause in found)
    return Unusable(_why(found), sent=sent, broken=broken)


def _why(found: list[BaseException]) -> str:
    for cause in found:
        match cause:
            case ssl.SSLCertVerificationError():
                said = cause.verify_message.rstrip(".")
                return (
                    f"showed a TLS certificate that is not trusted ({said}): check vault.ca_file, and that the address "
                    "is a name in the vault's certificate"
                )
            case ssl.SSLError():
                return f"failed in TLS ({cause.reason or 'no reason given'}): check the address, vault.ca_file and keys"
            case socket.gaierror():
                return f"has a name that cannot be resolved ({cause.strerror})"
            case TimeoutError() | urllib3.exceptions.TimeoutError():
                return "did not answer in time"
            case OSError(errno=int() as code, filename=str() as path):
                return f"cannot be asked: {path}: {os.strerror(code)}"
            case OSError(errno=int() as code):
                return f"cannot be reached ({os.strerror(code)})"
    return "broke off, or answered something that is not HTTP"
