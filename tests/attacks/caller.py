"""A caller that does as it is told: `python -m tests.attacks.caller UID SOCKET`, a command in JSON on each line.

It speaks HTTP/2 by hand over one raw connection, so that it can do with it what no client library does.

    {"do": "connect"}                         opens the connection and sends the preface
    {"do": "ask", "path": ..., "name": ...}   answers with all that came back, as text
    {"do": "listen", "at": NAME}              listens at an abstract name, and with
    {"do": "receive"}                         takes a connection that it is passed there for its own
    {"do": "pass", "to": NAME}                sends the connection there (SCM_RIGHTS)
    {"do": "fork"}                            goes on as a child of it; the parent lives until "orphan"
    {"do": "orphan"}                          ends the parent
    {"do": "exec"}                            the same, and the parent, which connected, runs another program
    {"do": "grpc", "name": ..., "metadata": [...], "authority": ...}    asks by grpcio, on a channel of its own
    {"do": "exit"}
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from tests.attacks.wire import Speaker, speaking

_PROGRAM = "/bin/sleep"


class Actor:
    """Holds the connection."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._speaker: Speaker | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._parent = 0
        self._values: dict[str, str] = {}

    def does(self, told: dict[str, Any]) -> object:
        return getattr(self, f"do_{told.pop('do')}")(**told)

    def do_connect(self) -> str:
        self._speaker = speaking(self._path)
        return "connected"

    def do_ask(self, path: str, name: str = "") -> str:
        return self._speaking().ask(path, name).decode("latin-1")

    def do_pass(self, to: str) -> str:
        with socket.socket(socket.AF_UNIX) as way:
            way.connect(f"\0{to}")
            socket.send_fds(way, [b"x"], [self._speaking().sock.fileno()])  # waits in the queue until it is received
        return "passed"

    def do_listen(self, at: str) -> str:
        self._listener.bind(f"\0{at}")
        self._listener.listen()
        return "listening"

    def do_receive(self) -> str:
        way, _ = self._listener.accept()
        with way:
            _, fds, _, _ = socket.recv_fds(way, 1, 1)
        sock = socket.socket(fileno=fds[0])
        sock.settimeout(15)
        self._speaker = Speaker(sock)
        return "received"

    def do_fork(self) -> str:
        parent = os.getpid()
        if os.fork():
            signal.pause()
        self._parent = parent
        return "forked"

    def do_orphan(self) -> str:
        end = os.pidfd_open(self._parent)
        os.kill(self._parent, signal.SIGKILL)
        select.select([end], [], [], 10)  # until it is dead; a signal alone only says that it will be
        os.close(end)
        return "orphaned"

    def do_exec(self) -> str:
        if os.fork():
            os.execv(_PROGRAM, [_PROGRAM, "60"])
        return "forked"

    def _speaking(self) -> Speaker:
        assert self._speaker is not None
        return self._speaker

    def do_grpc(
        self, name: str, metadata: list[list[str]], authority: str = "", method: str = "GetCredential"
    ) -> object:
        import grpc

        from tokenward.v1 import credentials_pb2 as pb
        from tokenward.v1 import credentials_pb2_grpc as rpc

        options = [("grpc.default_authority", authority)] if authority else []
        fields = tuple((key, base64.b64decode(value) if key.endswith("-bin") else value) for key, value in metadata)
        with grpc.insecure_channel(f"unix:{self._path}", options=options) as channel:
            try:
                if method == "GetIdentity":
                    found = rpc.IdentityServiceStub(channel).GetIdentity(
                        pb.GetIdentityRequest(), metadata=fields, timeout=15
                    )
                    return {"code": "OK", "workload": found.workload}
                got = rpc.CredentialServiceStub(channel).GetCredential(
                    pb.GetCredentialRequest(name=name), metadata=fields, timeout=15
                )
                self._values = dict(got.credential.values)  # as an application keeps them
            except grpc.RpcError as error:
                call: Any = error
                return {"code": call.code().name, "text": call.details()}
            return {"code": "OK", "values": self._values}


def main() -> None:
    """Does what it is told until stdin ends."""
    import grpc._channel
    import grpc._observability  # noqa: F401

    import tokenward.v1.credentials_pb2_grpc  # noqa: F401 -- all that is imported late

    uid, path = int(sys.argv[1]), sys.argv[2]
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    actor = Actor(path)
    while line := sys.stdin.readline():
        told = json.loads(line)
        if told["do"] == "exit":
            return
        print(json.dumps(actor.does(told)), flush=True)


if __name__ == "__main__":
    main()
