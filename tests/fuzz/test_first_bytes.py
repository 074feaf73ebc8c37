"""Whatever comes first, in whatever pieces: judged without an error, and only a whole preface is ever passed on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tokenward.attest.attestor import Attestor
from tokenward.serve.first_bytes import PREFACE, Verdict, judge
from tokenward.serve.front_door import DoorLimits, FrontDoor
from tokenward.serve.listener import bind

PIECES = st.one_of(
    st.binary(max_size=40),
    st.integers(0, len(PREFACE)).map(lambda length: PREFACE[:length]),
    st.integers(0, len(PREFACE)).map(lambda start: PREFACE[start:]),
    st.sampled_from([PREFACE, b"GET / HTTP/1.1\r\n", b"\r\n\r\n", b"\n\n", b"Host: a\r\n"]),
    st.integers(1, 9000).map(lambda length: b"x" * length),
)
CHUNKS = st.lists(PIECES, max_size=6)


@given(CHUNKS)
@example([PREFACE[:-1], b"x"])
@example([PREFACE[:16], b"\r\n"])
@settings(max_examples=300, deadline=None)
def test_a_judgement_does_not_change_with_more_bytes(chunks: list[bytes]) -> None:
    so_far, judged = b"", Verdict.UNDECIDED
    for chunk in chunks:
        so_far += chunk
        verdict = judge(so_far, max_head_bytes=8192)
        if judged is not Verdict.UNDECIDED:
            assert verdict is judged
        assert (verdict is Verdict.GRPC) == so_far.startswith(PREFACE)
        judged = verdict


class Behind:
    """What stands in grpcio's place and keeps all that reaches it."""

    def __init__(self) -> None:
        self.got = bytearray()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.got += data
        writer.close()


@contextlib.asynccontextmanager
async def door(behind: Behind) -> AsyncIterator[tuple[FrontDoor, str]]:
    with tempfile.TemporaryDirectory(prefix="door-") as directory:
        inner = f"{directory}/inner.sock"
        server = await asyncio.start_unix_server(behind.take, inner)
        listener = bind(f"{directory}/public.sock")
        made = FrontDoor(
            listener=listener.socket,
            inner_path=inner,
            attestor=Attestor(workloads=()),
            limits=DoorLimits(first_bytes_s=0.5),
        )
        serving = asyncio.create_task(made.serve())
        try:
            yield made, listener.path
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            listener.close()
            server.close()
            await server.wait_closed()


async def say(path: str, chunks: list[bytes]) -> bytes:
    """Send `chunks` one by one, then nothing more; what came back."""
    reader, writer = await asyncio.open_unix_connection(path)
    answer = b""
    with contextlib.suppress(OSError):
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return answer


@given(st.lists(CHUNKS, min_size=1, max_size=8))
@example([[PREFACE[:5], PREFACE[5:], b"frames"]])
@example([[PREFACE[:16], b"\r\nxx"]])
@example([[b"GET / HTTP/1.1\r\n", b"\r\n"]])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_but_a_whole_preface_reaches_the_server_and_the_door_stands(clients: list[list[bytes]]) -> None:
    async def body() -> None:
        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        for chunks in clients:
            said = b"".join(chunks)
            behind = Behind()
            async with door(behind) as (at, path):
                answer = await say(path, chunks)
                if said.startswith(PREFACE):
                    assert bytes(behind.got) == said
                    assert answer == b""
                else:
                    assert not behind.got
                    assert answer.startswith(b"HTTP/1.1 ") == bool(said)
                await say(path, [PREFACE, b"still served"])
                assert bytes(behind.got).endswith(PREFACE + b"still served")
                assert at.connections == 0
        assert not failures

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(body())
    assert len(os.listdir("/proc/self/fd")) == before
