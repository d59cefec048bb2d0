"""`lobo-fx costs`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lobo_fx.cli.app import Answer, Checkpoint, Dynamic, ExampleInputs, ModelArgument, Outputs, Seed, command

__all__ = ["costs"]


@command
def costs(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the table to this file.")] = None,
    widths: Annotated[
        bool, typer.Option("--widths", help="Also at narrower widths, as a goal for this machine asks for them.")
    ] = False,
    checkpoint: Checkpoint = None,
    example_inputs: ExampleInputs = None,
    dynamic: Dynamic = "auto",
    outputs: Outputs = None,
    seed: Seed = 0,
) -> Answer:
    """Measure what operators cost on this CPU, as float and integers.

    Shown is what the model asks for; with --verbose, all that was ever measured here.
    """
    from lobo_fx.cli.given import read_model, read_tracing
    from lobo_fx.contracts.context import Context
    from lobo_fx.contracts.verification import check_runs
    from lobo_fx.files import check_writable
    from lobo_fx.plugins.kernels import Kernel
    from lobo_fx.plugins.registry import PASSES, RUNTIMES
    from lobo_fx.terminal.progress import spinner
    from lobo_fx.terminal.tables import folded

    if output is not None:
        check_writable(output)
    tracing = read_tracing(example_inputs, dynamic)
    program = read_model(model, checkpoint, seed, tracing, outputs)
    check_runs(program)
    context = Context(program.signature)
    _, choices = PASSES.ours("quantize_static")().simplify(program.clone(), context)
    if widths:
        priced = PASSES.ours("fit_goal")().priced(program, context)
        with spinner("measure kernels at all widths"):
            choices.costs.measure(priced, RUNTIMES.ours(RUNTIMES.default)().measure_kernels)
    if output is not None:
        choices.costs.save(output)
    placement = choices.place()
    asked = {kernel.key for kernel in choices.kernels.values() if isinstance(kernel, Kernel)}
    own = {key: cost for key, cost in choices.costs.costs.items() if key in asked}
    said = [folded(line) for line in str(placement).splitlines()]
    shown = dataclasses.replace(choices.costs, costs=own)
    return Answer(
        lambda verbose: "\n".join([str(choices.costs if verbose else shown), *said]),
        lambda: {
            "machine": choices.costs.machine,
            "costs": choices.costs.costs,
            "failures": choices.costs.failures,
            "integer": {name: str(observing) for name, observing in placement.integer.items()},
            "floating": placement.floating,
            "microseconds": placement.microseconds,
            "in_float": placement.in_float,
        },
    )
