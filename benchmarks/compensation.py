"""Accuracy after channels are removed without training, with each kind of compensation.

    python benchmarks/compensation.py [--keep 0.5]

Bar: at half the multiply-accumulates, `auto` (what `PruneChannels` does by itself where it gets calibration data)
is the best setting and recovers at least four fifths of the accuracy that plain removal by L2 norm loses, on each
model. Where plain removal loses less than a point there is little to recover; a row at a quarter follows.
The models are trained on first use (minutes) and then come from a cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from tasks import Split, Task, accuracy
from tasks.digits import TASK as DIGITS
from tasks.glyphs import TASK as GLYPHS
from tasks.training import default_cache

import lobo_fx
from lobo_fx import passes
from lobo_fx.measures.machine import machine
from lobo_fx.passes.pruning.compensation import METHODS
from lobo_fx.terminal.tables import new_table, render

SETTINGS = (*METHODS, "auto")
LITTLE = 0.01


def pruned(module: torch.nn.Module, keep: float, setting: str, calibration: Split) -> torch.nn.Module:
    """The model with the share `keep` of its multiply-accumulates, fitted to the calibration images."""
    result = lobo_fx.compile(
        module,
        [passes.PruneChannels(target="macs", keep=keep, importance="l2", round_to=1, compensation=setting)],
        example_inputs=calibration.inputs[:2],
        calibration_data=calibration.batches(),
        progress=False,
    )
    return result.module


def row(task: Task, model: str, keep: float, splits: tuple[Split, Split], images: int) -> dict[str, float]:
    """Test accuracy before removal (`float`) and after it, by setting."""
    train, test = splits
    module = task.trained(model)
    calibration = train.sample(images)
    found = {setting: accuracy(pruned(module, keep, setting, calibration), test) for setting in SETTINGS}
    return {"float": accuracy(module, test)} | found


def recovered(found: dict[str, float], setting: str) -> float:
    """The share of the accuracy lost by plain removal that a setting brings back."""
    return (found[setting] - found["none"]) / max(found["float"] - found["none"], 1e-9)


def main() -> None:
    """Prints a row for each model."""
    parser = argparse.ArgumentParser(description="Accuracy after removal, with each kind of compensation.")
    parser.add_argument("--keep", type=float, default=0.5, help="share of multiply-accumulates that stays")
    parser.add_argument("--images", type=int, default=1024, help="training images to calibrate with")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = ["model", "kept", "float", "plain", *SETTINGS[1:], *(f"{name}, recovered" for name in SETTINGS[1:])]
    table = new_table(f"PruneChannels by L2 norm, {options.inputs} images to calibrate with, {machine()}", columns)
    for task in (GLYPHS, DIGITS):
        splits = task.load(default_cache())
        for model in task.models:
            keep = options.keep
            found = row(task, model, keep, splits, options.inputs)
            rows = [(keep, found)]
            if found["float"] - found["none"] < LITTLE:
                rows.append((keep / 2, row(task, model, keep / 2, splits, options.inputs)))
            for keep, found in rows:
                shares = [recovered(found, setting) for setting in SETTINGS[1:]]
                name = f"{task.name} {model}"
                scores = (found[setting] for setting in ("float", *SETTINGS))
                table.add_row(
                    name, f"{keep:g}", *(f"{value:.4f}" for value in (*scores,)), *(f"{s:.2f}" for s in shares)
                )
    print(render(table))


if __name__ == "__main__":
    main()
