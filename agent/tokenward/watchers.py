"""Who watches which credential, and what each has yet to be told: one slot per watcher and credential, newest wins.

The broker publishes and goes on; a slow stream holds up nobody and costs one slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

from tokenward.core.model import Key, Served
from tokenward.errors import TokenwardError

State = Served | TokenwardError
"""What a watcher is told: the value as it is now, or why there is none."""


class Watcher:
    """One stream's view: the newest state of each of its keys that it has not taken yet.

    `owner` is whoever may acknowledge for it: the caller of its connection.
    """

    def __init__(self, keys: Iterable[Key], owner: object) -> None:
        self.keys = frozenset(keys)
        self.owner = owner
        self.acknowledged: dict[Key, int] = {}
        """The highest version of each key that the owner said it uses."""
        self._slots: dict[Key, State] = {}
        self._filled = asyncio.Event()
        self._over: TokenwardError | None = None

    def offer(self, key: Key, state: State) -> None:
        """Puts `state` into the slot of `key`, over whatever was there."""
        self._slots[key] = state
        self._filled.set()

    def end(self, error: TokenwardError) -> None:
        """Nothing more will be offered, because of `error`; what is in the slots still arrives."""
        self._over = error
        self._filled.set()

    async def changes(self) -> dict[Key, State]:
        """Waits for a change and takes all that is there. Raises the error with which it was ended."""
        await self._filled.wait()
        if self._over is not None and not self._slots:
            raise self._over.with_traceback(None)
        taken, self._slots = self._slots, {}
        if self._over is None:
            self._filled.clear()
        return taken


class Watchers:
    """All watchers. Written from the event loop only."""

    def __init__(self) -> None:
        self._by_key: dict[Key, set[Watcher]] = {}
        self._lent: dict[Key, int] = {}

    @contextmanager
    def watch(self, keys: Iterable[Key], owner: object) -> Iterator[Watcher]:
        """A watcher of `keys` for the length of the block, that `owner` acknowledges for."""
        watcher = Watcher(keys, owner)
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

    def end(self, error: TokenwardError, workloads: Container[str] | None = None) -> None:
        """Ends every watcher, or those of `workloads`: their streams close with `error`, and whoever comes back is
        told everything anew."""
        for watchers in self._by_key.values():
            for watcher in watchers:
                if workloads is None or any(key.workload in workloads for key in watcher.keys):
                    watcher.end(error)

    def acknowledge(self, owner: object, key: Key, version: int) -> bool:
        """`owner` uses `version` of `key` now. Whether everybody who was given the one before has moved on."""
        watchers = self._by_key.get(key, set())
        for watcher in watchers:
            if watcher.owner is owner:
                watcher.acknowledged[key] = max(version, watcher.acknowledged.get(key, 0))
        all_have = all(watcher.acknowledged.get(key, 0) >= version for watcher in watchers)
        return bool(watchers) and all_have and self._lent.get(key) != version - 1

    def lend(self, owner: object, key: Key, version: int) -> None:
        """`version` of `key` was given to `owner`: unless it watches, nobody will hear from it when it has moved on."""
        if not any(watcher.owner is owner for watcher in self._by_key.get(key, ())):
            self._lent[key] = version

    @property
    def watched(self) -> AbstractSet[Key]:
        """The keys that somebody watches."""
        return self._by_key.keys()
