"""What a search for a goal takes, in CPU seconds and memory, beside pruning by a ratio and then quantizing.

    python benchmarks/goal_costs.py [--latency 0.5] [--threads 2] [model ...]

Each runs in a fresh process and measures its kernels there, since no cost table is kept from one to the next. Weights
are random, and so are the rows that calibrate: seconds and memory are real, losses are not. Memory is the peak of the
process; the row also keeps that of tracing alone. The latency is the compiled file's, in turn with the original's.

Bars: the search takes at most 600 seconds more on two cores, and at most twice the memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from command_line import add_networks
from kept_rows import KeptRows, Row

import lobo_fx
from lobo_fx import sources
from lobo_fx.measures.memory import peak_memory_now
from lobo_fx.passes import FitGoal, PruneChannels, QuantizeStatic
from lobo_fx.sources.batches import random_batches
from lobo_fx.sources.models import build_program
from lobo_fx.terminal.tables import new_table, to_markdown

MODELS = (
    "torchvision:resnet50",
    "timm:vit_tiny_patch16_224",
    "benchmarks/headed.py:bert_base",
    "benchmarks/headed.py:whisper_tiny",
    "timm:mobilevitv2_050",
)
CALIBRATION = 32
"""Rows that calibrate."""
STAGES = ("trace", "pruned, int8", "goal")


def run_stage(stage: str, name: str, latency: float) -> dict[str, Any]:
    """What one stage takes in this process."""
    sources.declare_torchvision_operators()
    program = build_program(name)
    if stage == "trace":
        return {"memory": peak_memory_now()}
    batches = random_batches(program.example_inputs, CALIBRATION)
    passes = [FitGoal(latency=latency)] if stage == "goal" else [PruneChannels(0.5), QuantizeStatic()]
    begun, used = time.monotonic(), time.process_time()
    try:
        result = lobo_fx.compile(program, passes, calibration_data=batches, progress=False)
    except lobo_fx.InvalidInput as error:
        found: dict[str, Any] = {"refused": str(error)}
    else:
        found = {"decibels": result.report.rows[-1].snr}
    taken = {"wall": time.monotonic() - begun, "seconds": time.process_time() - used, "memory": peak_memory_now()}
    if "refused" not in found:
        with tempfile.TemporaryDirectory() as folder:
            result.export(Path(folder) / "model.onnx", confirm=False)
            found["latency"] = result.benchmark(rounds=20, memory=False).ratio("compiled")
    return found | taken


def in_fresh_process(name: str, latency: float, threads: int) -> Row:
    """Figures of every stage, each of a process of its own, with an empty cache of costs."""
    row: Row = {}
    for stage in STAGES:
        command = [sys.executable, __file__, name, "--stage", stage, "--latency", str(latency)]
        with tempfile.TemporaryDirectory() as cache:
            settings = os.environ | {"XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=settings)
        row |= {f"{stage}: {key}": value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    return row


def table_of(rows: Mapping[str, Row]) -> str:
    """Seconds and memory of both, and what the goal takes beyond."""
    names = ["model", "goal", "file", "goal, s", "CPU s", "pruned, int8, s", "CPU s", "memory, MB", "pruned, int8, MB"]
    table = new_table("", names)
    for name, row in rows.items():
        model, _, goal = name.rpartition(", ")
        file = f"{row['goal: latency']:.3f}" if "goal: latency" in row else "refused"
        both = [f"{row[f'{stage}: {key}']:.0f}" for stage in ("goal", STAGES[1]) for key in ("wall", "seconds")]
        memory = [f"{row[f'{stage}: memory'] / 1e6:.0f}" for stage in ("goal", STAGES[1])]
        table.add_row(model, goal, file, *both, *memory)
    return to_markdown(table)


def main() -> None:
    """Measures what is missing, and writes JSON and markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_networks(parser, MODELS)
    parser.add_argument("--latency", type=float, default=0.5, help="the goal, as a share of the original's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/reports/goal_costs.json"))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(run_stage(options.stage, options.networks[0], options.latency)))
        return
    kept = KeptRows(options.output, threads=options.threads)
    for name in options.networks or MODELS:
        measure = functools.partial(in_fresh_process, name, options.latency, options.threads)
        kept.row(f"{name}, {options.latency:g}", measure)
    about = "Random weights; each in a fresh process without a kept cost table. File: latency, of the original's."
    kept.write_markdown(f"# What a search for a goal takes\n\n{about}", table_of)


if __name__ == "__main__":
    main()
