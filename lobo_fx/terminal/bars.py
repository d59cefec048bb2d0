"""Bar charts made of plain characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lobo_fx.terminal.tables import decimals, printable

__all__ = ["bars"]

_LONGEST_LABEL = 28
_NARROWEST = 10


def bars(
    title: str, values: Sequence[tuple[str, float | None]], unit: str = "", width: int = 80, fill: str = "█"
) -> str:
    """A bar for each value, in proportion to the largest; None is a value that was not measured.

    Args:
        title: heading of the chart.
        values: values with their labels.
        unit: format of a number; empty for `decimals`.
        width: columns of the whole chart.
        fill: character that bars consist of.
    """
    written = unit.format if unit else decimals
    numbers = ["not measured" if value is None else written(value) for _, value in values]
    labels = [_short(printable(label).replace("\n", " ")) for label, _ in values]
    beside = max(map(len, labels), default=0) + max(map(len, numbers), default=0) + 4
    room = max(_NARROWEST, width - beside)
    finite = [abs(value) for _, value in values if value is not None and math.isfinite(value)]
    largest = max(finite, default=0.0) or 1.0
    lines = [printable(title), "=" * min(width, len(title)), ""]
    for label, number, (_, value) in zip(labels, numbers, values, strict=True):
        share = 0.0 if value is None or math.isnan(value) or value < 0 else min(1.0, value / largest)
        lines.append(f"{label:<{max(map(len, labels))}} |{fill * round(share * room):<{room}} {number}")
    return "\n".join(lines) + "\n"


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"
