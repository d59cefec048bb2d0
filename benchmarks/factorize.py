"""Accuracy and latency of networks of lower ranks, without training: plain singular values, and refitted.

    python benchmarks/factorize.py [--keep 0.75 0.5 0.35] [--images 1024]

Bar: refitting recovers at least half of the accuracy that plain singular values lose, at every share.
The models are trained on first use (minutes) and then come from a cache. Latencies are of the exported files, in turn
with the float file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from tasks import Split, accuracy
from tasks.glyphs import TASK
from tasks.training import default_cache

import lobo_fx
from lobo_fx import Result, passes
from lobo_fx.measures.machine import machine
from lobo_fx.terminal.tables import new_table, render


def factorized(module: torch.nn.Module, keep: float, setting: str, calibration: Split) -> Result:
    """The model with the share `keep` of its multiply-accumulates."""
    return lobo_fx.compile(
        module,
        [passes.Factorize(target="macs", keep=keep, compensation=setting)],
        example_inputs=calibration.inputs[:2],
        calibration_data=calibration.batches(),
        progress=False,
    )


def main() -> None:
    """Prints a row for each share of the multiply-accumulates."""
    parser = argparse.ArgumentParser(description="Accuracy and latency at lower ranks.")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.35], help="shares of the MACs that stay")
    parser.add_argument("--images", type=int, default=1024, help="training images to calibrate with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = TASK.load(default_cache())
    module, calibration = TASK.trained("SmallViT"), train.sample(options.images)
    columns = ["MACs kept", "float", "plain", "refitted", "recovered", "latency"]
    table = new_table(f"Factorize, glyphs, ViT, {options.images} images to calibrate with, {machine()}", columns)
    whole = accuracy(module, test)
    for keep in options.keep:
        plain, refitted = (factorized(module, keep, setting, calibration) for setting in ("none", "auto"))
        scores = [accuracy(result.module, test) for result in (plain, refitted)]
        measured = refitted.benchmark(threads=1, memory=False, rounds=100)
        recovered = (scores[1] - scores[0]) / max(whole - scores[0], 1e-9)
        cells = [whole, *scores, recovered, measured.ratio("compiled")]
        table.add_row(f"{keep:g}", *(f"{value:.3f}" for value in cells))
    print(render(table))


if __name__ == "__main__":
    main()
