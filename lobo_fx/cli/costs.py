"""`lobo-fx costs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lobo_fx.cli.app import Checkpoint, ModelArgument, Outputs, Seed, command

__all__ = ["costs"]


@command
def costs(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the table to this file.")] = None,
    widths: Annotated[
        bool, typer.Option("--widths", help="Also at narrower widths, as a goal for this machine asks for them.")
    ] = False,
    checkpoint: Checkpoint = None,
    outputs: Outputs = None,
    seed: Seed = 0,
) -> None:
    """Measure what a model's operators cost on this CPU, and say where integers would run."""
    from lobo_fx.contracts.context import Context
    from lobo_fx.files import check_writable
    from lobo_fx.plugins.registry import PASSES, RUNTIMES
    from lobo_fx.sources.models import build_program
    from lobo_fx.terminal.progress import spinner

    if output is not None:
        check_writable(output)
    program = build_program(model, checkpoint, seed, outputs=outputs)
    context = Context(program.signature)
    _, choices = PASSES.get("quantize_static")().simplify(program.clone(), context)
    if widths:
        priced = PASSES.get("fit_goal")().priced(program, context)
        with spinner("measure kernels at all widths"):
            choices.costs.add(RUNTIMES.get(RUNTIMES.default)().measure_kernels(choices.costs.missing(priced)))
    if output is not None:
        choices.costs.save(output)
    typer.echo(str(choices.costs))
    typer.echo(str(choices.place()))
