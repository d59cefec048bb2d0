"""`lobo-fx inspect`."""

from __future__ import annotations

import json
from collections import Counter

import typer

from lobo_fx.cli.app import AsJson, Checkpoint, ModelArgument, Outputs, Seed, command

__all__ = ["inspect"]


@command
def inspect(
    model: ModelArgument,
    checkpoint: Checkpoint = None,
    outputs: Outputs = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show what the compiler sees in a model: inputs, outputs, operators, what can be pruned and what can't."""
    from lobo_fx.axes import Inference
    from lobo_fx.axes.survey import axis_table, lock_table, survey
    from lobo_fx.measures.counts import measure, run_counted
    from lobo_fx.sources.models import build_program
    from lobo_fx.terminal.tables import new_table, printable, render

    program = build_program(model, checkpoint, seed, outputs=outputs)
    measures = measure(program, run_counted(program)[1])
    inference = Inference(program).run()
    operators = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    facts = {
        "model": model,
        "inputs": [str(spec) for spec in program.signature.inputs],
        "outputs": [str(spec) for spec in program.signature.outputs],
        "parameters": measures.parameters,
        "macs": measures.macs,
        "bytes": measures.bytes,
        "operators": dict(operators.most_common()),
        "axes": survey(inference).as_json(),
        "notes": program.notes,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{model}: {measures.parameters:,} parameters, {(measures.macs or 0) / 1e6:,.1f}M MACs a row")
    for label in ("inputs", "outputs", "notes"):
        for line in facts[label]:  # type: ignore[attr-defined]
            typer.echo(printable(f"{label.removesuffix('s')}: {line}"))
    found = survey(inference)
    typer.echo(f"{found.free_share:.1%} of the parameters can be pruned along {len(found.axes)} free axes")
    typer.echo(render(axis_table(found)))
    if found.locks or found.half_locks:
        typer.echo(render(lock_table(found)))
    shown = new_table("operators", ["operator", "count"])
    for name, count in operators.most_common():
        shown.add_row(name, str(count))
    typer.echo(render(shown))
