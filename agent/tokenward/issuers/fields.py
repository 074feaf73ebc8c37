"""Fields of a vault's answer as the texts that callers get."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tokenward.core.secret import Secret

RawFields = dict[str, msgspec.Raw]
"""The `data` object of an answer, its values not yet decoded."""


def secret_fields(raw: Mapping[str, msgspec.Raw]) -> dict[str, Secret]:
    """Each field as a Secret: a JSON string is itself, anything else stays its JSON text."""
    return {name: Secret(_text(bytes(value))) for name, value in raw.items()}


def _text(data: bytes) -> str:
    return msgspec.json.decode(data, type=str) if data.startswith(b'"') else data.decode()
