"""Who watches which credential, and what each has yet to be told: one slot per watcher and credential, newest wins.

The broker publishes and goes on; a slow stream holds up nobody and costs one slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

from tokenward.core.model import Key, Served
from tokenward.errors import TokenwardError

State = Served | TokenwardError
"""What a watcher is told: the value as it is now, or why there is none."""


class Watcher:
    """One stream's view: the newest state of each of its keys that it has not taken yet."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = frozenset(keys)
        self._slots: dict[Key, State] = {}
        self._filled = asyncio.Event()

    def offer(self, key: Key, state: State) -> None:
        """Puts `state` into the slot of `key`, over whatever was there."""
        self._slots[key] = state
        self._filled.set()

    async def changes(self) -> dict[Key, State]:
        """Waits for a change and takes all that is there."""
        await self._filled.wait()
        taken, self._slots = self._slots, {}
        self._filled.clear()
        return taken


class Watchers:
    """All watchers. Written from the event loop only."""

    def __init__(self) -> None:
        self._by_key: dict[Key, set[Watcher]] = {}

    @contextmanager
    def watch(self, keys: Iterable[Key]) -> Iterator[Watcher]:
        """A watcher of `keys` for the length of the block."""
        watcher = Watcher(keys)
        for key in watcher.keys:
            self._by_key.setdefault(key, set()).add(watcher)
        try:
            yield watcher
        finally:
            for key in watcher.keys:
                self._by_key[key].discard(watcher)
                if not self._by_key[key]:
                    del self._by_key[key]

    def publish(self, key: Key, state: State) -> None:
        """Offers `state` to everybody who watches `key`."""
        for watcher in self._by_key.get(key, ()):
            watcher.offer(key, state)

    @property
    def watched(self) -> AbstractSet[Key]:
        """The keys that somebody watches."""
        return self._by_key.keys()
