"""Figures, the targets of the design that they are held against, and the two forms in which they are told."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked of a figure."""

    at_least: float | None = None
    below: float | None = None
    below_theirs: bool = False

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:,g}"
        return f"< {self.below:,g}" if self.below is not None else "< bao's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. Each side is the median of its samples; `theirs` is empty where bao has no such thing."""

    what: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    target: Target | None = None

    @property
    def ratio(self) -> float | None:
        """Ours divided by theirs."""
        their = self.their_median
        return self.median / their if their else None

    @property
    def median(self) -> float:
        """Ours."""
        return statistics.median(self.ours)

    @property
    def their_median(self) -> float | None:
        """Theirs."""
        return statistics.median(self.theirs) if self.theirs else None

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached, None where there is none."""
        target, their = self.target, self.their_median
        if target is None:
            return None
        if target.below_theirs:
            return their is not None and self.median < their
        if target.at_least is not None:
            return self.median >= target.at_least
        return target.below is not None and self.median < target.below


def table(figures: Iterable[Figure]) -> str:
    """For people."""
    rows = [("", "unit", "tokenward", "bao", "ratio", "target", "")]
    for figure in figures:
        their, ratio = figure.their_median, figure.ratio
        rows.append(
            (
                figure.what,
                figure.unit,
                _number(figure.median),
                _number(their) if their is not None else "-",
                f"{ratio:.2f}" if ratio is not None else "-",
                str(figure.target) if figure.target is not None else "",
                {True: "met", False: "MISSED", None: ""}[figure.is_met],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    words = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(words + numbers).rstrip()


def as_json(figures: Iterable[Figure], about: Mapping[str, Any]) -> str:
    """For programs: every sample too."""
    told = [
        {
            "what": figure.what,
            "unit": figure.unit,
            "tokenward": figure.median,
            "bao": figure.their_median,
            "ratio": figure.ratio,
            "target": str(figure.target) if figure.target is not None else None,
            "met": figure.is_met,
            "samples": {"tokenward": list(figure.ours), "bao": list(figure.theirs)},
        }
        for figure in figures
    ]
    return json.dumps({**about, "figures": told}, indent=2) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
