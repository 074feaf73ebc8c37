"""Where log lines go and how they look. Nothing else configures logging."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import msgspec

_OURS = "tokenward"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(level: str, *, form: str = "text") -> None:
    """Lines to stderr at `level` and above, as text or as JSON.

    Debug lines are ours alone: those of libraries describe what passes through them.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger(_OURS).setLevel(logging.getLogger().level)
    logging.getLogger().setLevel(max(logging.INFO, logging.getLogger().level))
