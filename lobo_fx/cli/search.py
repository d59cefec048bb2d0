"""`lobo-fx search`."""

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
    Seed,
    Threads,
    TrainBatch,
    TrainData,
    Widened,
    command,
)

__all__ = ["search"]

JOURNAL_FILE = "study.journal"
_INTERRUPTED = 130


@command
def search(
    model: ModelArgument,
    space: Annotated[Path, typer.Option(help="A recipe with choices, as a YAML file.")],
    storage: Annotated[
        str | None,
        typer.Option(help="A journal file, or the URL of an SQL database. Default: study.journal in the folder."),
    ] = None,
    study: Annotated[str, typer.Option(help="Name of the study in its storage.")] = "search",
    trials: Annotated[int, typer.Option(min=1, help="Trials of the study, by all processes together.")] = 50,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which no trial is started.")] = None,
    objectives: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            help="score, decibels, latency, size or memory; may be repeated. Default: score (or decibels) and latency.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the front and its recipes.")] = Path("out"),
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
    threads: Threads = 1,
    batch: Batch = 1,
    rounds: Rounds = 30,
    lease: Annotated[
        float, typer.Option(help="Seconds of silence after which a process counts as dead and its trial is run again.")
    ] = 60.0,
    seed: Seed = 0,
    float32: Widened = False,
) -> Answer:
    """Search settings for the best trade-offs.

    Trials belong to a study that any number of processes share and go on with.
    """
    import lobo_fx
    from lobo_fx.cli.given import read_given, read_program, read_tracing
    from lobo_fx.files import check_folder, check_writable, make_folder
    from lobo_fx.studies.front import FRONT_FILES
    from lobo_fx.studies.objectives import OBJECTIVES, chosen_objectives
    from lobo_fx.studies.space import read_space
    from lobo_fx.studies.storage import open_study
    from lobo_fx.terminal.tables import printable

    chosen = read_space(space)
    check_folder(output)
    if output.is_dir():
        for name in FRONT_FILES:
            check_writable(output / name)
    if storage is None:
        make_folder(output)
        storage = str(output / JOURNAL_FILE)
    names = chosen_objectives(objectives, evaluate is not None)
    open_study(study, storage, [OBJECTIVES[name].direction for name in names])  # refused before any work
    tracing = read_tracing(example_inputs, dynamic)
    given = read_given(calibration_data, batch, train_data, train_batch, loss, evaluate, higher_is_better)
    passes = [pass_ for variant in chosen.variants() for pass_ in variant]
    program, notes = read_program(model, checkpoint, seed, tracing, outputs, float32, passes, given, batches)
    front = lobo_fx.search(
        program,
        chosen,
        storage=storage,
        study=study,
        trials=trials,
        timeout=timeout,
        objectives=names,
        seed=seed,
        threads=threads,
        batch=batch,
        rounds=rounds,
        lease=lease,
        name=model,
        **given,
    )
    front.notes.extend(notes)
    front.save(output)
    written = [*FRONT_FILES, *(point.file for point in front)]
    return Answer(
        lambda verbose: printable(
            f"{front}written to {output}: {', '.join(FRONT_FILES)}, {len(front)} recipes for compile --recipe"
        ),
        lambda: {**front.as_json(), "folder": str(output), "written": written},
        _INTERRUPTED if front.is_interrupted else 0,
    )
