"""The command line: `lobo-fx compile | benchmark | inspect | costs | passes`."""

from __future__ import annotations

import dataclasses
import functools
import inspect as python_inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lobo_fx.errors import InvalidInput, LoboError

app = typer.Typer(
    name="lobo-fx",
    help="Makes trained PyTorch models smaller and faster on CPU, and proves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Command = TypeVar("Command", bound=Callable[..., None])

MODEL_HELP = "torchvision:NAME, timm:NAME, transformers:NAME, path/to/file.py:function, or file.pt2"
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(exists=True, help="Weights to load: .safetensors, .pt with tensors only, or a folder of shards."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of random weights, data and choices.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the runtime.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of the input.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each file runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _command(function: Command) -> Command:
    """Turns our errors into one message and exit status 2; anything else is a bug and shows its trace."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except LoboError as error:
            from rich.console import Console

            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    app.command()(guarded)
    return function


@_command
def compile(
    model: ModelArgument,
    recipe: Annotated[str | None, typer.Option(help="A built-in recipe or a YAML file.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="NAME or NAME:setting=value,…; may be repeated.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for files and report.")] = Path("out"),
    checkpoint: Checkpoint = None,
    calibration_data: Annotated[
        str | None, typer.Option(help=".npy, .npz, .safetensors, or file.py:function. Default: random data.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Random calibration batches, where no data is given.")] = 4,
    static: Annotated[bool, typer.Option("--static", help="Fix all sizes, the batch included.")] = False,
    threads: Threads = 1,
    batch: Batch = 1,
    rounds: Rounds = 30,
    seed: Seed = 0,
) -> None:
    """Compile a model, export it and the original, and measure both in turn."""
    import lobo_fx
    from lobo_fx.artifact import make_folder
    from lobo_fx.data import read_batches
    from lobo_fx.models import build, weights_are_random
    from lobo_fx.recipe import read_pass, resolve
    from lobo_fx.storage import check_target

    if (recipe is None) == (not passes):
        raise InvalidInput("give --recipe, or one or more --pass; `lobo-fx passes` lists both")
    chosen = resolve(recipe) if recipe else [read_pass(text) for text in passes or []]
    check_target(output / "program")
    data = None if calibration_data is None else read_batches(calibration_data, batch)
    built, inputs = build(model, checkpoint, seed)
    notes = []
    if weights_are_random(model, checkpoint):
        notes.append(f"the weights are random (seed {seed}): sizes and latencies are real, accuracies are not")
    if data is None and any("calibration_data" in author.needs for author in chosen):
        notes.append("calibrated on random data: give --calibration-data for ranges that fit yours")
        data = _random_data(built, inputs, batches, seed)
    result = lobo_fx.compile(
        built,
        chosen,
        example_inputs=inputs,
        dynamic_shapes=None if static else "batch",
        calibration_data=data,
        seed=seed,
    )
    result.report.model = model
    result.report.notes[:0] = notes
    make_folder(output)
    result.export_original(output / "original.onnx")
    result.export(output / "model.onnx")
    for artifact in result.report.artifacts.values():
        artifact.gzip_bytes  # noqa: B018  measured here, shown in the report
    result.benchmark(threads=threads, batch=batch, rounds=rounds)
    result.save(output / "program")
    result.report.save(output)
    typer.echo(str(result))
    typer.echo(f"written to {output}: model.onnx, original.onnx, program/, report.md, report.csv, report.json")


@_command
def benchmark(
    files: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Files to measure; the first is the reference.")
    ],
    runtime: Annotated[str, typer.Option(help="What runs them.")] = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    rounds: Rounds = 30,
    as_json: AsJson = False,
) -> None:
    """Measure files in turn, in one run: latency, throughput, peak memory."""
    from lobo_fx.registry import RUNTIMES
    from lobo_fx.runtime import benchmark as measure

    labels = [file.name for file in files]
    if len(set(labels)) < len(labels):
        labels = [str(file) for file in files]
    if len(set(labels)) < len(labels):
        raise InvalidInput("a file is given twice")
    found = measure(
        dict(zip(labels, files, strict=True)), RUNTIMES.get(runtime)(), threads=threads, batch=batch, rounds=rounds
    )
    typer.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else str(found))


@_command
def inspect(model: ModelArgument, checkpoint: Checkpoint = None, seed: Seed = 0, as_json: AsJson = False) -> None:
    """Show what the compiler sees in a model: inputs, outputs, operators, what can be pruned and what can't."""
    from lobo_fx.axes import Inference
    from lobo_fx.axes.survey import axis_table, lock_table, survey
    from lobo_fx.measures import measure, run_counted
    from lobo_fx.models import build
    from lobo_fx.tables import new_table, render
    from lobo_fx.tracing import trace

    built, inputs = build(model, checkpoint, seed)
    program = trace(built, inputs)
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
            typer.echo(f"{label.removesuffix('s')}: {line}")
    found = survey(inference)
    typer.echo(f"{found.free_share:.1%} of the parameters can be pruned along {len(found.axes)} free axes")
    typer.echo(render(axis_table(found)))
    if found.locks:
        typer.echo(render(lock_table(found)))
    shown = new_table("operators", ["operator", "count"])
    for name, count in operators.most_common():
        shown.add_row(name, str(count))
    typer.echo(render(shown))


@_command
def costs(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the table to this file.")] = None,
    checkpoint: Checkpoint = None,
    seed: Seed = 0,
) -> None:
    """Measure what a model's operators cost on this CPU, as float and as integer kernels."""
    from lobo_fx.artifact import check_writable
    from lobo_fx.context import Context
    from lobo_fx.models import build
    from lobo_fx.registry import PASSES
    from lobo_fx.tracing import trace

    if output is not None:
        check_writable(output)
    built, inputs = build(model, checkpoint, seed)
    program = trace(built, inputs)
    context = Context(program.signature)
    program = PASSES.get("fold_batch_norm")().run(program.clone(), context)
    author = PASSES.get("quantize_static")()
    table = author.cost_table(program, author.quantizer_of_all(program), context)
    if output is not None:
        table.save(output)
    typer.echo(str(table))


@_command
def passes(as_json: AsJson = False) -> None:
    """List the passes with their settings, and the built-in recipes."""
    from lobo_fx.recipe import builtin_recipes
    from lobo_fx.registry import PASSES
    from lobo_fx.tables import new_table, render

    known = []
    for name, aliases in PASSES.names().items():
        kind = PASSES.get(name)
        fields = dataclasses.fields(kind)
        known.append(
            {
                "name": name,
                "aliases": aliases,
                "settings": {field.name: getattr(kind(), field.name) for field in fields},
                "needs": list(kind().needs),
                "promise": kind.promise.value,
                "summary": (python_inspect.getdoc(kind) or "").split("\n")[0],
            }
        )
    if as_json:
        typer.echo(json.dumps({"passes": known, "recipes": builtin_recipes()}, indent=2, default=str))
        return
    shown = new_table("passes", ["name", "also", "settings", "needs", "promise", "what it does"])
    for entry in known:
        settings = ", ".join(f"{key}={value!r}" for key, value in entry["settings"].items())
        cells = [entry["name"], ", ".join(entry["aliases"]), settings, ", ".join(entry["needs"])]
        shown.add_row(*cells, entry["promise"], entry["summary"])
    typer.echo(render(shown))
    typer.echo(f"recipes: {', '.join(builtin_recipes())}")


def _random_data(built: Any, inputs: Any, batches: int, seed: int) -> Any:
    from lobo_fx.data import random_batches
    from lobo_fx.inputs import as_inputs, find_inputs
    from lobo_fx.tracing import trace

    if isinstance(built, Path):
        return random_batches(trace(built).example_inputs, batches, seed)
    return random_batches(find_inputs(built) if inputs is None else as_inputs(inputs), batches, seed)


def main() -> None:
    """Entry point of the `lobo-fx` command."""
    app()


if __name__ == "__main__":
    main()
