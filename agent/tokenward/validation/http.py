"""Tries a value over HTTP: one request that has it in a header, and the status of the answer decides.

Owns the header and what a status means. `vault.connections` makes the connection: TLS verified, nothing of the
environment, and bounds for bytes and time. No redirect is followed, since it would take the value elsewhere, and the
body is never read. Invariant: a value goes into the request only when it cannot change what the request is.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import urllib3

from tokenward.core.model import HttpValidation
from tokenward.core.secret import Secret
from tokenward.errors import ValidationError
from tokenward.vault.connections import ReplyTooLongError, Server, TlsFiles, causes
from tokenward.vault.reply import seconds_of

_MAX_REPLY_BYTES = 64 * 1024
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "tokenward"}
_HEADER_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_NOT_NOW = frozenset({408, 425, 429})
"""Statuses below 500 that say nothing of the value."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    retry_after: str


def check(wanted: HttpValidation, values: Mapping[str, Secret]) -> None:
    """Returns when the far end answers as expected. Blocks. Raises ValidationError."""
    header_value = _header_value(wanted, values)
    answer = _ask(wanted, header_value)
    if isinstance(answer, str):
        raise ValidationError(f"{where(wanted)} could not be asked about the new value: it {answer}")
    if answer.status == wanted.expect:
        return
    said = f"it answered {answer.status}, expected {wanted.expect}"
    if answer.status >= 500 or answer.status in _NOT_NOW:
        wait_s = seconds_of(answer.retry_after)
        text = f"{where(wanted)} could not be asked about the new value: {said}"
        raise ValidationError(text, retry_after_s=wait_s)
    raise ValidationError(f"{where(wanted)} refused the new value: {said}", refused=True)


def where(wanted: HttpValidation) -> str:
    """Scheme, host and port: a path may tell more than a caller should know."""
    at = urlsplit(wanted.url)
    return f"{at.scheme}://{at.netloc}"


def _header_value(wanted: HttpValidation, values: Mapping[str, Secret]) -> str:
    texts, fields = wanted.value.texts, wanted.value.fields
    parts = [texts[0]]
    for field, text in zip(fields, texts[1:], strict=True):
        if field not in values:
            raise ValidationError(
                f"the new value cannot be tried: it has no field {field!r}, which the grant's validate.value names",
                refused=True,
            )
        parts += [values[field].reveal(), text]
    made = "".join(parts)
    # Beyond printable ASCII are line ends, with which a value could add headers or whole requests of its own.
    if not _HEADER_VALUE.fullmatch(made) or not all(values[field].reveal() for field in fields):
        raise ValidationError(
            "the new value cannot be tried: a field of it is empty or has characters that no header may have",
            refused=True,
        )
    return made


def _ask(wanted: HttpValidation, header_value: str) -> _Answer | str:
    """The answer's status, or why there is none, in words of ours that follow the far end's name."""
    at = urlsplit(wanted.url)
    target = (at.path or "/") + (f"?{at.query}" if at.query else "")
    tls = TlsFiles(ca_file=wanted.ca_file)
    # A connection for one check: hours may go by until the next, and the CA file is read anew.
    server = Server(address=where(wanted), tls=tls, max_reply_bytes=_MAX_REPLY_BYTES, connections=1)
    try:
        with server.pool().urlopen(
            wanted.method,
            target,
            headers={**_HEADERS, wanted.header: header_value},
            timeout=urllib3.Timeout(total=wanted.timeout_s),
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
        ) as response:
            return _Answer(response.status, response.headers.get("Retry-After", ""))
    except ReplyTooLongError as error:
        return f"answered with more than {error.max_bytes} bytes of headers"
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
        return _why(next(causes(error)))
    finally:
        server.close()


def _why(cause: BaseException) -> str:
    match cause:
        case ssl.SSLCertVerificationError():
            return f"showed a TLS certificate that is not trusted ({cause.verify_message.rstrip('.')}): check ca_file"
        case ssl.SSLError():
            return f"failed in TLS ({cause.reason or 'no reason given'})"
        case socket.gaierror():
            return f"has a name that cannot be resolved ({cause.strerror})"
        case TimeoutError() | urllib3.exceptions.TimeoutError():
            return "took too long"
        case OSError(errno=int() as code, filename=str() as path):
            return f"needs a file that cannot be read: {path}: {os.strerror(code)}"
        case OSError(errno=int() as code):
            return f"cannot be reached ({os.strerror(code)})"
    return "broke off, or answered something that is not HTTP"
