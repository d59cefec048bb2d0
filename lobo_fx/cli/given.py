"""The model and the data that a command line names, read and traced: what `compile` and `search` share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.program import Program
from lobo_fx.graph.tensors import unusual_weight
from lobo_fx.sources.batches import random_batches, read_batches, read_training_batches
from lobo_fx.sources.losses import read_loss
from lobo_fx.sources.models import build_program, weights_are_random
from lobo_fx.sources.user_code import function_from_file
from lobo_fx.terminal.progress import spinner

__all__ = ["read_given", "read_program"]


def read_given(
    calibration_data: str | None,
    batch: int,
    train_data: str | None,
    train_batch: int,
    loss: str | None,
    evaluate: str | None,
    higher_is_better: bool | None,
) -> dict[str, Any]:
    """Data, loss and score by the names of `lobo_fx.compile`; None where nothing is given.

    Raises:
        InvalidInput: a file or function is missing, or can't be read.
    """
    return {
        "calibration_data": None if calibration_data is None else read_batches(calibration_data, batch),
        "train_data": None if train_data is None else read_training_batches(train_data, train_batch),
        "loss_fn": None if loss is None else read_loss(loss),
        "evaluate": None if evaluate is None else function_from_file(evaluate),
        "higher_is_better": higher_is_better,
    }


def read_program(
    model: str,
    checkpoint: Path | None,
    seed: int,
    static: bool,
    outputs: Sequence[str] | None,
    float32: bool,
    passes: Iterable[Pass],
    given: dict[str, Any],
    batches: int,
) -> tuple[Program, list[str]]:
    """The model, traced, and what a reader of the report must know of it.

    Random batches become the calibration data where a pass needs some and none are given.

    Raises:
        InvalidInput: no such model, or its weights are of a type that no runtime computes in.
        TraceError: the model can't be traced.
    """
    with spinner("trace"):
        program = build_program(model, checkpoint, seed, None if static else "auto", outputs, float32)
    if unusual := unusual_weight(program.module):
        raise InvalidInput(f"{unusual}; give --float32 to widen it")
    notes = []
    if weights_are_random(model, checkpoint):
        notes.append(f"the weights are random (seed {seed}): sizes and latencies are real, accuracies are not")
    if given["calibration_data"] is None and any("calibration_data" in pass_.needs for pass_ in passes):
        notes.append("calibrated on random data: give --calibration-data for ranges that fit yours")
        given["calibration_data"] = random_batches(program.example_inputs, batches, seed)
    return program, notes
