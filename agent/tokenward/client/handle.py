"""What the handles of both clients have in common: a credential whose `.value` is a local read.

Owns the fast path. Leaves the slow one, where a handle may have to wait, to `sync` and `aio`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from tokenward.client.credentials import Credential, Values
from tokenward.client.slots import Slot


class Handle(ABC):
    """One credential, kept current in the background by its client, for as long as the client is open."""

    __slots__ = ("_slot",)

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    @property
    def name(self) -> str:
        """The credential's name."""
        return self._slot.name

    @property
    def value(self) -> Values:
        """The fields as they are now: always the mapping, also when there is only one, `handle.value["api_key"]`.

        Read it each time it is needed instead of keeping it: that costs less than a microsecond and no system call.
        Raises TokenwardError: what the agent said instead of a value, or that the value has expired.
        """
        live = self._slot.live
        if live is not None and time.time() < live[1]:
            return live[0]
        return self.credential.values

    @property
    @abstractmethod
    def credential(self) -> Credential:
        """All that is known of the current version. Raises as `value` does."""

    @property
    def version(self) -> int:
        """The current version's number. Raises as `value` does."""
        return self.credential.version

    @property
    def stale(self) -> bool:
        """Whether the planned refresh failed; the value is still good until its expiry. Raises as `value` does."""
        return self.credential.stale

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
