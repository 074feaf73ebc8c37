"""The list of gRPC's threads that a fork waits for."""

import subprocess
import sys

_SCRIPT = """
import time
import grpc
from tokenward.client import forks

def wait_until_core(runs):
    end = time.monotonic() + 10
    while forks._core_runs() is not runs:
        assert time.monotonic() < end, f"not seen: {runs=}"
        time.sleep(0.002)

assert not forks._core_runs()
channel = grpc.insecure_channel("unix:/nowhere")
wait_until_core(runs=True)  # a thread gets its name a moment after it starts
channel.close()
del channel
wait_until_core(runs=False)
"""


def test_the_core_is_seen_to_run_and_to_stop() -> None:
    """Pins the names of gRPC's threads: a release that renames them would silently bring back forks of a live core.

    In a process of its own, where nobody else uses gRPC.
    """
    subprocess.run([sys.executable, "-c", _SCRIPT], check=True, timeout=30)
