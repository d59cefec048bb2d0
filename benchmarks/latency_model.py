"""Predicted against measured latency of pruned and quantized files, over networks and random widths.

    python benchmarks/latency_model.py [network ...]

For each network the model sees the original's file and one with half of every width, in float and with integers; then
random widths (of every axis its own) are predicted, written, and measured in turn with the original.

Bars: over at least 60 files of 12 networks a mean error of at most 5 % and a rank correlation of at least .98; the
costs of kernels take at most 60 seconds a network, and are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from command_line import add_networks
from kept_rows import KeptRows, Row

from lobo_fx import sources
from lobo_fx.axes import Inference
from lobo_fx.axes.members import members
from lobo_fx.contracts.context import Context
from lobo_fx.files import temporary_folder
from lobo_fx.graph.shapes import propagate
from lobo_fx.passes import FitGoal
from lobo_fx.passes.goal.costs import FileCosts, Precision, narrowed
from lobo_fx.passes.pruning.widths import Widths
from lobo_fx.passes.quantization.integers.prices import open_table
from lobo_fx.passes.quantization.quantize_static import folded
from lobo_fx.sources.batches import random_batches
from lobo_fx.sources.models import build_program
from lobo_fx.terminal.tables import new_table, to_markdown

sources.declare_torchvision_operators()

NETWORKS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "timm:efficientnet_b0",
    "timm:mobilevitv2_050",
    "timm:regnety_008",
    "timm:convnext_atto",
    "timm:repvgg_a0",
    "timm:vit_tiny_patch16_224",
    "timm:deit_small_patch16_224",
    "benchmarks/headed.py:bert_base",
    "benchmarks/headed.py:whisper_tiny_encoder",
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A file, predicted and measured, as shares of the original's latency."""

    precision: str
    predicted: float
    measured: float


def measure(name: str, files: int, seed: int) -> dict[str, Any]:
    """The files of one network, and what the costs of its kernels took to measure."""
    program = build_program(name)
    batches = random_batches(program.example_inputs, 2, seed)
    context = Context(program.signature, calibration_data=batches, show_progress=False)
    start = program.clone()
    program = folded(program, context)
    propagate(program.module)
    inference = Inference(program).run()
    leaves = tuple(members(inference))
    drawn = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    scores = {leaf: torch.rand(leaf.size, generator=generator) for leaf in leaves}
    known = len(open_table(None).costs)
    with temporary_folder() as folder:
        begun = time.perf_counter()
        costs = FileCosts(start, inference, leaves, context, FitGoal(latency=0.5, low_rank=False), folder)
        seconds = time.perf_counter() - begun
        found: list[Measured] = []

        def share(precision: Precision, widths: Widths) -> dict[str, float]:
            return costs.measure(costs.structure(precision, narrowed(inference, scores, widths)[0]))

        for precision in costs.precisions:
            for known_share in (1.0, 0.5):
                widths = {leaf: _near(options, known_share) for leaf, options in precision.options.items()}
                costs.learn(precision, widths, share(precision, widths))
            for _ in range(files):
                middle = drawn.uniform(0.2, 0.9)
                widths = {
                    leaf: _near(options, middle + drawn.uniform(-0.25, 0.25))
                    for leaf, options in precision.options.items()
                }
                predicted = costs.expected(precision, "latency", widths)
                found.append(Measured(precision.name, predicted, share(precision, widths)["latency"]))
    return {"seconds": seconds, "known": known, "files": [dataclasses.asdict(entry) for entry in found]}


def _near(options: Any, share: float) -> int:
    found: int = min(options, key=lambda width: abs(width - share * options[-1]))
    return found


def errors(files: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean relative error and rank correlation of predictions."""
    predicted, measured = (torch.tensor([file[name] for file in files]).double() for name in ("predicted", "measured"))
    ranks = torch.stack([values.argsort().argsort().double() for values in (predicted, measured)])
    return float(((predicted - measured).abs() / measured).mean()), float(torch.corrcoef(ranks)[0, 1])


def table_of(rows: Mapping[str, Row]) -> str:
    """Errors of each network, and of all together."""
    table = new_table("", ["network", "files", "mean error", "largest", "rank correlation", "costs, seconds"])
    for name, row in rows.items():
        mean, rank = errors(row["files"])
        largest = max(abs(file["predicted"] / file["measured"] - 1) for file in row["files"])
        table.add_row(
            name, str(len(row["files"])), f"{mean:.1%}", f"{largest:.1%}", f"{rank:.3f}", f"{row['seconds']:.0f}"
        )
    every = [file for row in rows.values() for file in row["files"]]
    mean, rank = errors(every)
    ranks = sum(errors(row["files"])[1] for row in rows.values()) / len(rows)
    return (
        f"{len(every)} files of {len(rows)} networks: mean error {mean:.1%}, rank correlation {rank:.3f} over all, "
        f"{ranks:.3f} as the mean of the networks.\n\n{to_markdown(table)}"
    )


def main() -> None:
    """Measures what is missing, and writes JSON and markdown."""
    parser = argparse.ArgumentParser(description="Predicted against measured latency.")
    add_networks(parser, NETWORKS)
    parser.add_argument("--files", type=int, default=3, help="random widths of each precision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/reports/latency_model.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = KeptRows(options.output, files=options.files, seed=options.seed)
    for name in options.networks or NETWORKS:
        kept.row(name, lambda n=name: measure(n, options.files, options.seed))  # type: ignore[misc]
    about = "# Predicted against measured latency\n\nOne thread, CPU time, random widths of each precision."
    kept.write_markdown(about, table_of)


if __name__ == "__main__":
    main()
