"""`lobo-fx compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lobo_fx.cli.app import Batch, Checkpoint, ModelArgument, Outputs, Rounds, Seed, Threads, Widened, command
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.notes import Note

__all__ = ["compile"]

ORIGINAL_FILE, MODEL_FILE = "original.onnx", "model.onnx"


@command
def compile(
    model: ModelArgument,
    recipe: Annotated[str | None, typer.Option(help="A built-in recipe or a YAML file.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="NAME or NAME:setting=value,…; may be repeated.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for files and report.")] = Path("out"),
    checkpoint: Checkpoint = None,
    outputs: Outputs = None,
    calibration_data: Annotated[
        str | None, typer.Option(help=".npy, .npz, .safetensors, or file.py:function. Default: random data.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Random calibration batches, where no data is given.")] = 4,
    train_data: Annotated[
        str | None,
        typer.Option(help=".npz or .safetensors with an array 'labels', or file.py:function that returns batches."),
    ] = None,
    train_batch: Annotated[int, typer.Option(min=1, help="Rows of a training batch, where arrays are given.")] = 32,
    loss: Annotated[
        str | None, typer.Option(help="file.py:function of outputs and labels, or one of torch.nn.functional.")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="file.py:function from a module to a score, higher is better.")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Fix all sizes, the batch included.")] = False,
    threads: Threads = 1,
    batch: Batch = 1,
    rounds: Rounds = 30,
    seed: Seed = 0,
    float32: Widened = False,
) -> None:
    """Compile a model, export it and the original, and measure both in turn."""
    import lobo_fx
    from lobo_fx.files import check_writable, make_folder
    from lobo_fx.graph.tensors import unusual_weight
    from lobo_fx.recipe import read_pass, resolve
    from lobo_fx.report.report import REPORT_FILES
    from lobo_fx.saving import check_target
    from lobo_fx.sources.batches import random_batches, read_batches, read_training_batches
    from lobo_fx.sources.losses import read_loss
    from lobo_fx.sources.models import build_program, weights_are_random
    from lobo_fx.sources.user_code import function_from_file
    from lobo_fx.terminal.progress import spinner

    if (recipe is None) == (not passes):
        raise InvalidInput("give --recipe, or one or more --pass; `lobo-fx passes` lists both")
    chosen = resolve(recipe) if recipe else [read_pass(text) for text in passes or []]
    check_target(output / "program")
    if output.is_dir():
        for name in (ORIGINAL_FILE, MODEL_FILE, *REPORT_FILES):
            check_writable(output / name)
    data = None if calibration_data is None else read_batches(calibration_data, batch)
    given: dict[str, Any] = {
        "train_data": None if train_data is None else read_training_batches(train_data, train_batch),
        "loss_fn": None if loss is None else read_loss(loss),
        "evaluate": None if evaluate is None else function_from_file(evaluate),
    }
    with spinner("trace"):
        program = build_program(model, checkpoint, seed, None if static else "auto", outputs, float32)
    if unusual := unusual_weight(program.module):
        raise InvalidInput(f"{unusual}; give --float32 to widen it")
    notes = []
    if weights_are_random(model, checkpoint):
        notes.append(f"the weights are random (seed {seed}): sizes and latencies are real, accuracies are not")
    if data is None and any("calibration_data" in pass_.needs for pass_ in chosen):
        notes.append("calibrated on random data: give --calibration-data for ranges that fit yours")
        data = random_batches(program.example_inputs, batches, seed)
    result = lobo_fx.compile(program, chosen, calibration_data=data, seed=seed, **given)
    result.report.model = model
    result.report.notes[:0] = map(Note, notes)
    make_folder(output)
    result.export_original(output / ORIGINAL_FILE)
    result.export(output / MODEL_FILE)
    for artifact in result.report.artifacts.values():
        artifact.gzip_bytes  # noqa: B018  measured here, shown in the report
    result.benchmark(threads=threads, batch=batch, rounds=rounds)
    result.save(output / "program")
    result.report.save(output)
    typer.echo(str(result))
    typer.echo(f"written to {output}: {MODEL_FILE}, {ORIGINAL_FILE}, program/, report.md, report.csv, report.json")
