"""`lobo-fx compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lobo_fx.cli.app import (
    Batch,
    Batches,
    CalibrationData,
    Checkpoint,
    Evaluate,
    HigherIsBetter,
    Loss,
    ModelArgument,
    Outputs,
    Rounds,
    Seed,
    Static,
    Storage,
    Threads,
    TrainBatch,
    TrainData,
    Values,
    Widened,
    Workdir,
    command,
)
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.notes import Note

__all__ = ["compile"]

ORIGINAL_FILE, MODEL_FILE, PLAN_FILE, NODE_DATA = "original.onnx", "model.onnx", "plan.json", "node_data"


@command
def compile(
    model: ModelArgument,
    recipe: Annotated[str | None, typer.Option(help="A built-in recipe or a YAML file.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="NAME or NAME:setting=value,…; may be repeated.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="At most so much: a share of the original's (0.25, 25%), or a time (20ms).")
    ] = None,
    size: Annotated[str | None, typer.Option(help="At most so much: a share of the original file's, or 5MB.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Peak memory, at most: a share of the original's, or 90MB.")
    ] = None,
    drop: Annotated[float | None, typer.Option(help="What may be lost of --evaluate's score.")] = None,
    decibels: Annotated[float | None, typer.Option(help="Least signal-to-noise ratio against the original.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for files and report.")] = Path("out"),
    checkpoint: Checkpoint = None,
    outputs: Outputs = None,
    calibration_data: CalibrationData = None,
    batches: Batches = 4,
    train_data: TrainData = None,
    train_batch: TrainBatch = 32,
    loss: Loss = None,
    evaluate: Evaluate = None,
    higher_is_better: HigherIsBetter = None,
    static: Static = False,
    threads: Threads = 1,
    batch: Batch = 1,
    rounds: Rounds = 30,
    seed: Seed = 0,
    workdir: Workdir = None,
    float32: Widened = False,
    storage: Storage = None,
    values: Values = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Keep what makes the file faster in the runtime, for --threads and --batch.")
    ] = False,
) -> None:
    """Compile a model by passes, or towards a goal; export it and the original, and measure both in turn."""
    import lobo_fx
    from lobo_fx.cli.given import read_given, read_program
    from lobo_fx.files import check_folder, check_writable, make_folder
    from lobo_fx.plugins.exporters import exporter_of
    from lobo_fx.plugins.registry import EXPORTERS, PASSES
    from lobo_fx.plugins.tuning import Tuning
    from lobo_fx.recipe import read_pass, resolve
    from lobo_fx.report.report import REPORT_FILES
    from lobo_fx.result import CARD, SAMPLE
    from lobo_fx.saving import check_target
    from lobo_fx.terminal.tables import printable

    limits = {"latency": latency, "size": size, "memory": memory, "drop": drop, "decibels": decibels}
    wanted = [] if all(limit is None for limit in limits.values()) else [PASSES.get("fit_goal")(**limits)]
    if (recipe is not None and passes) or not (recipe or passes or wanted):
        raise InvalidInput(
            "give --recipe, or one or more --pass, or a goal such as --latency; `lobo-fx passes` lists what there is"
        )
    chosen = [*(resolve(recipe) if recipe else [read_pass(text) for text in passes or []]), *wanted]
    exporter = exporter_of(EXPORTERS.default, storage=storage, values=values)
    check_target(output / "program")
    check_folder(output / NODE_DATA)
    if output.is_dir():
        for name in (ORIGINAL_FILE, MODEL_FILE, PLAN_FILE, CARD, SAMPLE, *REPORT_FILES):
            check_writable(output / name)
    given = read_given(calibration_data, batch, train_data, train_batch, loss, evaluate, higher_is_better)
    program, notes = read_program(model, checkpoint, seed, static, outputs, float32, chosen, given, batches)
    result = lobo_fx.compile(program, chosen, seed=seed, workdir=workdir, **given)
    result.report.model = model
    result.report.notes[:0] = map(Note, notes)
    make_folder(output)
    result.export_original(output / ORIGINAL_FILE)
    result.export(output / MODEL_FILE, exporter, tune=tune and Tuning((threads,) if threads > 1 else (), batch))
    for artifact in result.report.artifacts.values():
        artifact.gzip_bytes  # noqa: B018  measured here, shown in the report
    result.benchmark(threads=threads, batch=batch, rounds=rounds)
    result.save_node_data(output / NODE_DATA)
    result.save(output / "program")
    written = [
        MODEL_FILE,
        ORIGINAL_FILE,
        "program/",
        f"{NODE_DATA}/",
        *(file.name for file in [*result.save_card(output), *result.report.save(output)]),
    ]
    if result.plan is not None:
        result.plan.save(output / PLAN_FILE)
        written.append(PLAN_FILE)
    typer.echo(str(result))
    typer.echo(printable(f"written to {output}: {', '.join(written)}"))
