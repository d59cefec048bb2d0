"""`lobo-fx compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lobo_fx.cli.app import (
    Answer,
    Batch,
    Batches,
    CalibrationData,
    Checkpoint,
    Dynamic,
    Evaluate,
    ExampleInputs,
    HigherIsBetter,
    Loss,
    ModelArgument,
    Outputs,
    Rounds,
    RuntimeName,
    Seed,
    Storage,
    Threads,
    TrainBatch,
    TrainData,
    Values,
    Widened,
    Workdir,
    command,
)
from lobo_fx.cli.completion import complete_pass, complete_plugin, complete_recipe
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.notes import Note

__all__ = ["compile"]

PLAN_FILE, NODE_DATA = "plan.json", "node_data"


@command
def compile(
    model: ModelArgument,
    recipe: Annotated[
        str | None, typer.Option(help="A built-in recipe or a YAML file.", autocompletion=complete_recipe)
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", help="NAME or NAME:setting=value,…; may be repeated.", autocompletion=complete_pass),
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
    example_inputs: ExampleInputs = None,
    dynamic: Dynamic = "auto",
    outputs: Outputs = None,
    calibration_data: CalibrationData = None,
    batches: Batches = 4,
    train_data: TrainData = None,
    train_batch: TrainBatch = 32,
    loss: Loss = None,
    evaluate: Evaluate = None,
    higher_is_better: HigherIsBetter = None,
    exporter: Annotated[
        str, typer.Option(help="Format of the files.", autocompletion=complete_plugin("EXPORTERS"))
    ] = "onnx",
    runtime: RuntimeName = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    rounds: Rounds = 30,
    seed: Seed = 0,
    workdir: Workdir = None,
    float32: Widened = False,
    storage: Storage = None,
    values: Values = None,
    confirm: Annotated[
        bool, typer.Option(help="Measure integer kernels, and take them back where they are slower.")
    ] = True,
    tune: Annotated[
        bool, typer.Option("--tune", help="Keep what makes the file faster in the runtime, for --threads and --batch.")
    ] = False,
) -> Answer:
    """Compile a model by passes or towards a goal, and measure it.

    It is exported beside the original, and both files run in turn. MODEL may be an ONNX file.
    """
    import lobo_fx
    from lobo_fx.cli.given import read_given, read_passes, read_program, read_tracing
    from lobo_fx.contracts.tuning import read_tuning
    from lobo_fx.files import check_folder, check_writable, make_folder
    from lobo_fx.plugins.exporters import exporter_of
    from lobo_fx.plugins.protocols import ChecksPrograms
    from lobo_fx.plugins.registry import EXPORTERS, PASSES, RUNTIMES
    from lobo_fx.plugins.tuning import Tuning
    from lobo_fx.report.report import REPORT_FILES
    from lobo_fx.result import CARD, SAMPLE
    from lobo_fx.saving import check_target
    from lobo_fx.terminal.tables import printable

    limits = {"latency": latency, "size": size, "memory": memory, "drop": drop, "decibels": decibels}
    wanted = [] if all(limit is None for limit in limits.values()) else [PASSES.ours("fit_goal")(**limits)]
    if drop is not None and evaluate is None:
        raise InvalidInput("--drop needs --evaluate, whose score may drop by so much")
    chosen = [*read_passes(recipe, passes), *wanted]
    if not chosen:
        raise InvalidInput(
            "give --recipe, or one or more --pass, or a goal such as --latency; `lobo-fx passes` and `lobo-fx recipes` "
            "list what there is"
        )
    plain, writer = exporter_of(exporter), exporter_of(exporter, storage=storage, values=values)
    RUNTIMES.get(runtime)
    tuning = tune and Tuning((threads,) if threads > 1 else (), batch, runtime)
    read_tuning(tuning, writer)
    original_file, model_file = f"original{writer.suffix}", f"model{writer.suffix}"
    check_target(output / "program")
    is_ours = isinstance(writer, EXPORTERS.ours(EXPORTERS.default))  # a card and node data read files with our runtime
    if is_ours:
        check_folder(output / NODE_DATA)
    if output.is_dir():
        for name in (original_file, model_file, PLAN_FILE, CARD, SAMPLE, *REPORT_FILES):
            check_writable(output / name)
    if workdir is not None:
        check_folder(workdir)
    tracing = read_tracing(example_inputs, dynamic)
    given = read_given(calibration_data, batch, train_data, train_batch, loss, evaluate, higher_is_better)
    program, notes = read_program(model, checkpoint, seed, tracing, outputs, float32, chosen, given, batches)
    if isinstance(writer, ChecksPrograms):
        writer.check_program(program)
    result = lobo_fx.compile(program, chosen, seed=seed, workdir=workdir, **given)
    result.report.model = model
    result.report.notes[:0] = map(Note, notes)
    make_folder(output)
    result.export_original(output / original_file, plain)
    result.export(output / model_file, writer, confirm=confirm, tune=tuning)
    for artifact in result.report.artifacts.values():
        artifact.gzip_bytes  # noqa: B018  measured here, shown in the report
    result.benchmark(threads=threads, batch=batch, rounds=rounds, runtime=runtime, exporter=writer)
    written = [model_file, original_file, "program/"]
    if is_ours:
        result.save_node_data(output / NODE_DATA)
        written.append(f"{NODE_DATA}/")
    result.save(output / "program")
    cards = result.save_card(output) if is_ours else []
    written += [file.name for file in [*cards, *result.report.save(output)]]
    if result.plan is not None:
        result.plan.save(output / PLAN_FILE)
        written.append(PLAN_FILE)
    return Answer(
        lambda verbose: printable(f"{result.report.to_text(verbose)}written to {output}: {', '.join(written)}"),
        lambda: {**result.report.as_json(), "folder": str(output), "written": written},
    )
