"""Tables: built once, shown on the terminal or written as markdown."""

from __future__ import annotations

import io
import random
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "decimals",
    "escape",
    "folded",
    "new_table",
    "printable",
    "records",
    "render",
    "terminal_width",
    "to_markdown",
]

_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS]) | {ord("\t"): " ", ord("\n"): "\n"}
"""Control characters, which a terminal would obey instead of showing them, also those that turn the direction."""


_WIDTH = 80
"""Columns for logs and pipes, which have no width of their own."""


def printable(text: str) -> str:
    """Removes control characters, which names in files and models may hold; line breaks stay."""
    return text.translate(_CONTROLS)


def new_table(title: str, columns: list[str]) -> Table:
    """An empty table; the first column is text, the others are figures."""
    state = random.getstate()  # rich draws a number when it is imported
    from rich.table import Table
    from rich.text import Text

    random.setstate(state)
    # titles are not folded, which would tear names in them apart
    table = Table(title=Text(title, no_wrap=True, overflow="ignore"), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def decimals(value: float) -> str:
    """A number with two decimals; below 1 with three significant digits, as small models need."""
    return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.3g}"


def to_markdown(table: Table) -> str:
    """The table in GitHub's markdown."""
    columns = [list(column.cells) for column in table.columns]
    lines = [[escape(str(column.header)) for column in table.columns], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[escape(str(cell)) for cell in cells] for cells in zip(*columns, strict=True)]
    title = f"{escape(str(table.title))}\n\n" if table.title else ""
    return title + "".join(f"| {' | '.join(line)} |\n" for line in lines)


_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
"""An underscore that may begin or end emphasis; one within a word does neither."""

_BLOCK = re.compile(r"^(\s*)(?:(#{1,6}(?=\s|$)|>|[-+](?=\s|$)|[-=~]{3,})|(\d{1,9})([.)](?=\s|$)))")
"""Text that would make the line it begins a heading, a quotation, a list item or a rule."""


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
        ("~~", "\\~\\~"),
    ):
        text = text.replace(old, new)
    text = _UNDERSCORE.sub(r"\\_", printable(text))
    return _BLOCK.sub(lambda found: f"{found[1]}{found[3] or ''}\\{found[2] or found[4]}", text)


def terminal_width() -> int:
    """Columns of the terminal; the variable COLUMNS takes precedence, and without a terminal it is 80."""
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def render(table: Table, width: int | None = None) -> str:
    """A table as plain text; if it is wider than the terminal, as a record for each row, so that numbers stay whole."""
    from rich.console import Console
    from rich.measure import Measurement

    width = terminal_width() if width is None else width
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, markup=False, emoji=False, highlight=False)
    if Measurement.get(console, console.options.update_width(10**6), table).maximum > width:
        return printable(f"{_records(table, width)}\n")  # records need a line break at the end, unlike a framed table
    console.print(table)
    return printable(stream.getvalue())


def _records(table: Table, width: int) -> str:
    """The rows of a table as records, one below the other."""
    headings = [str(column.header) for column in table.columns[1:]]
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    found = [(str(first), dict(zip(headings, map(str, cells), strict=True))) for first, *cells in rows]
    title = _wrapped(str(table.title), width) if table.title else []
    return "".join(f"{line}\n" for line in title) + "\n" * bool(found) + records(found, width)


def records(entries: Sequence[tuple[str, Mapping[str, str]]], width: int | None = None) -> str:
    """Entries one below the other, each with a heading and a line for every fact that is not empty."""
    width = terminal_width() if width is None else width
    widest = max((len(name) for _, facts in entries for name in facts), default=0)
    blocks = []
    for heading, facts in entries:
        lines = _wrapped(heading, width, "", "  ")
        for name, fact in facts.items():
            start = f"  {name:<{widest}}  "
            lines += _wrapped(fact, width, start, " " * len(start))
        blocks.append("".join(f"{line.rstrip()}\n" for line in lines))
    return "\n".join(blocks)


def folded(text: str) -> str:
    """Folds a text of several paragraphs to the width of the terminal."""
    return "\n\n".join("\n".join(_wrapped(part, terminal_width())) for part in text.split("\n\n"))


def _wrapped(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """Wraps a text; numbers with an exponent (1e-05) are not split."""
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
