"""`FakeVault`: a vault over real HTTP that keeps tokens, roles and KV secrets, and that can lie on demand.

It answers as OpenBao does for what the agent asks of it, in the same words, and fails as it does: sealed, frozen,
without a leader, with a broken audit device. Put a lie into `lies`, and the next request gets that instead of an
answer: a redirect, a body without end, bytes that are no HTTP.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import os
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import BaseServer, ThreadingMixIn, ThreadingTCPServer, UnixStreamServer
from typing import Any

NO_TOKEN = "permission denied"
NO_POLICY = "1 error occurred:\n\t* permission denied\n\n"


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class Token:
    """What a token may read (path prefixes), and how long it was made for."""

    may_read: tuple[str, ...]
    ttl_s: int
    accessor: str


@dataclass(slots=True)
class FakeVault:
    """The state of the vault; change it at any time. `roles` maps a JWT role to the path prefixes it may read.

    A node that is `frozen` (SIGSTOP) takes requests and answers none, health checks neither, until it no longer is. One
    with a `dead_leader` is a standby whose leader at that address is gone: it reads KV, and redirects all else.
    """

    sealed: bool = False
    uninitialized: bool = False
    frozen: bool = False
    audit_broken: bool = False
    dead_leader: str = ""
    secrets: dict[str, dict[str, Any]] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: dict[str, Token] = field(default_factory=dict)
    token_ttl_s: int = 300
    renewal_ttl_s: int = 300
    lies: deque[Callable[[Handler], None]] = field(default_factory=deque)
    requests: list[Seen] = field(default_factory=list)
    connections: int = 0
    address: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)
    _number: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def new_token(self, may_read: tuple[str, ...], *, ttl_s: int | None = None) -> str:
        number = next(self._number)
        ttl_s = self.token_ttl_s if ttl_s is None else ttl_s
        self.tokens[f"s.token-{number}"] = Token(may_read, ttl_s, f"accessor-{number}")
        return f"s.token-{number}"

    def health_status(self) -> int:
        if self.uninitialized:
            return 501
        return 503 if self.sealed else 429 if self.dead_leader else 200

    def asked_for(self, path: str) -> list[Seen]:
        return [seen for seen in self.requests if seen.path.split("?")[0] == f"/v1/{path}"]


class Handler(BaseHTTPRequestHandler):
    """One connection; a lie gets this, and may write to `wfile` or break `connection` as it likes."""

    protocol_version = "HTTP/1.1"
    vault: FakeVault

    def setup(self) -> None:
        super().setup()
        self.vault.connections += 1

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the caller gave up in the middle
            self.close_connection = True
            return
        self.vault.requests.append(Seen(self.command, self.path, dict(self.headers.items()), body))
        lie = self.vault.lies.popleft() if self.vault.lies else None
        self.close_connection = lie is not None
        try:
            if lie is not None:
                lie(self)
                return
            while self.vault.frozen and not self.vault.stopped.wait(0.01):
                pass
            self._answer(json.loads(body) if body else {})
        except OSError:  # the caller did not wait
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_LIST = _serve  # noqa: N815 -- names that http.server looks for

    def send(self, status: int, content: object = None, headers: Mapping[str, str] | None = None) -> None:
        body = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, *errors: str, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, {"errors": list(errors)}, headers)

    def _answer(self, body: dict[str, Any]) -> None:
        vault, path = self.vault, self.path.removeprefix("/v1/").split("?")[0]
        if path == "sys/health":
            return self.send(vault.health_status(), {"sealed": vault.sealed})
        if vault.sealed or vault.uninitialized:
            return self.refuse(503, "Vault is sealed")
        if vault.audit_broken:
            return self.refuse(500, "internal error")
        if vault.dead_leader and not path.startswith("secret/"):
            return self.send(307, b"", {"Location": f"{vault.dead_leader}{self.path}"})
        if path == "auth/jwt/login":
            if body.get("role") not in vault.roles:
                return self.refuse(400, f'role "{body.get("role")}" could not be found')
            return self._auth(vault.new_token(vault.roles[body["role"]]), "login")
        may_read = self._rights()
        if may_read is None:
            return None
        token = self.headers.get("X-Vault-Token", "")
        if path == "auth/token/renew-self":
            vault.tokens[token].ttl_s = vault.renewal_ttl_s
            return self._auth(token, "renewal")
        if path == "auth/token/revoke-self":
            del vault.tokens[token]
            return self.send(204)
        if path == "auth/token/lookup-self":
            known = vault.tokens[token]
            return self._data({"ttl": known.ttl_s, "accessor": known.accessor, "renewable": known.ttl_s > 0})
        if path.startswith("auth/token/create/"):
            role = path.rpartition("/")[2]
            return self._auth(vault.new_token(vault.roles[role]), "child")
        return self._read(path, may_read)

    def _rights(self) -> tuple[str, ...] | None:
        """What the caller may read; None when it was refused."""
        if "X-Vault-Inline-Auth-Path" in self.headers:
            pairs = [self._parameter(number) for number in (1, 2)]
            role = {pair["key"]: pair["value"] for pair in pairs}.get("role", "")
            if role not in self.vault.roles:
                self.refuse(400, f'role "{role}" could not be found')
                return None
            return self.vault.roles[role]
        known = self.vault.tokens.get(self.headers.get("X-Vault-Token", ""))
        if known is None:
            self.refuse(403, NO_TOKEN)
            return None
        return known.may_read

    def _parameter(self, number: int) -> dict[str, str]:
        encoded = self.headers[f"X-Vault-Inline-Auth-Parameter-{number}"]
        decoded: dict[str, str] = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
        return decoded

    def _read(self, path: str, may_read: tuple[str, ...]) -> None:
        if not path.startswith(may_read):
            return self.refuse(403, NO_POLICY)
        if path in self.vault.deleted:
            metadata = {"deletion_time": "2026-01-01T00:00:00Z", "destroyed": False, "version": 1}
            return self.send(404, {"request_id": "r", "data": {"data": None, "metadata": metadata}})
        if path not in self.vault.secrets:
            return self.refuse(404)
        return self._data({"data": self.vault.secrets[path], "metadata": {"version": 1}})

    def _data(self, data: object) -> None:
        self.send(
            200, {"request_id": f"request-{next(self.vault._number)}", "lease_id": "", "auth": None, "data": data}
        )

    def _auth(self, token: str, request_id: str) -> None:
        known = self.vault.tokens[token]
        auth = {
            "client_token": token,
            "accessor": known.accessor,
            "lease_duration": known.ttl_s,
            "renewable": known.ttl_s > 0,
        }
        self.send(200, {"request_id": request_id, "data": None, "auth": auth})


class _UnixServer(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


class _TcpServer(ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def serving(
    vault: FakeVault, *, socket_path: str | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[FakeVault]:
    """Serves `vault` on a Unix socket, or else on a TCP port of 127.0.0.1, and sets its `address`."""
    handler = type("VaultHandler", (Handler,), {"vault": vault})
    server: BaseServer
    if socket_path is not None:
        server = _UnixServer(socket_path, handler)
        vault.address = f"unix://{socket_path}"
    else:
        tcp = server = _TcpServer(("127.0.0.1", 0), handler)
        if tls is not None:
            tcp.socket = tls.wrap_socket(tcp.socket, server_side=True, do_handshake_on_connect=False)
        vault.address = f"{'https' if tls else 'http'}://127.0.0.1:{tcp.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="fake vault")
    thread.start()
    try:
        yield vault
    finally:
        vault.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
        if socket_path is not None:
            os.unlink(socket_path)


# -- lies --------------------------------------------------------------------------------------------------------------

Lie = Callable[[Handler], None]


def says(status: int, content: object = None, **headers: str) -> Lie:
    """Any status, body and headers (`retry_after="3"`)."""
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return lambda handler: handler.send(status, content, named)


def refuses(status: int, *errors: str, **headers: str) -> Lie:
    """A refusal as a vault words it."""
    return says(status, {"errors": list(errors)}, **headers)


def redirects(to: str, *, body: bytes = b"", **headers: str) -> Lie:
    """What a standby says whose leader is gone."""
    return says(307, body, location=to, **headers)


def gzip_bomb(size: int) -> bytes:
    """`size` zeros, packed a thousand to one."""
    return gzip.compress(bytes(size))


def huge(size: int, *, declared: bool = True) -> Lie:
    """A body of `size` bytes, with or without saying so first."""

    def lie(handler: Handler) -> None:
        length = f"Content-Length: {size}\r\n" if declared else ""
        handler.wfile.write(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode())
        for _ in range(size // 65536):
            handler.wfile.write(bytes(65536))

    return lie


def endless(first: bytes, then: bytes, *, every_s: float = 0.0) -> Lie:
    """`first`, and then `then` again and again until the other side has had enough."""

    def lie(handler: Handler) -> None:
        handler.wfile.write(first)
        while not handler.vault.stopped.wait(every_s):
            handler.wfile.write(then)

    return lie


DRIP = endless(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" ", every_s=0.05)
HEADER_DRIP = endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", every_s=0.05)
CONTINUES = endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n")
CHUNK_LINE = endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 65536)


def writes(raw: bytes) -> Lie:
    """Bytes of any kind, then the end."""
    return lambda handler: (handler.wfile.write(raw), None)[1]


def hangs(handler: Handler) -> None:
    """Takes the request and never answers."""
    handler.vault.stopped.wait()


def resets(handler: Handler) -> None:
    """Breaks the connection: a TCP reset, or the end of a Unix socket."""
    if handler.connection.family == socket.AF_INET:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def cut_off(first: bytes) -> Lie:
    """`first`, of an answer that promises more, and then a reset."""

    def lie(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + first)
        handler.wfile.flush()
        resets(handler)

    return lie
