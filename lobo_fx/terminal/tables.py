"""Tables: built once, shown on the terminal or written as markdown."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["escape", "new_table", "printable", "render", "to_markdown"]

_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)]) | {ord("\t"): " ", ord("\n"): "\n"}
"""What a terminal would obey instead of showing it."""


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


def render(table: Table, width: int = 180) -> str:
    """A table as plain text, as wide as it needs."""
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, markup=False, emoji=False, highlight=False).print(table)
    return printable(stream.getvalue())
