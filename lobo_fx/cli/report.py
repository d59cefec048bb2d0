"""`lobo-fx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lobo_fx.cli.app import Answer, command

__all__ = ["report"]


@command
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `lobo-fx compile -o` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write all views into this folder.")
    ] = None,
    charts: Annotated[bool, typer.Option("--charts", help="Also draw bar charts.")] = False,
) -> Answer:
    """Show a run again, or compare several.

    Several are ranked, with their trade-offs, the best of each category, and recommendations.
    """
    from lobo_fx.files import check_folder
    from lobo_fx.report.comparison import Comparison, read_runs
    from lobo_fx.report.plain_charts import pass_charts
    from lobo_fx.terminal.tables import printable, terminal_width

    if output is not None:
        check_folder(output)
    reports = read_runs(runs)
    found = Comparison.of(reports)
    (first, *others) = reports.values()
    written = [] if output is None else [file.name for file in (found if others else first).save(output)]

    def text(verbose: bool) -> str:
        parts = [str(found) if others else first.to_text(verbose)]
        if charts:
            width = min(80, terminal_width())
            parts += [found.charts(width), *(pass_charts(one, width) for one in reports.values())]
        return "\n".join(parts) + (printable(f"\nwritten to {output}: {', '.join(written)}") if written else "")

    return Answer(text, lambda: (found if others else first).as_json())
