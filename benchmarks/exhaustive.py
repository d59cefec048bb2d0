"""`FitGoal` beside the best of all widths, on a network so small that every one can be built and measured.

    python benchmarks/exhaustive.py [--budgets 0.5 0.35] [--precisions float int8]

The network is the plain one of `tasks.glyphs`: four axes, widths in multiples of 16, 192 combinations. The search runs
as ever; then every combination is built, refitted, written, and measured in turn with the original's file. Noise is
that of the outputs on rows that no fit saw.

Bar: no file within the budget has over 2 % less noise, or no file at least as good is more than 2 % faster.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from kept_rows import KeptRows, Row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from tasks import glyphs
from tasks.training import default_cache

import lobo_fx
from lobo_fx.contracts.context import Context
from lobo_fx.passes import FitGoal
from lobo_fx.passes.goal.correction import tolerated
from lobo_fx.passes.goal.costs import Precision
from lobo_fx.passes.goal.search import GoalSearch
from lobo_fx.terminal.progress import track
from lobo_fx.terminal.tables import new_table, to_markdown

NETWORK, UNIT, CALIBRATION = "SimpleCNN", 16, 512
_NEAR = 0.02


class Exhaustive(GoalSearch):
    """A search that builds everything there is once it has found its own."""

    def _look_around(self, precision: Precision, name: str) -> None:
        self.built_by_search = len(self.programs.built)
        every = itertools.product(*([(leaf, width) for width in precision.options[leaf]] for leaf in self.leaves))
        for widths in track([dict(chosen) for chosen in every], "every width", show=True):
            if self.programs.built_of(precision, widths) is None:
                self.programs.build(precision, widths)


def measure(budget: float, precision: Literal["float", "int8"]) -> dict[str, Any]:
    """What the search found, and the best of everything."""
    train, _ = glyphs.TASK.load(default_cache())
    data = train.sample(CALIBRATION)
    program = lobo_fx.trace(glyphs.TASK.trained(NETWORK), data.inputs[:2])
    context = Context(program.signature, calibration_data=data.batches(64), show_progress=False)
    settings = FitGoal(latency=budget, precision=precision, low_rank=False, round_to=UNIT)
    search = Exhaustive(program, context, settings)
    search.run()
    files: list[dict[str, Any]] = [
        {"latency": built.measured["latency"], "noise": built.noise, "widths": list(built.widths.values())}
        for built in search.programs.built
    ]
    built_first = zip(files, context.candidates, strict=False)  # what was only compared follows
    (own,) = [file for file, candidate in built_first if candidate.chosen]
    return {
        "own": own,
        "built by the search": search.built_by_search,
        "files": len(files),
        "all": files,
        "best within": min(
            (f for f in files if f["latency"] <= tolerated("latency", budget)), key=lambda f: f["noise"]
        ),
        "fastest as good": min((f for f in files if f["noise"] <= own["noise"]), key=lambda f: f["latency"]),
    }


def table_of(rows: Mapping[str, Row]) -> str:
    """What the search found beside what everything gives."""
    names = ["precision, budget", "files", "built by the search", "latency"]
    table = new_table(
        "", [*names, "slower than the fastest as good", "noisier than the best within the budget", "within 2 %"]
    )
    for name, row in rows.items():
        slower = row["own"]["latency"] / row["fastest as good"]["latency"] - 1
        noisier = row["own"]["noise"] / row["best within"]["noise"] - 1
        cells = [str(row["files"]), str(row["built by the search"]), f"{row['own']['latency']:.3f}"]
        table.add_row(name, *cells, f"{slower:.1%}", f"{noisier:.1%}", "yes" if min(slower, noisier) <= _NEAR else "no")
    return to_markdown(table)


def main() -> None:
    """Measures, and writes JSON and markdown."""
    parser = argparse.ArgumentParser(description="FitGoal beside the best of all widths.")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--precisions", nargs="+", default=["float", "int8"])
    parser.add_argument("--output", type=Path, default=Path("docs/reports/exhaustive.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = KeptRows(options.output)
    for precision, budget in itertools.product(options.precisions, options.budgets):
        kept.row(f"{precision}, {budget:g}", lambda p=precision, b=budget: measure(b, p))  # type: ignore[misc]
    kept.write_markdown(
        f"# Beside the best of all widths\n\n{NETWORK} of glyphs, widths in multiples of {UNIT}, one thread. Every "
        "file is measured once: of many that are alike, the fastest is in part luck.",
        table_of,
    )


if __name__ == "__main__":
    main()
