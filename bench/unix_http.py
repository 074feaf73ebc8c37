"""HTTP/1.1 over a Unix socket with one connection kept open: how the vault and the proxy are asked."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any

_TIMEOUT_S = 10.0


class UnixHttp(http.client.HTTPConnection):
    """A connection to the server that listens at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Called by http.client when it needs a connection."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def call(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer. Raises OSError where there is none."""
        data = None if body is None else json.dumps(body)
        self.request(method, f"/v1/{path}", data, dict(headers or {}))
        answer = self.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else {}
