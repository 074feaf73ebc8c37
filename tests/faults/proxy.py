"""`FaultProxy`: an HTTP/1.1 proxy before a vault's Unix socket that does wrong by rule, and counts every request.

Owns: its own Unix socket (and a loopback TCP port, where asked for), the rules, and the list of calls with their times.
A request that no rule meets goes to the vault and its answer comes back whole. Faults that spoil an answer let the
vault do what was asked first: the caller then does not know what became of it, which is the worse case.

    fault       what the caller of the vault meets
    ----------  -----------------------------------------------------------------
    Delay       the vault's answer, late
    Drip        the vault's answer, a few bytes at a time
    Reset       the head and a part of the body, then RST (on a Unix socket: an end)
    Blackhole   a connection that is accepted and never answered
    Corrupt     the head as it was, every byte of the body flipped
    Canned      an answer of ours instead of the vault's, which is not asked
    `refused`   no listener at all: refused on TCP, no file on a Unix socket
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import BaseServer, ThreadingMixIn, ThreadingTCPServer, UnixStreamServer
from typing import Any, Self

_UPSTREAM_S = 60.0
_SECRET_HEADERS = ("x-vault-token",)
_PASSED_ON = ("content-type", "retry-after", "x-vault-index", "cache-control", "location")


@dataclass(frozen=True, slots=True)
class Delay:
    """The answer comes `seconds` late."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drip:
    """The answer comes `size` bytes every `every_s` seconds, its head included."""

    size: int
    every_s: float


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset after the head and `after` bytes of the body."""

    after: int = 10


@dataclass(frozen=True, slots=True)
class Blackhole:
    """No answer, for as long as the rule stands."""


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Every byte of the body is flipped; length and head are right."""


@dataclass(frozen=True, slots=True)
class Canned:
    """`status`, `headers` and `body` instead of the vault's answer."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Fault = Delay | Drip | Reset | Blackhole | Corrupt | Canned


def saying(status: int, *errors: str, headers: Mapping[str, str] | None = None) -> Canned:
    """An answer in the vault's own form for errors."""
    body = json.dumps({"errors": list(errors)}).encode()
    return Canned(status, body, {"Content-Type": "application/json", **(headers or {})})


@dataclass(eq=False, slots=True)
class Rule:
    """`fault` for the next `count` requests (None: all) whose path, without `/v1/`, begins with `prefix`."""

    fault: Fault
    prefix: str = ""
    count: int | None = None
    lifted: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Call:
    """One request; `status` is what its caller was told, 0 for none."""

    mono: float
    method: str
    path: str
    status: int
    fault: str


class FaultProxy:
    """Stands at `address` (and at `tcp_address` with `tcp`) before the vault whose socket is `upstream`."""

    def __init__(self, *, upstream: str, socket_path: str, tcp: bool = False) -> None:
        self.upstream = upstream
        self.address = f"unix://{socket_path}"
        self.tcp_address = ""
        self._socket_path = socket_path
        self._tcp = tcp
        self._port = 0
        self._rules: list[Rule] = []
        self._calls: list[Call] = []
        self._secrets: set[str] = set()
        self._lock = threading.Lock()
        self._listeners: list[BaseServer] = []
        self._connections: set[socket.socket] = set()
        self.closed = threading.Event()

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._lift(tuple(self._rules))
        self._refuse()

    # -- rules --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def faulty(self, fault: Fault, *, prefix: str = "", count: int | None = None) -> Iterator[None]:
        """Has `fault` in force while the block runs."""
        rule = Rule(fault, prefix, count)
        with self._lock:
            self._rules.append(rule)
        try:
            yield
        finally:
            self._lift((rule,))

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Nobody listens while the block runs, and connections that were open are closed."""
        self._refuse()
        try:
            yield
        finally:
            self._listen()

    def _lift(self, rules: tuple[Rule, ...]) -> None:
        with self._lock:
            self._rules = [rule for rule in self._rules if rule not in rules]
        for rule in rules:
            rule.lifted.set()

    def rule_for(self, path: str) -> Rule | None:
        """The rule that this request meets; counted down."""
        with self._lock:
            for rule in self._rules:
                if path.startswith(rule.prefix) and rule.count != 0:
                    if rule.count is not None:
                        rule.count -= 1
                    return rule
        return None

    # -- what was seen ------------------------------------------------------------------------------------------------

    def note(self, call: Call, secrets: Iterator[str]) -> None:
        """Keeps one finished request, and the secrets that it carried."""
        with self._lock:
            self._calls.append(call)
            self._secrets.update(secrets)

    def calls(self, since: float = 0.0, until: float | None = None, *, prefix: str = "") -> list[Call]:
        """The requests that arrived from `since` to before `until`, on the monotonic clock, in order of arrival."""
        end = time.monotonic() if until is None else until
        with self._lock:
            found = [call for call in self._calls if since <= call.mono < end and call.path.startswith(prefix)]
        return sorted(found, key=lambda call: call.mono)

    def secrets(self) -> set[str]:
        """Every vault token that was sent."""
        with self._lock:
            return set(self._secrets)

    # -- the listeners ------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._socket_path)
        made: list[BaseServer] = [_UnixListener(self._socket_path, _Handler)]
        if self._tcp:
            tcp = _TcpListener(("127.0.0.1", self._port), _Handler)
            self._port = tcp.server_address[1]
            self.tcp_address = f"http://127.0.0.1:{self._port}"
            made.append(tcp)
        for listener in made:
            listener.proxy = self  # type: ignore[attr-defined]  # how a handler finds us
            threading.Thread(target=listener.serve_forever, args=(0.02,), name="fault proxy", daemon=True).start()
        self._listeners = made

    def _refuse(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.shutdown()
            listener.server_close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._socket_path)
        with self._lock:
            open_now, self._connections = self._connections, set()
        for connection in open_now:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def ended(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)


class _UnixListener(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    block_on_close = False  # a handler may sit in a black hole
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away in the middle is what this is for."""


class _TcpListener(ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """As above."""


class UpstreamConnection(http.client.HTTPConnection):
    """To an HTTP server on a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_UPSTREAM_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {text}" for name, text in self.headers.items())]
        return "\r\n".join([*lines, f"Content-Length: {len(self.body)}", "", ""]).encode("latin-1")


class _Handler(BaseHTTPRequestHandler):
    """One connection of a caller, and one of its own to the vault."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self._proxy: FaultProxy = self.server.proxy  # type: ignore[attr-defined]  # set by _listen
        self._upstream: UpstreamConnection | None = None
        self._proxy.opened(self.connection)

    def finish(self) -> None:
        self._proxy.ended(self.connection)
        if self._upstream is not None:
            self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def _serve(self) -> None:
        mono = time.monotonic()
        path = self.path.removeprefix("/v1/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        rule = self._proxy.rule_for(path)
        status = 0
        try:
            status = self._respond(rule, body)
        except (OSError, http.client.HTTPException):
            self._cut()  # the vault is not there: neither are we
        finally:
            secrets = (self.headers[name] for name in _SECRET_HEADERS if self.headers.get(name))
            fault = type(rule.fault).__name__ if rule is not None else ""
            self._proxy.note(Call(mono, self.command, path, status, fault), secrets)

    do_GET = do_POST = do_PUT = do_DELETE = do_LIST = do_PATCH = _serve  # noqa: N815 -- names that http.server looks for

    def log_message(self, *args: Any) -> None:
        pass

    # -- within -------------------------------------------------------------------------------------------------------

    def _respond(self, rule: Rule | None, body: bytes) -> int:
        """Answers by the rule; returns the status that was sent, 0 when none was."""
        fault = rule.fault if rule is not None else None
        if rule is not None and isinstance(fault, Blackhole):
            rule.lifted.wait()
            self._cut()
            return 0
        answer = _canned(fault) if isinstance(fault, Canned) else self._ask(body)
        match fault:
            case Delay(seconds):
                self._proxy.closed.wait(seconds)
            case Corrupt():
                answer = _Answer(answer.status, answer.reason, answer.headers, bytes(b ^ 0xFF for b in answer.body))
            case Reset(after):
                self.wfile.write(answer.head() + answer.body[:after])
                self._cut()
                return 0
            case Drip(size, every_s):
                self._drip(answer.head() + answer.body, size, every_s)
                return answer.status
        self.wfile.write(answer.head() + answer.body)
        return answer.status

    def _ask(self, body: bytes) -> _Answer:
        """The vault's answer, read whole. Raises OSError and HTTPException."""
        headers = {name: text for name, text in self.headers.items() if name.lower() not in {"host", "connection"}}
        reused = self._upstream is not None
        if self._upstream is None:
            self._upstream = UpstreamConnection(self._proxy.upstream)
        try:
            self._upstream.request(self.command, self.path, body=body or None, headers=headers)
            got = self._upstream.getresponse()
            read = got.read()
        except (OSError, http.client.HTTPException):
            self._upstream.close()
            self._upstream = None
            if reused and self.command == "GET" and "/creds/" not in self.path:
                return self._ask(body)  # an idle connection of ours that the vault has closed is no fault of the bench
            raise
        kept = {name: text for name, text in got.getheaders() if name.lower() in _PASSED_ON}
        return _Answer(got.status, got.reason, kept, read)

    def _drip(self, all_of_it: bytes, size: int, every_s: float) -> None:
        for start in range(0, len(all_of_it), size):
            self.wfile.write(all_of_it[start : start + size])
            if self._proxy.closed.wait(every_s):
                return

    def _cut(self) -> None:
        """Ends the connection at once; on TCP as a crash does, by RST."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()


def _canned(fault: Canned) -> _Answer:
    return _Answer(fault.status, "", fault.headers, fault.body)
