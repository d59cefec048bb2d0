"""Reads the model and the data that a command line names; shared by several commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lobo_fx.contracts.context import SAY_WHICH, direction_of
from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.inputs import HOW_TO_PASS, DynamicShapes, Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.tensors import unusual_weight
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import builtin_recipes, read_pass, resolve
from lobo_fx.sources.batches import random_batches, read_batches, read_example_inputs, read_training_batches
from lobo_fx.sources.dynamic import read_dynamic
from lobo_fx.sources.losses import read_loss
from lobo_fx.sources.models import build_program, trace_built, weights_are_random
from lobo_fx.sources.user_code import function_from_file
from lobo_fx.terminal.progress import spinner

__all__ = ["read_given", "read_model", "read_passes", "read_program", "read_tracing"]

_HOW_TO_GIVE = (
    "Give --example-inputs: a .npz or .safetensors file with arrays by the names of inputs, or file.py:function"
)

_GIVE_WHICH = "give --lower-is-better, or --higher-is-better"
_OPTIONS = {"train_data": "--train-data", "loss_fn": "--loss", "evaluate": "--evaluate"}
"""Inputs of passes that random data can't replace, with their options on the command line."""


def read_passes(recipe: str | None, passes: Sequence[str] | None) -> list[Pass]:
    """The passes of `--recipe`, or of several `--pass`.

    Raises:
        InvalidInput: both are given, or a name is unknown; similar recipes, or similar passes, are suggested.
    """
    if recipe is not None and passes:
        raise InvalidInput("give --recipe, or one or more --pass, not both")
    if recipe is None:
        return [read_pass(text) for text in passes or ()]
    known = builtin_recipes()
    if recipe not in known and not recipe.endswith((".yaml", ".yml")):
        names = {*PASSES.names(), *(alias for aliases in PASSES.names().values() for alias in aliases)}
        if recipe.partition(":")[0] in names:
            raise InvalidInput(f"'{recipe}' is a pass; write --pass {recipe}")
        raise InvalidInput(f"no recipe is called '{recipe}', and it is no .yaml file; {suggestion(recipe, known)}")
    return resolve(recipe)


def read_tracing(example_inputs: str | None, dynamic: str) -> tuple[Inputs | None, DynamicShapes]:
    """The inputs to trace a model with, and which sizes stay free.

    Raises:
        InvalidInput: a file or function is missing or holds no inputs, or the syntax of sizes is wrong.
    """
    sizes = read_dynamic(dynamic)
    return None if example_inputs is None else read_example_inputs(example_inputs), sizes


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
        InvalidInput: a file or function is missing or can't be read, or it is unclear whether higher scores are better.
    """
    if higher_is_better is not None and evaluate is None:
        raise InvalidInput("--higher-is-better and --lower-is-better are said of --evaluate's scores; give --evaluate")
    found: dict[str, Any] = {
        "calibration_data": None if calibration_data is None else read_batches(calibration_data, batch),
        "train_data": None if train_data is None else read_training_batches(train_data, train_batch),
        "loss_fn": None if loss is None else read_loss(loss),
        "evaluate": None if evaluate is None else function_from_file(evaluate),
        "higher_is_better": higher_is_better,
    }
    try:
        direction_of(found["evaluate"], found["loss_fn"], higher_is_better)
    except InvalidInput as error:
        raise InvalidInput(str(error).replace(SAY_WHICH, _GIVE_WHICH)) from error
    return found


def read_model(
    model: str,
    checkpoint: Path | None,
    seed: int,
    tracing: tuple[Inputs | None, DynamicShapes] = (None, "auto"),
    outputs: Sequence[str] | None = None,
    float32: bool = False,
) -> Program:
    """Builds or reads a model, and traces it.

    Raises:
        InvalidInput: no such model.
        TraceError: the model can't be traced.
    """
    inputs, sizes = tracing
    if not model.endswith(".onnx"):
        try:
            return build_program(model, checkpoint, seed, sizes, outputs, float32, inputs)
        except InvalidInput as error:
            raise InvalidInput(str(error).replace(HOW_TO_PASS, _HOW_TO_GIVE)) from error
    from lobo_fx.exporters.onnx.reader import example_inputs_of, read_onnx

    if checkpoint is not None or float32:
        raise InvalidInput("an .onnx file holds its own weights as they are; leave out the checkpoint and --float32")
    module = read_onnx(Path(model), inputs)
    return trace_built(model, module, example_inputs_of(module) if inputs is None else inputs, sizes, outputs)


def read_program(
    model: str,
    checkpoint: Path | None,
    seed: int,
    tracing: tuple[Inputs | None, DynamicShapes],
    outputs: Sequence[str] | None,
    float32: bool,
    passes: Iterable[Pass],
    given: dict[str, Any],
    batches: int,
) -> tuple[Program, list[str]]:
    """Builds or reads a model and traces it; also returns notes for the report.

    If a pass needs calibration data and none is given, random batches are used.

    Raises:
        InvalidInput: a pass lacks something that it needs, there is no such model, or its weights are of a type that no
            runtime computes in.
        TraceError: the model can't be traced.
    """
    passes = list(passes)
    _check_needs(passes, given, "train_data", "evaluate")
    with spinner("trace"):
        program = read_model(model, checkpoint, seed, tracing, outputs, float32)
    if not program.signature.gives_loss:
        _check_needs(passes, given, "loss_fn")
    if unusual := unusual_weight(program.module):
        raise InvalidInput(f"{unusual}; give --float32 to widen it")
    notes = []
    if weights_are_random(model, checkpoint):
        notes.append(f"the weights are random (seed {seed}): sizes and latencies are real, accuracies are not")
    if given["calibration_data"] is None and any("calibration_data" in pass_.needs for pass_ in passes):
        notes.append("calibrated on random data: give --calibration-data for ranges that fit yours")
        given["calibration_data"] = random_batches(program.example_inputs, batches, seed)
    return program, notes


def _check_needs(passes: Iterable[Pass], given: dict[str, Any], *needs: str) -> None:
    for pass_ in passes:
        for need in needs:
            if need in pass_.needs and given[need] is None:
                raise InvalidInput(f"{pass_.name} needs {_OPTIONS[need]}")
