"""`compile`: traces a model, then rewrites it pass by pass, verifying and measuring after each pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lobo_fx.capture.naming import name_values
from lobo_fx.capture.outputs import keep_outputs
from lobo_fx.capture.tracing import Model, trace
from lobo_fx.contracts.context import Context, Data, Evaluate, LossFunction, direction_of
from lobo_fx.contracts.passbase import Pass
from lobo_fx.contracts.pipeline import Pipeline
from lobo_fx.contracts.verification import check_model
from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_folder
from lobo_fx.goal import Goal
from lobo_fx.graph.inputs import DynamicShapes
from lobo_fx.graph.notes import Note
from lobo_fx.graph.program import Program
from lobo_fx.graph.randomness import random_state_kept
from lobo_fx.graph.tensors import unusual_weight
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import PassSpec, resolve
from lobo_fx.result import Result
from lobo_fx.terminal.progress import spinner
from lobo_fx.workdir import Workdir

__all__ = ["compile", "compile_again"]


@random_state_kept
def compile(
    model: Model | Program | Result,
    passes: PassSpec | Iterable[PassSpec] = (),
    *,
    goal: Goal | None = None,
    example_inputs: object = None,
    dynamic_shapes: DynamicShapes = "auto",
    outputs: str | Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    calibration_data: Data | None = None,
    train_data: Data | None = None,
    loss_fn: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    higher_is_better: bool | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Makes a trained model smaller and faster, and checks every step. The model itself is not touched.

    Args:
        model: an `nn.Module` (in any mode), a `torch.export.ExportedProgram`, the path of a `.pt2` file, a `Program`
            that was traced before, or a `Result`; the report of a `Result` is continued.
        passes: pass objects, names (`"quantize_static"`), a recipe file or the name of a built-in recipe.
        goal: limits of latency, size, memory or loss. After the passes, a search looks for a model that meets them
            (`lobo_fx.passes.FitGoal`); `Result.front` holds the other models that it found.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. May be left out where the
            model describes its own inputs (Hugging Face, timm).
        dynamic_shapes: `"auto"` keeps the batch size and the sequence lengths free, where the model allows it;
            `"batch"` only the batch size; `"all"` every size, also of images; None fixes every size; anything else is
            passed to `torch.export.export` as `dynamic_shapes`.
        outputs: names of the outputs to keep, as exported files have them: keys of a dict (`logits`; `hidden_states`
            for all hidden states), else `output_0`, `output_1` and so on; None keeps all. Operators that only the other
            outputs need are removed before any pass runs. A dict or `ModelOutput` then holds only the chosen entries; a
            tuple or list holds None for the others.
        names: new names of inputs, outputs and free dimensions in exported files, keyed by their default names
            (`{"output_0": "boxes", "batch": "images"}`; a single output is `output`). The module is still called as
            before.
        calibration_data: batches for the passes that calibrate: a DataLoader or a list. Labels are ignored.
        train_data: batches with labels, for the passes that train.
        loss_fn: a function from outputs and labels to a scalar, for the passes that train.
        evaluate: a function from a module to a score; called before and after every pass, and on exported files.
        higher_is_better: False where `evaluate` returns an error or a loss: scores are then negated. None takes a
            higher score as better, and refuses an `evaluate` that is named like a loss.
        seed: seeds every random draw of the passes.
        workdir: a folder where the program is kept after every pass. An interrupted call goes on after the last
            finished pass; a call with other passes goes on after the last pass that both share. Measurements (moments,
            gradients, sensitivities) are reused under other settings, if the data is a list. All is keyed by checksums
            of program, data, settings, functions and code, but neither the rows of a loader nor code that your
            functions call in other modules is looked at: give another folder where these change.
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
    if goal is not None:
        if not isinstance(goal, Goal):
            raise InvalidInput(f"goal is a {type(goal).__name__}; expected lobo_fx.Goal(latency=0.25), for instance")
        if goal.drop is not None and evaluate is None:
            raise InvalidInput("drop= of the goal needs evaluate=; pass it to lobo_fx.compile")
        chosen.append(PASSES.ours("fit_goal")(**dataclasses.asdict(goal)))
    if outputs is not None and isinstance(model, Result):
        raise InvalidInput("a Result has its outputs; choose them where its model is compiled first")
    if evaluate is not None and not callable(evaluate):
        raise InvalidInput(f"evaluate is a {type(evaluate).__name__}; expected a function from a module to a score")
    higher = direction_of(evaluate, loss_fn, higher_is_better)
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidInput(f"loss_fn is a {type(loss_fn).__name__}; expected a function of outputs and labels")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidInput(f"seed is {seed!r}; it must be a whole number from 0 to 2**63 - 1")
    with spinner("trace", progress):
        program = _program(model, example_inputs, dynamic_shapes)
        if outputs is not None:
            program = keep_outputs(program, outputs)
        if names is not None:
            program = name_values(program, names)
        check_model(program)
    context = Context(
        program.signature,
        calibration_data,
        train_data,
        loss_fn,
        evaluate,
        higher,
        seed=seed,
        show_progress=progress,
    )
    if not higher:
        context.notes.append(Note("scores are negated: of what evaluate returns, lower is better"))
    for pass_ in chosen:
        context.require(pass_.needs, pass_.name)
    given = {"calibration_data": calibration_data, "train_data": train_data}
    context.require([name for name, data in given.items() if data is not None], "compile")
    _check_folders(chosen)
    if workdir is not None:
        check_folder(Path(workdir))
    for pass_ in chosen:
        pass_.check(program)
    if unusual := unusual_weight(program.module):
        context.notes.append(Note(f"{unusual}, so `export` will refuse it: compile model.float() to export"))
    context.notes.extend(program.notes)
    earlier = model if isinstance(model, Result) else None
    pipeline = Pipeline.start(program if earlier is None or earlier.original is None else earlier.original, context)
    if earlier is not None:
        pipeline.go_on_from(earlier.program, earlier.report.rows)
        context.notes[:] = dict.fromkeys([*earlier.report.notes, *context.notes])
        context.sheets[:0] = earlier.report.sheets
    if workdir is not None:
        Workdir(Path(workdir), pipeline).run(chosen)
    else:
        for pass_ in chosen:
            pipeline.run(pass_)
    done = [*(earlier.passes if earlier else ()), *((pass_.name, pass_.settings) for pass_ in chosen)]
    return Result(pipeline.program, pipeline, pipeline.report(_name(model), done), done, progress)


def compile_again(original: Result, passes: Sequence[Pass]) -> Result:
    """Runs passes on a model that was compiled without any, without tracing or measuring the original again.

    Args:
        original: what `compile` returned with no passes; not changed.
        passes: what to run.

    Raises:
        InvalidInput: as `compile`.
        ContractError: likewise.
    """
    assert original.pipeline is not None
    pipeline = original.pipeline.fork()
    pipeline.context = dataclasses.replace(pipeline.context, show_progress=False, measurements=None)
    for pass_ in passes:
        pipeline.context.require(pass_.needs, pass_.name)
        pass_.check(pipeline.program)
    for pass_ in passes:
        pipeline.run(pass_)
    done = [(pass_.name, pass_.settings) for pass_ in passes]
    return Result(pipeline.program, pipeline, pipeline.report(original.report.model, done), done, False)


def _program(model: Model | Program | Result, example_inputs: object, dynamic_shapes: DynamicShapes) -> Program:
    """The program that the passes start from: a traced model, a given program, or the program of a result.

    Raises:
        InvalidInput: inputs or free sizes are given where they are fixed already.
    """
    if not isinstance(model, (Program, Result)):
        return trace(model, example_inputs, dynamic_shapes)
    if example_inputs is not None:
        raise InvalidInput(f"a {type(model).__name__} holds its example inputs; leave example_inputs out")
    if dynamic_shapes != "auto":
        raise InvalidInput(f"a {type(model).__name__} says itself which sizes are free; leave dynamic_shapes out")
    return model if isinstance(model, Program) else model.program


def _check_folders(chosen: Sequence[Pass]) -> None:
    """Refuses two passes with the same checkpoint folder: the second would resume from the checkpoints of the first.

    Raises:
        InvalidInput: names both.
    """
    owners: dict[Path, str] = {}
    for pass_ in chosen:
        folder = pass_.settings.get("checkpoint_dir")
        if folder is None:
            continue
        path = Path(folder).resolve()
        if path in owners:
            raise InvalidInput(
                f"{owners[path]} and {pass_.name} both have checkpoint_dir {folder}; give each a folder of its own"
            )
        owners[path] = pass_.name


def _name(model: Model | Program | Result) -> str:
    if isinstance(model, Result):
        return model.report.model
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__
