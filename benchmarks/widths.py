"""Accuracy after channels are removed without training, at equal multiply-accumulates, by how widths are chosen.

    python benchmarks/widths.py [--moves 60]

Equal shares and the global scope of `PruneChannels` (importance: what second-order elimination costs, and the default
L2), what the solver of `FitGoal` gives, and what its repair makes of that. All are refitted to the same images.

Bars, in accuracy with 1,024 images and in at most 100 seconds a cell on one core: the vision transformer .904, .809,
.685, .493 with .5, .3, .2, .12 of the operations; the residual network .967, .892, .694 with .3, .2, .12.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from kept_rows import KeptRows, Row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from tasks import Split, accuracy
from tasks.glyphs import TASK
from tasks.training import default_cache

import lobo_fx
from lobo_fx.axes import Inference
from lobo_fx.axes.members import members
from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program
from lobo_fx.passes import PruneChannels
from lobo_fx.passes.fitting.side_by_side import Pairs
from lobo_fx.passes.goal.costs import narrowed
from lobo_fx.passes.goal.loss_model import LossModel, Noise, added
from lobo_fx.passes.goal.repair import Repair
from lobo_fx.passes.goal.solver import solve
from lobo_fx.passes.goal.terms import Budget, macs
from lobo_fx.passes.pruning.layer_fitting import Fit
from lobo_fx.passes.pruning.widths import Widths
from lobo_fx.terminal.tables import new_table, to_markdown

IMAGES, COMPARED = 1024, 512
KEEPS = (0.5, 0.3, 0.2, 0.12)
LEVELS = 24


def pruned(module: torch.nn.Module, calibration: Split, **settings: object) -> torch.nn.Module:
    """By `PruneChannels` at a share of the multiply-accumulates."""
    pass_ = PruneChannels(target="macs", round_to=1, **settings)  # type: ignore[arg-type]
    batches, inputs = calibration.batches(), calibration.inputs[:2]
    return lobo_fx.compile(module, [pass_], example_inputs=inputs, calibration_data=batches, progress=False).module


class Chosen:
    """Widths for one network: losses are measured once, then any share can be asked for."""

    def __init__(self, module: torch.nn.Module, calibration: Split, compared: Split) -> None:
        self.module, self.calibration = module, calibration
        self.program = lobo_fx.trace(module, calibration.inputs[:2])
        self.whole, self.part = (self._context(split) for split in (calibration, compared))
        self.inference = Inference(self.program).run()
        free = members(self.inference)
        self.leaves = tuple(free)
        noise = Noise(self.program, self.whole.held_out_batches(64))
        self.model = LossModel.measure(self.inference, self.whole, noise, free)
        self.noise = Noise(self.program, [rows for rows, held_out in self.part.split_batches() if held_out])
        self.cost = macs(self.inference, self.leaves)
        self.options = {
            leaf: sorted({max(1, round(leaf.size * level / LEVELS)) for level in range(1, LEVELS + 1)})
            for leaf in self.leaves
        }
        self.losses = {leaf: dict(enumerate(self.model.losses[leaf].tolist())) for leaf in self.leaves}

    def _context(self, split: Split) -> Context:
        return Context(self.program.signature, calibration_data=split.batches(), show_progress=False)

    def fitted(self, widths: Widths, context: Context) -> Program:
        """Pruned, and refitted to the images of a context."""
        program, _ = narrowed(self.inference, self.model.scores, widths)
        batches = ((inputs.leaves, held_out) for inputs, held_out in context.split_batches())
        with torch.no_grad(), Pairs(self.program.graph, program.graph, batches) as pairs:
            Fit(program, self.program, pairs, "reconstruct", context.note).run(False)
        return program

    def widths(self, keep: float, moves: int) -> Widths:
        """What the solver gives, or with moves what the repair makes of it."""
        budget = Budget.of(self.cost, keep * self.cost({leaf: leaf.size for leaf in self.leaves}))
        start = solve(budget, self.losses, self.options)
        if not moves:
            return start

        def measure(widths: Widths) -> float:
            return added(self.noise(self.fitted(widths, self.part)))

        return Repair(budget, self.losses, self.options, measure).run([start], moves)


def measure(chosen: Chosen, name: str, keep: float, moves: int, test: Split) -> dict[str, Any]:
    """Accuracy of every way to choose widths that keep a share of the operations, and the CPU time each takes."""
    module, calibration = chosen.module, chosen.calibration
    ways: dict[str, Callable[[], torch.nn.Module]] = {
        "equal, L2": lambda: pruned(module, calibration, keep=keep),
        "global, L2": lambda: pruned(module, calibration, keep=keep, scope="global"),
        "equal, second order": lambda: pruned(module, calibration, keep=keep, importance="second_order"),
        "solved": lambda: chosen.fitted(chosen.widths(keep, 0), chosen.whole).module,
        "repaired": lambda: chosen.fitted(chosen.widths(keep, moves), chosen.whole).module,
    }
    row: dict[str, Any] = {"network": name, "keep": keep, "float": accuracy(module, test)}
    for way, make in ways.items():
        begun = time.process_time()
        row[way] = accuracy(make(), test)
        row[f"{way}, seconds"] = time.process_time() - begun
    return row


def table_of(rows: Mapping[str, Row]) -> str:
    """Accuracy by how widths were chosen."""
    names = ("equal, L2", "global, L2", "equal, second order", "solved", "repaired")
    table = new_table("", ["network", "kept", "float", *names, "CPU seconds of the repair"])
    for row in rows.values():
        cells = [f"{row[name]:.4f}" for name in ("float", *names)]
        table.add_row(str(row["network"]), str(row["keep"]), *cells, f"{row['repaired, seconds']:.0f}")
    return to_markdown(table)


def main() -> None:
    """Measures what is missing, and writes JSON and markdown."""
    parser = argparse.ArgumentParser(description="Accuracy at equal multiply-accumulates, by how widths are chosen.")
    parser.add_argument("--moves", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("docs/reports/widths.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = TASK.load(default_cache())
    calibration, compared = train.sample(IMAGES), train.sample(COMPARED, seed=3)
    network = functools.cache(lambda name: Chosen(TASK.trained(name), calibration, compared))
    kept = KeptRows(options.output, moves=options.moves)
    for name, keep in itertools.product(("SmallViT", "SmallResNet"), KEEPS):
        kept.row(
            f"{name}, {keep:g}",
            lambda n=name, k=keep: measure(network(n), n, k, options.moves, test),  # type: ignore[misc]
        )
    kept.write_markdown(
        "# Widths at equal multiply-accumulates\n\nTest accuracy on glyphs, no training step, "
        f"{IMAGES:,} images to refit to, one thread.",
        table_of,
    )


if __name__ == "__main__":
    main()
