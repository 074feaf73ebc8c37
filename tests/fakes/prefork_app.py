"""An application that forks, as prefork servers do: a parent with live handles, and children that use them too.

    python -m tests.fakes.prefork_app SOCKET CHILDREN [own-grpc]

Parent and children print one JSON line when they have a fresh `get` and a handle's value, and one when the handle shows
a later version. The parent goes on getting from two threads while it forks. With `own-grpc` the application also has a
gRPC channel of its own, so that gRPC's core cannot stop before the fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import grpc

from tokenward import Client, CredentialHandle, DeniedError
from tokenward.client import forks
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc

_PATIENCE_S = 15


def say(event: str, **facts: object) -> None:
    os.write(1, (json.dumps({"event": event, "pid": os.getpid(), **facts}) + "\n").encode())


def use(client: Client, handle: CredentialHandle, role: str) -> None:
    before = handle.value["password"]
    say("ready", role=role, got=client.get("other").version, value=before)
    end_mono = time.monotonic() + _PATIENCE_S
    while handle.value["password"] == before and time.monotonic() < end_mono:
        time.sleep(0.005)
    say("stuck" if handle.value["password"] == before else "rotated", role=role)


def refused(use: Callable[[], object]) -> DeniedError:
    """The error that `use` raises: programs keep such errors, which must not keep anything of gRPC with them."""
    try:
        use()
    except DeniedError as error:
        return error
    raise AssertionError("it was not refused")


def main(socket: str, children: int, own_grpc: bool) -> int:
    signal.alarm(60)
    core_ran: list[bool] = []
    # Hooks before a fork run in the reverse order of their registration: this one after the client's.
    os.register_at_fork(before=lambda: core_ran.append(forks._core_runs()))
    if own_grpc:
        channel = grpc.insecure_channel(f"unix:{socket}")
        rpc.CredentialServiceStub(channel).ListGrants(pb.ListGrantsRequest())
    client = Client(socket)
    handle = client.credential("db")
    assert handle.value
    kept = [refused(lambda: client.get("not-granted")), refused(lambda: client.credential("not-granted").value)]
    failures: list[BaseException] = []
    threading.excepthook = lambda args: failures.append(args.exc_value or RuntimeError())
    done = threading.Event()

    def busy() -> None:
        while not done.is_set():
            client.get("other")

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    pids = []
    for _ in range(children):
        began_mono = time.monotonic()
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            use(client, handle, "child")
            client.close()
            os._exit(0)
        say("forked", child=pid, core_ran=core_ran[-1], took_s=time.monotonic() - began_mono)
        pids.append(pid)
    use(client, handle, "parent")
    done.set()
    for thread in threads:
        thread.join()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    say("end", kept=len(kept), codes=codes, failures=[repr(failure) for failure in failures])
    client.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), "own-grpc" in sys.argv[3:]))
