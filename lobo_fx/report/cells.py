"""Numbers for pages, each looked up in the data of a report and shown with its path there."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["NOT_MEASURED", "Cell", "Grid", "Source", "count_text", "size_text"]

NOT_MEASURED = "not measured"
Form = str | tuple[str, float] | Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """The text that a reader sees, and the raw number behind it.

    Attributes:
        text: the shown text.
        value: the raw number; None for text, and for figures that were not measured.
        path: path of the value in the data, as JSON; empty for text.
        by: path of the number that it was divided by.
        run: the run that the data is of, if there are several.
        bar: length of a bar behind it, as a share of the longest; None without a bar.
    """

    text: str
    value: float | None = None
    path: str = ""
    by: str = ""
    run: str = ""
    bar: float | None = None

    @property
    def is_missing(self) -> bool:
        """Whether it is a figure that was not measured."""
        return self.text == NOT_MEASURED

    @property
    def is_finite(self) -> bool:
        """Whether it can be drawn."""
        return self.value is not None and math.isfinite(self.value)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of a page.

    Attributes:
        name: its anchor on the page.
        title: its caption.
        columns: headings; the first column names the row.
        rows: cells.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds figures, which are aligned right."""
        cells = [row[column] for row in self.rows]
        return any(cell.value is not None or cell.is_missing for cell in cells)


@dataclasses.dataclass(frozen=True)
class Source:
    """The data of a report, as `Report.as_json` gives it.

    Attributes:
        data: the data of the report.
        run: the run that it is of, if there are several.
    """

    data: Mapping[str, Any]
    run: str = ""

    def find(self, *path: str | int) -> Any:
        """The value at a path; None if there is none."""
        value: Any = self.data
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def cell(self, *path: str | int, form: Form = "{:,}", by: tuple[str | int, ...] = ()) -> Cell:
        """Formats a number of the data, or the quotient of two.

        Args:
            path: path of the number.
            form: a format, a format with a number to divide by before, or a function.
            by: path of the divisor.
        """
        value = self.find(*path)
        if value in ("inf", "-inf", "nan"):
            value = float(value)
        if by and value is not None:
            divisor = self.find(*by)
            value = value / divisor if divisor else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return Cell(NOT_MEASURED if value is None else str(value))
        where = json.dumps(path), json.dumps(by) if by else ""
        return Cell(_text(value, form), value, *where, self.run)


def size_text(count: float) -> str:
    """Bytes as megabytes, or kilobytes where there are few."""
    return f"{count / 1e6:,.2f} MB" if abs(count) >= 1e5 else f"{count / 1e3:,.2f} kB"


def count_text(count: float) -> str:
    """A count, in millions if it is large."""
    return f"{count / 1e6:,.1f}M" if abs(count) >= 1e5 else f"{count:,.0f}"


def _text(value: float, form: Form) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞" if value < 0 else "no number"
    if callable(form):
        return form(value)
    form, scale = form if isinstance(form, tuple) else (form, 1)
    return form.format(value / scale if scale != 1 else value)
