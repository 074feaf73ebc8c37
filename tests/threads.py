"""Something that needs an event loop of its own, run in a thread beside the test."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

T = TypeVar("T")


class InThread(ABC):
    """Runs `main` in a thread for the length of the block; `directory` is made and removed by it.

    `main` calls `serve` when all is there, which returns when the block ends. What it raises, the block raises.
    """

    def __init__(self, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.loop: asyncio.AbstractEventLoop
        self.directory = ""
        self._loop_factory = loop_factory
        self._stop: asyncio.Event
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    @abstractmethod
    async def main(self) -> None:
        """Builds, serves, and ends what it built."""

    async def serve(self) -> None:
        """Lets the block begin, and returns at its end."""
        self._ready.set()
        await self._stop.wait()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, run in the thread's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="tw-")
        self.directory = self._temporary.name
        os.chmod(self.directory, 0o755)  # other users' processes connect too
        self._thread.start()
        assert self._ready.wait(20)
        if self._failed is not None:
            raise self._failed
        return self

    def __exit__(self, *_: object) -> None:
        if self._failed is None:
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        self._temporary.cleanup()
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                runner.run(self._begin())
        except BaseException as error:  # noqa: BLE001 -- the thread hands it to the test
            self._failed = error
        finally:
            self._ready.set()

    async def _begin(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await self.main()
