"""`lobo-fx benchmark`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lobo_fx.cli.app import Answer, Batch, Rounds, RuntimeName, Threads, command
from lobo_fx.errors import InvalidInput

__all__ = ["benchmark"]


@command
def benchmark(
    files: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Files to measure; the first is the reference.")
    ],
    runtime: RuntimeName = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    length: Annotated[int, typer.Option(min=1, help="Size of every other free dimension.")] = 64,
    rounds: Rounds = 30,
) -> Answer:
    """Measure files in turn: latency, throughput, peak memory.

    Inputs are random: of --batch rows, and of --length along every other dimension that is free.
    """
    from lobo_fx.measures.latency import benchmark as measure
    from lobo_fx.plugins.registry import RUNTIMES
    from lobo_fx.plugins.tuning import TunesFiles
    from lobo_fx.terminal.tables import printable

    labels = [file.name for file in files]
    if len(set(labels)) < len(labels):
        labels = [str(file) for file in files]
    if len(set(labels)) < len(labels):
        raise InvalidInput("a file is given twice")
    engine, named = RUNTIMES.get(runtime)(), dict(zip(labels, files, strict=True))
    found = measure(named, engine, threads=threads, batch=batch, length=length, rounds=rounds)
    options = (
        {label: engine.options_of(file) for label, file in named.items()} if isinstance(engine, TunesFiles) else {}
    )
    notes = [
        f"{label} ran with the options beside it, on {threads} thread(s): {said}"
        for label, said in options.items()
        if said
    ]
    return Answer(
        lambda verbose: f"{found}" + "".join(printable(f"note: {note}\n") for note in notes),
        lambda: {**dataclasses.asdict(found), "notes": [*notes, *found.busy]},
    )
