"""What a client last heard of each credential that it keeps current.

Owns the state of one credential: nothing heard yet, a value, or the reason why there is none. Leaves hearing to
`watcher`. Invariant: `live` is only ever a value of the agent's latest word, and nobody reads it after it has expired.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future

from tokenward.client.credentials import Change, Credential, Values
from tokenward.errors import Reason, TokenwardError

_log = logging.getLogger("tokenward.client")


class Slot:
    """One credential. Written with the watcher's lock held, read by any thread.

    `live` is what reading a value comes down to: the values and when they end, in seconds since the epoch. It is None
    when reading takes more than that, be it an error, a wait, or the first use in a forked child.
    """

    __slots__ = ("callbacks", "change", "live", "name", "told")

    def __init__(self, name: str) -> None:
        self.name = name
        self.live: tuple[Values, float] | None = None
        self.change = Change(name=name)
        self.told: Future[None] = Future()
        """Done as soon as the agent has said anything."""
        self.callbacks: list[Callable[[Change], object]] = []

    def take(self, change: Change) -> bool:
        """Takes the agent's latest word; whether it is news."""
        news = not is_same(change, self.change)
        self.change = change
        self.live = _live(change.credential)
        if not self.told.done():
            self.told.set_result(None)
        return news

    def is_live(self, now: float) -> bool:
        """Whether the value may be handed out at `now`, in seconds since the epoch."""
        live = _live(self.change.credential)
        return live is not None and now < live[1]

    def wake(self) -> None:
        """Lets `live` be read again after `sleep`."""
        self.live = _live(self.change.credential)

    def sleep(self) -> None:
        """In a forked child: has the next reader ask for the watcher first. Keeps what is known."""
        self.live = None
        self.told = Future()  # its lock may have been held by a thread that does not exist here
        if self.change.credential is not None or self.change.error is not None:
            self.told.set_result(None)

    def clear(self) -> None:
        """Forgets the value."""
        self.live = None
        self.change = Change(name=self.name)

    def call_back(self, change: Change) -> None:
        """Tells those who asked to be told."""
        for callback in tuple(self.callbacks):
            try:
                callback(change)
            except Exception:  # noqa: BLE001 -- the application's own code: its failure must not end the stream
                _log.exception("a callback for changes of the credential %s failed", self.name)


def is_same(change: Change, before: Change) -> bool:
    """Whether `change` says nothing new to somebody who knows `before`."""
    return change.credential == before.credential and _cause(change.error) == _cause(before.error)


def _cause(error: TokenwardError | None) -> Reason | None:
    return error.reason if error is not None else None


def _live(credential: Credential | None) -> tuple[Values, float] | None:
    if credential is None:
        return None
    ends = credential.expires_at.timestamp() if credential.expires_at is not None else math.inf
    return credential.values, ends
