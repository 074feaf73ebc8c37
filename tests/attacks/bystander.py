"""The well-behaved caller's program: `python -m tests.attacks.bystander UID SOCKET`, another user than any attacker.

One thread asks for its credential on a connection that it keeps; another makes a new client for each question. At each
line on stdin it prints what both met since the line before, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import grpc._channel
import grpc._observability

import tokenward.client.sync  # noqa: F401 -- all that is imported late: another user may not read the files
from tokenward.client import Client
from tokenward.v1 import credentials_pb2 as pb
from tokenward.v1 import credentials_pb2_grpc as rpc

_PATIENCE_S = 20.0
_KEPT_PACE_S = 0.025
_NEW_PACE_S = 0.2


class Tally:
    """Latencies and errors of one way to ask."""

    def __init__(self) -> None:
        self.waits_s: list[float] = []
        self.errors: list[str] = []

    def taken(self) -> dict[str, object]:
        """What was met so far, as JSON can say it."""
        waits, errors = sorted(self.waits_s), list(self.errors)
        self.waits_s, self.errors = [], []
        p99 = waits[int(len(waits) * 0.99)] * 1000 if waits else 0.0
        return {"asked": len(waits), "p99_ms": p99, "most_ms": waits[-1] * 1000 if waits else 0.0, "errors": errors}


def _keep_asking(path: str, tally: Tally) -> None:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        get = rpc.CredentialServiceStub(channel).GetCredential
        while True:
            began = time.monotonic()
            try:
                get(pb.GetCredentialRequest(name="own"), timeout=_PATIENCE_S)
            except grpc.RpcError as error:
                tally.errors.append(f"{error.code()}: {error.details()}")
            tally.waits_s.append(time.monotonic() - began)
            time.sleep(_KEPT_PACE_S)


def _come_anew(path: str, tally: Tally) -> None:
    while True:
        began = time.monotonic()
        try:
            with Client(path, timeout_s=_PATIENCE_S) as client:
                client.get("own")
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is the test's finding
            tally.errors.append(repr(error))
        tally.waits_s.append(time.monotonic() - began)
        time.sleep(_NEW_PACE_S)


def main() -> None:
    """Asks until stdin ends."""
    uid, path = int(sys.argv[1]), sys.argv[2]
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kept, new = Tally(), Tally()
    for target, tally in ((_keep_asking, kept), (_come_anew, new)):
        threading.Thread(target=target, args=(path, tally), daemon=True).start()
    for _ in sys.stdin:
        print(json.dumps({"kept": kept.taken(), "new": new.taken()}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
