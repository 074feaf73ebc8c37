"""`Secret`: a value that gives nothing away until `.reveal()` is called.

Owns the one way out of a secret. It keeps no promise about memory: Python's own copies of a str cannot be wiped
(docs/threat-model.md). What it does promise is that no repr, format, log line, pickle or traceback shows the value.
"""

from __future__ import annotations

from hmac import compare_digest
from typing import NoReturn


class Secret:
    """One secret text. Equality is constant-time; hashing, pickling and copying to text are refused."""

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        """The value itself: the one way out, easy to find in a review."""
        return self.__value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return compare_digest(*(each.encode("utf-8", "surrogatepass") for each in (self.__value, other.reveal())))

    __hash__ = None  # type: ignore[assignment]  # a hash would let the value be confirmed by guessing

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never pickled")

    __getstate__ = __reduce__  # object's own hands out the slots, for whoever copies by itself
