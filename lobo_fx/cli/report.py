"""`lobo-fx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lobo_fx.cli.app import command

__all__ = ["report"]


@command
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `lobo-fx compile -o` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write all views into this folder.")
    ] = None,
    charts: Annotated[bool, typer.Option("--charts", help="Also draw bar charts.")] = False,
) -> None:
    """Show a run again, or compare several: rankings, trade-offs, the best of each category, recommendations."""
    from lobo_fx.files import check_folder
    from lobo_fx.report.comparison import compare
    from lobo_fx.report.plain_charts import pass_charts
    from lobo_fx.terminal.tables import printable, terminal_width

    if output is not None:
        check_folder(output)
    found = compare(runs)
    shown = found if len(runs) > 1 else next(iter(found.reports.values()))
    typer.echo(str(shown))
    if charts:
        width = min(80, terminal_width())
        typer.echo("\n".join([found.charts(width), *(pass_charts(one, width) for one in found.reports.values())]))
    if output is not None:
        written = ", ".join(file.name for file in shown.save(output))
        typer.echo(printable(f"written to {output}: {written}"))
