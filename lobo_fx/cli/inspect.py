"""`lobo-fx inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lobo_fx.cli.app import (
    Answer,
    Batch,
    Checkpoint,
    Dynamic,
    ExampleInputs,
    ModelArgument,
    Outputs,
    Seed,
    command,
)
from lobo_fx.errors import InvalidInput

__all__ = ["inspect"]


@command
def inspect(
    model: ModelArgument,
    checkpoint: Checkpoint = None,
    example_inputs: ExampleInputs = None,
    dynamic: Dynamic = "auto",
    outputs: Outputs = None,
    batch: Batch = 1,
    seed: Seed = 0,
) -> Answer:
    """Show what is in a model or an ONNX file.

    Of a model: inputs, outputs, operators, what can be pruned and what can't. Of an ONNX file, anyone's: operators,
    precisions, sizes, the kernels that ONNX Runtime runs, and how long each takes.
    """
    if model.endswith(".onnx"):
        if checkpoint is not None or outputs or dynamic != "auto":
            raise InvalidInput("an ONNX file is shown as it is; leave out --checkpoint, --outputs and --dynamic")
        if seed:
            raise InvalidInput("an ONNX file holds its own weights; leave out --seed")
        return _file(Path(model), example_inputs, batch)
    if batch != 1:
        raise InvalidInput("a model is traced with its example inputs; leave out --batch, which is for ONNX files")
    return _program(model, checkpoint, example_inputs, dynamic, outputs, seed)


def _file(path: Path, example_inputs: str | None, batch: int) -> Answer:
    from lobo_fx.exporters.onnx.inspection import inspect_file
    from lobo_fx.terminal.progress import spinner

    arrays = None
    if example_inputs is not None:
        from lobo_fx.sources.batches import read_example_inputs

        given = read_example_inputs(example_inputs)
        if given.args:
            raise InvalidInput(f"{example_inputs} does not say which inputs its arrays are; name them as the file does")
        arrays = {name: tensor.numpy() for name, tensor in given.kwargs.items()}
    with spinner(f"inspect {path.name}"):
        found = inspect_file(path, arrays, batch)
    return Answer(found.to_text, found.as_json)


def _program(
    model: str,
    checkpoint: Path | None,
    example_inputs: str | None,
    dynamic: str,
    outputs: list[str] | None,
    seed: int,
) -> Answer:
    from lobo_fx.axes import Inference
    from lobo_fx.axes.survey import axis_table, lock_table, survey
    from lobo_fx.cli.given import read_model, read_tracing
    from lobo_fx.contracts.verification import check_runs
    from lobo_fx.graph.notes import brief, gathered
    from lobo_fx.measures.counts import measure, run_counted
    from lobo_fx.report.cells import count_text
    from lobo_fx.terminal.progress import spinner
    from lobo_fx.terminal.tables import new_table, printable, render

    tracing = read_tracing(example_inputs, dynamic)
    with spinner("trace"):
        program = read_model(model, checkpoint, seed, tracing, outputs)
    check_runs(program)
    measures = measure(program, run_counted(program)[1])
    inference = Inference(program).run()
    found = survey(inference)
    operators = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    signature = program.signature
    facts: dict[str, Any] = {
        "model": model,
        "inputs": [str(spec) for spec in signature.inputs],
        "outputs": [str(spec) for spec in signature.outputs],
        "free": [f"{dimension.name}: {dimension}" for dimension in signature.free],
        "parameters": measures.parameters,
        "macs": measures.macs,
        "bytes": measures.bytes,
        "operators": dict(operators.most_common()),
        "axes": found.as_json(),
        "notes": program.notes,
    }

    def text(verbose: bool) -> str:
        macs = "not measured" if measures.macs is None else f"{count_text(measures.macs)} a row"
        lines = [f"{model}: {measures.parameters:,} parameters, MACs: {macs}"]
        lines += [f"{label}: {line}" for label in ("input", "output") for line in facts[f"{label}s"]]
        lines += [f"note: {note}" for note in (gathered if verbose else brief)(program.notes)]
        lines.append(f"{found.free_share:.1%} of the parameters can be pruned along {len(found.axes)} free axes")
        tables = [axis_table(found), *([lock_table(found)] if found.locks or found.half_locks else [])]
        shown = new_table("operators", ["operator", "count"])
        for name, count in operators.most_common():
            shown.add_row(name, str(count))
        return "".join(f"{printable(line)}\n" for line in lines) + "".join(map(render, [*tables, shown]))

    return Answer(text, lambda: facts)
