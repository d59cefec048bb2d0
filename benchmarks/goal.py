"""Accuracy at a measured latency: `FitGoal` beside pruning by shares and then quantizing, at the same latency.

    python benchmarks/goal.py [--budgets 0.35 0.25] [--seeds 1] [--methods 'goal*' 'equal*'] [network ...]

Networks of `examples/tasks` and of report 001, without a training step; a seed draws the rows that calibrate. The
peers' ratio is bisected until their file takes what the budget asks for; both are measured in turn with the original's
file. The random search draws a share for every axis, `TRIES` times, and takes the best decibels, on rows that no fit
saw, of what fits the budget. `goal by score` is told the score of labelled training images, the others see no label.

Bars: budgets are hit within 3 %; never worse than the best of the others by more than noise; at .35 and .25 at least a
quarter less lost accuracy than equal shares followed by int8, on at least four of six networks. Where a file of the
narrowest widths takes more than a budget, as those of small networks do on fast CPUs, the goal is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import add_networks
from kept_rows import KeptRows, Row
from report_001 import NETWORKS
from trained_report import VALIDATION

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from tasks import Split, Task, digits, glyphs, receiver
from tasks.training import default_cache

import lobo_fx
from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import suggestion
from lobo_fx.files import temporary_folder
from lobo_fx.passes import FitGoal, PruneChannels, QuantizeStatic
from lobo_fx.passes.goal.correction import NEAR, tolerated
from lobo_fx.terminal.tables import new_table, to_markdown

TASKS: dict[str, tuple[Task, str]] = {
    "SimpleCNN": (glyphs.TASK, "SimpleCNN"),
    "SmallResNet": (glyphs.TASK, "SmallResNet"),
    "SmallViT": (glyphs.TASK, "SmallViT"),
    "SmallCNN": (digits.TASK, "SmallCNN"),
    "Demapper": (receiver.TASK, "Demapper"),
    **{name: (dataclasses.replace(glyphs.TASK, models=NETWORKS, held_out=VALIDATION), name) for name in NETWORKS},
}
CALIBRATION, LABELLED, TEST = 512, 1_024, 2_000
BISECTIONS, ROUNDS = 7, 200
TRIES = 20
"""Of the random search."""
EQUAL = "equal shares, int8"


class Network:
    """A trained network with its data.

    Args:
        task: what it was trained on.
        name: of the network.
        seed: of the rows that calibrate, and of widths by chance.
    """

    def __init__(self, task: Task, name: str, seed: int = 0) -> None:
        train, test = task.load(default_cache())
        self.task, self.module, self.seed = task, task.trained(name), seed
        self.calibration: Split = train.sample(CALIBRATION, seed=seed)
        self.labelled = train.sample(LABELLED, seed=100 + seed)
        self.test = test.sample(min(TEST, len(test)), seed=5)
        self.original = task.score(self.module, self.test)

    def compiled(self, passes: list[Pass], **settings: Any) -> lobo_fx.Result:
        """The network after these passes."""
        return lobo_fx.compile(
            self.module,
            passes,
            example_inputs=self.calibration.inputs[:2],
            calibration_data=self.calibration.batches(64),
            progress=False,
            **settings,
        )

    def run(self, passes: list[Pass], **settings: Any) -> dict[str, Any]:
        """Score, decibels, and latency as a share of the original's."""
        begun = time.process_time()
        result = self.compiled(passes, **settings)
        seconds = time.process_time() - begun
        with temporary_folder() as folder:
            result.export(folder / "model.onnx", confirm=False)
            latency = result.benchmark(rounds=ROUNDS, memory=False).ratio("compiled")
        score, decibels = self.task.score(result.module, self.test), result.report.rows[-1].snr
        return {"score": score, "latency": latency, "seconds": seconds, "decibels": decibels}

    def by_score(self, budget: float) -> dict[str, Any]:
        """The goal, with a score to go by."""
        return self.run([FitGoal(latency=budget)], evaluate=lambda module: self.task.score(module, self.labelled))

    def by_chance(self, budget: float) -> dict[str, Any]:
        """The best of random widths that fit the budget as integers."""
        axes = [axis.name for axis in self.compiled([PruneChannels(0.5)]).report.axes]
        names = [name.partition(".weight")[0] for name in axes if ".weight" in name]  # others are no module's
        draw, best, spent = random.Random(self.seed), dict[str, Any](), 0.0
        for _ in range(TRIES):
            shares = {name: draw.uniform(0, 0.95) for name in names}
            found = self.run([PruneChannels(shares), QuantizeStatic()])
            spent += found["seconds"]
            if found["latency"] <= tolerated("latency", budget) and found["decibels"] > best.get("decibels", -math.inf):
                best = found
        if not best:
            raise lobo_fx.InvalidInput(f"none of {TRIES} random widths takes so little")
        return best | {"seconds": spent}

    def by_shares(self, budget: float, **settings: Any) -> dict[str, Any]:
        """Pruned by a share, of widths or of a target, whose file, as integers, takes what the budget says."""
        best: dict[str, Any] = {}
        low, high, spent = 0.0, 0.98, 0.0
        for _ in range(BISECTIONS):
            ratio = (low + high) / 2
            share: dict[str, Any] = {"keep": 1 - ratio} if "target" in settings else {"ratio": ratio}
            try:
                found = self.run([PruneChannels(**share, **settings), QuantizeStatic()])
            except lobo_fx.InvalidInput:  # so few can't be kept
                high = ratio
                continue
            spent += found["seconds"]
            low, high = (low, ratio) if found["latency"] <= budget else (ratio, high)
            if not best or abs(found["latency"] - budget) < abs(best["latency"] - budget):
                best = found | {"ratio": ratio}
            if abs(found["latency"] / budget - 1) < NEAR:
                break
        if not best:
            raise lobo_fx.InvalidInput("no share fits: so few can't be kept")
        return best | {"seconds": spent}


METHODS: dict[str, Callable[[Network, float], dict[str, Any]]] = {
    "goal": lambda network, budget: network.run([FitGoal(latency=budget)]),
    "goal by score": lambda network, budget: network.by_score(budget),
    EQUAL: lambda network, budget: network.by_shares(budget, scope="axis"),
    "global, int8": lambda network, budget: network.by_shares(budget, scope="global"),
    "isomorphic, int8": lambda network, budget: network.by_shares(budget, scope="isomorphic"),
    "random search, int8": lambda network, budget: network.by_chance(budget),
    "global MACs, int8": lambda network, budget: network.by_shares(budget, scope="global", target="macs"),
}


def table_of(rows: Mapping[str, Row]) -> str:
    """Means over the seeds of a network, a budget and a method; what was refused once is said to be."""
    names = [
        "network",
        "budget",
        "method",
        "seeds",
        "latency",
        "score",
        "lost",
        "of what equal shares lose",
        "CPU seconds",
    ]
    table = new_table("", names)
    lost: dict[tuple[Any, ...], float] = {}
    runs = grouped(list(rows.values()), "network", "budget", "method")
    for key, alike in runs.items():
        if not any("refused" in row for row in alike):
            lost[key] = statistics.fmean(row["original"] - row["score"] for row in alike)
    for key, alike in runs.items():
        network, budget, method = key
        latencies = [row["latency"] for row in alike if "refused" not in row]
        if key not in lost:
            cells = ["", f"refused {len(alike) - len(latencies)} of {len(alike)}", "", "", ""]
        else:
            score, seconds = (statistics.fmean(row[name] for row in alike) for name in ("score", "seconds"))
            ends = f" ({min(latencies):.3f} to {max(latencies):.3f})" if len(latencies) > 1 else ""
            equal = lost.get((network, budget, EQUAL), 0.0)
            share = f"{lost[key] / equal:.0%}" if equal > 0 else ""
            latency = f"{statistics.fmean(latencies):.3f}{ends}"
            cells = [latency, f"{score:.4f}", f"{lost[key]:.4f}", share, f"{seconds:.0f}"]
        table.add_row(network, f"{budget:g}", method, str(len(alike)), *cells)
    return to_markdown(table)


def grouped(rows: Sequence[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by what they say under these names, in order."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


@functools.cache
def network_of(name: str, seed: int) -> Network:
    """A network with its rows drawn."""
    return Network(*TASKS[name], seed)


def measure(about: Mapping[str, Any], method: Callable[[Network, float], dict[str, Any]]) -> dict[str, Any]:
    """What a method finds, or why it refuses."""
    network = network_of(about["network"], about["seed"])
    try:
        found = method(network, about["budget"])
    except lobo_fx.InvalidInput as error:
        found = {"refused": str(error)}
    return {**about, **found, "original": network.original}


def main() -> None:
    """Measures what is missing, and writes JSON and markdown."""
    parser = argparse.ArgumentParser(description="Accuracy at a measured latency.")
    add_networks(parser, TASKS)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.25])
    parser.add_argument("--seeds", type=int, default=1, help="how many draws of calibration rows")
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of what is compared")
    parser.add_argument("--output", type=Path, default=Path("docs/reports/goal.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = {name: run for name, run in METHODS.items() if any(fnmatch.fnmatchcase(name, p) for p in options.methods)}
    if not methods:
        parser.error(f"no method is called {' or '.join(options.methods)}; {suggestion(options.methods[0], METHODS)}")
    kept = KeptRows(options.output, rounds=ROUNDS)
    for seed, name in itertools.product(range(options.seeds), options.networks or TASKS):
        for budget, (method, run) in itertools.product(options.budgets, methods.items()):
            about = {"network": name, "budget": budget, "method": method, "seed": seed}
            kept.row(", ".join(map(str, about.values())), functools.partial(measure, about, run))
    kept.write_markdown(
        "# Accuracy at a measured latency\n\nOne thread, CPU time, no training step; means over seeds.", table_of
    )


if __name__ == "__main__":
    main()
