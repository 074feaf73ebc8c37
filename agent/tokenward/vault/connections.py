"""The connections to one vault address: verified, pooled, and bounded in what a reply may weigh and take.

Owns TLS with the configured files and nothing of the environment, Unix sockets, and a limit for the bytes and the time
of each reply as a whole, status line, headers and framing included: urllib3 bounds neither. It leaves requests and
their meaning to `transport`.
"""

from __future__ import annotations

import functools
import http.client
import io
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import urllib3

# urllib3 logs the raw text of a malformed reply; nothing that a vault says is written to our log.
logging.getLogger("urllib3.connection").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files: the CA that is trusted (empty: the system's), our own certificate and its key."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def stamps(self) -> tuple[object, ...]:
        """Changes when one of the files is replaced. Raises OSError when one cannot be read."""
        named = [path for path in (self.ca_file, self.cert_file, self.key_file) if path]
        return tuple((s.st_dev, s.st_ino, s.st_mtime_ns, s.st_size) for s in map(os.stat, named))

    def context(self) -> ssl.SSLContext:
        """A context that verifies chain and name. Raises OSError (ssl.SSLError is one)."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the ssl module's own default would obey SSLKEYLOGFILE
        if self.ca_file:
            made.load_verify_locations(self.ca_file)
        else:
            made.load_default_certs()
        if self.cert_file:
            made.load_cert_chain(self.cert_file, self.key_file or None)
        return made


class Server:
    """The connections to one address; it alone decides how they are made and verified."""

    def __init__(self, *, address: str, tls: TlsFiles, max_reply_bytes: int, connections: int) -> None:
        self._address = urlsplit(address)
        self._tls = tls
        self._options: dict[str, Any] = {"maxsize": connections, "max_reply_bytes": max_reply_bytes}
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._stamps: tuple[object, ...] = ()
        self._lock = threading.Lock()

    def pool(self) -> urllib3.HTTPConnectionPool:
        """The pool to ask; a new one when a TLS file was replaced. Raises OSError when one cannot be read."""
        with self._lock:
            stamps = self._tls.stamps() if self._address.scheme == "https" else ()
            if self._pool is None or stamps != self._stamps:
                if self._pool is not None:
                    self._pool.close()
                self._pool, self._stamps = self._new_pool(), stamps
            return self._pool

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        at = self._address
        if at.scheme == "unix":
            return _UnixPool("localhost", socket_path=at.path, **self._options)
        if at.scheme == "https":
            context = self._tls.context()
            return _TlsPool(at.hostname or "", at.port, ssl_context=context, **self._options)
        return _Pool(at.hostname or "", at.port, **self._options)

    def close(self) -> None:
        """Closes what is idle at once, and what is in use when its answer is there."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()


class ReplyTooLongError(Exception):
    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.max_bytes = max_bytes


class _BoundedReader(io.RawIOBase):
    """Reads a socket until `max_bytes` or `deadline`, whichever is first."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, *, max_bytes: int, deadline: float) -> None:
        self._raw = raw
        self._sock = sock
        self._max_bytes = self._left = max_bytes
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._sock.settimeout(left_s)
        count = self._raw.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise ReplyTooLongError(self._max_bytes)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """Bounds all that is read for one reply: status line, headers, chunk framing and body."""

    def __init__(self, sock: socket.socket, *args: Any, max_bytes: int, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        raw = self.fp.detach()
        self.fp = io.BufferedReader(_BoundedReader(raw, sock, max_bytes=max_bytes, deadline=deadline))


class _BoundedReplies:
    """Mixed into urllib3's connections: `timeout` becomes the limit for a whole reply, not for one read of it."""

    timeout: float | None
    response_class: Any

    def __init__(self, *args: Any, max_reply_bytes: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_reply_bytes = max_reply_bytes

    def getresponse(self) -> Any:
        assert self.timeout is not None
        self.response_class = functools.partial(
            _BoundedResponse, max_bytes=self._max_reply_bytes, deadline=time.monotonic() + self.timeout
        )
        return super().getresponse()  # type: ignore[misc]  # of the connection that this is mixed into


class _Connection(_BoundedReplies, urllib3.connection.HTTPConnection):
    pass


class _TlsConnection(_BoundedReplies, urllib3.connection.HTTPSConnection):
    pass


class _UnixConnection(_BoundedReplies, urllib3.connection.HTTPConnection):
    def __init__(self, *args: Any, socket_path: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._socket_path = socket_path

    def connect(self) -> None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(self.timeout)
            made.connect(self._socket_path)
        except OSError as error:
            made.close()
            raise urllib3.exceptions.NewConnectionError(self, "cannot connect") from error
        self.sock = made


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _UnixPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _UnixConnection


def causes(error: BaseException) -> Iterator[BaseException]:
    """Every error in and behind `error`, the innermost first: urllib3 wraps in two ways."""
    inner: list[object] = [error.__cause__, error.__context__, *error.args]
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from causes(cause)
            break
    yield error
