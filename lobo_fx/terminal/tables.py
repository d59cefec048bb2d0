"""Tables: built once, shown on the terminal or written as markdown."""

from __future__ import annotations

import io
import shutil
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["escape", "new_table", "printable", "render", "terminal_width", "to_markdown"]

_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)]) | {ord("\t"): " ", ord("\n"): "\n"}
"""What a terminal would obey instead of showing it."""


_UNLIMITED = 180


def printable(text: str) -> str:
    """A text without control characters, which names in files and models may hold; lines stay."""
    return text.translate(_CONTROLS)


def new_table(title: str, columns: list[str]) -> Table:
    """An empty table; the first column is text, the others are figures."""
    from rich.table import Table
    from rich.text import Text

    # a title is as long as it is: folded, names in it would be torn apart
    table = Table(title=Text(title, no_wrap=True, overflow="ignore"), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def to_markdown(table: Table) -> str:
    """The table in GitHub's markdown."""
    columns = [list(column.cells) for column in table.columns]
    lines = [[str(column.header) for column in table.columns], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[escape(str(cell)) for cell in cells] for cells in zip(*columns, strict=True)]
    title = f"{escape(str(table.title))}\n\n" if table.title else ""
    return title + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape(text: str) -> str:
    """Keeps names from being read as markdown or HTML."""
    for old, new in (
        ("\\", "\\\\"),
        ("\n", " "),
        ("[", "\\["),
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("*", "\\*"),
        ("`", "\\`"),
    ):
        text = text.replace(old, new)
    return printable(text)


def terminal_width() -> int:
    """Columns of the terminal; COLUMNS counts first, and where there is no terminal lines are as long as they need."""
    return shutil.get_terminal_size((_UNLIMITED, 24)).columns


def render(table: Table, width: int | None = None) -> str:
    """A table as plain text; where it is wider than the terminal, a record for each row, so that numbers stay whole."""
    from rich.console import Console
    from rich.measure import Measurement

    width = terminal_width() if width is None else width
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, markup=False, emoji=False, highlight=False)
    if width < _UNLIMITED and Measurement.get(console, console.options.update_width(10**6), table).maximum > width:
        return printable(_records(table, width))
    console.print(table)
    return printable(stream.getvalue())


def _records(table: Table, width: int) -> str:
    """Its rows one below the other, each a heading and a line for every other column."""
    headings = [str(column.header) for column in table.columns[1:]]
    widest = max(map(len, headings), default=0)
    lines = _wrapped(str(table.title), width) if table.title else []
    for first, *cells in zip(*(list(column.cells) for column in table.columns), strict=True):
        lines += ["", *_wrapped(str(first), width, "", "  ")]
        for heading, cell in zip(headings, cells, strict=True):
            start = f"  {heading:<{widest}}  "
            lines += _wrapped(str(cell), width, start, " " * len(start)) or [start]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _wrapped(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """Lines of a text; a number with an exponent (1e-05) is one word."""
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
