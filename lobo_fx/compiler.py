"""`compile`: trace, then pass by pass rewrite, verify and measure."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

from lobo_fx.capture.tracing import Model, trace
from lobo_fx.contracts.context import Context, Data, Evaluate, LossFunction
from lobo_fx.contracts.passbase import Pass
from lobo_fx.contracts.verification import check_model, snapshot, verify
from lobo_fx.errors import ContractError, InvalidInput, LoboError
from lobo_fx.graph.inputs import DynamicShapes
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import PASS_KEY
from lobo_fx.graph.weight_names import mark_weights
from lobo_fx.measures.counts import measure
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.recipe import PassSpec, resolve
from lobo_fx.report.records import Row
from lobo_fx.report.report import Report
from lobo_fx.result import Result
from lobo_fx.terminal.progress import spinner


def compile(
    model: Model,
    passes: PassSpec | Iterable[PassSpec] = (),
    *,
    example_inputs: object = None,
    dynamic_shapes: DynamicShapes = "batch",
    calibration_data: Data | None = None,
    train_data: Data | None = None,
    loss_fn: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Makes a trained model smaller and faster, and checks every step. The model itself is not touched.

    Args:
        model: an `nn.Module` (in any mode), a `torch.export.ExportedProgram`, or the path of a `.pt2` file.
        passes: pass objects, names (`"quantize_static"`), a recipe file or the name of a built-in recipe.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. May be left
            out where the model says what it takes (Hugging Face, timm).
        dynamic_shapes: `"batch"` keeps the batch size free; None fixes every size; anything else is
            `torch.export.export`'s own `dynamic_shapes`.
        calibration_data: batches for the passes that calibrate: a DataLoader or a list. Labels are ignored.
        train_data: batches with labels, for the passes that train.
        loss_fn: from outputs and labels to a scalar, for the passes that train.
        evaluate: from a module to a score; measured before and after every pass.
        seed: for whatever a pass draws at random.
        progress: whether to draw progress on the terminal.

    Returns:
        The compiled module with its report; `result.export("model.onnx")` writes the artifact.

    Raises:
        InvalidInput: an argument can't work; raised before any pass has run where that can be known.
        TraceError: `torch.export` can't capture the model.
        ContractError: a pass broke its promise.

    Example:
        >>> import torch, lobo_fx
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> result = lobo_fx.compile(model, ["fold_batch_norm"], example_inputs=torch.randn(1, 3, 8, 8))
        >>> result.module(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 8, 6, 6])
    """
    chosen = resolve(passes)
    with spinner("trace", progress):
        original = trace(model, example_inputs, dynamic_shapes)
        check_model(original)
    context = Context(
        original.signature, calibration_data, train_data, loss_fn, evaluate, seed=seed, show_progress=progress
    )
    if evaluate is not None and not callable(evaluate):
        raise InvalidInput(f"evaluate is a {type(evaluate).__name__}; expected a function from a module to a score")
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidInput(f"loss_fn is a {type(loss_fn).__name__}; expected a function of outputs and labels")
    if not isinstance(seed, int):
        raise InvalidInput(f"seed is {seed!r}; it must be a whole number")
    for author in chosen:
        context.require(author.needs, author.name)
    given = {"calibration_data": calibration_data, "train_data": train_data}
    context.require([name for name, data in given.items() if data is not None], "compile")
    for author in chosen:
        author.check(original)
    context.notes.extend(original.notes)
    mark_weights(original.module)
    for node in original.graph.nodes:
        node.meta[PASS_KEY] = ""

    program = original.clone()
    first = before = snapshot(original)
    report = Report(
        model=str(model) if isinstance(model, (str, Path)) else type(model).__name__,
        rows=[Row.of("original", measure(original, first.macs), math.inf, _score(evaluate, original), 0.0)],
        notes=context.notes,
        sheets=context.sheets,
    )
    for author in chosen:
        start = time.perf_counter()
        with spinner(str(author), progress and not author.needs):
            program = _run(author, program, context)
            after = verify(author, before, program, context)
        mark_weights(program.module)
        measures = measure(program, after.macs)
        snr = signal_to_noise(first.outputs, after.outputs)
        score = _score(evaluate, program)
        report.rows.append(Row.of(str(author), measures, snr, score, time.perf_counter() - start))
        before = after
    return Result(program, original, report, [(author.name, author.settings) for author in chosen], progress)


def _run(author: Pass, program: Program, context: Context) -> Program:
    try:
        rewritten = author.run(program, context)
    except LoboError:
        raise
    except Exception as error:
        raise ContractError(f"{author} failed: {type(error).__name__}: {error}") from error
    if not isinstance(rewritten, Program):
        raise ContractError(f"{author} returned a {type(rewritten).__name__}; run must return the program")
    return rewritten


def _score(evaluate: Evaluate | None, program: Program) -> float | None:
    """The user's score of a copy, which `evaluate` may switch to training or change at will."""
    if evaluate is None:
        return None
    score = evaluate(program.clone().module)
    if not isinstance(score, (int, float)):
        raise InvalidInput(f"evaluate returned a {type(score).__name__}; expected a number")
    return float(score)
