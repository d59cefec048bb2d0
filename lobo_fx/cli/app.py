"""The application that commands are added to, the options of every command, and arguments that several share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from lobo_fx.cli.completion import complete_model, complete_plugin
from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.version import __version__

__all__ = [
    "MODEL_HELP",
    "Answer",
    "Batch",
    "Batches",
    "CalibrationData",
    "Checkpoint",
    "Command",
    "Dynamic",
    "Evaluate",
    "ExampleInputs",
    "HigherIsBetter",
    "Loss",
    "ModelArgument",
    "Outputs",
    "Rounds",
    "RuntimeName",
    "Seed",
    "Storage",
    "Threads",
    "TrainBatch",
    "TrainData",
    "Values",
    "Widened",
    "Workdir",
    "app",
    "command",
]

app = typer.Typer(
    name="lobo-fx",
    help="Makes trained PyTorch models smaller and faster on CPU, and proves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: nothing to import, and no boxes in logs
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lobo-fx {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Makes trained PyTorch models smaller and faster on CPU, and proves it."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of a command.

    Attributes:
        text: makes the text for users; takes whether all details are asked for.
        data: makes plain data for programs; a function, since gathering it may take a while.
        status: the exit status.
    """

    text: Callable[[bool], str]
    data: Callable[[], Any]
    status: int = 0


Command = TypeVar("Command", bound=Callable[..., Answer])
MODEL_HELP = "torchvision:NAME, timm:NAME, transformers:NAME, path/to/file.py:function, file.pt2 or file.onnx"
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(exists=True, help="Weights to load: .safetensors, .pt with tensors only, or a folder of shards."),
]

Widened = Annotated[bool, typer.Option("--float32", help="Widen (or round) all weights to float32.")]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--outputs", help="An output to keep, as files name it; may be repeated. Default: all, or the head's."
    ),
]
CalibrationData = Annotated[
    str | None,
    typer.Option(
        help=".npy, .npz or .safetensors (arrays by the names of inputs), or file.py:function. Default: random data."
    ),
]
Batches = Annotated[int, typer.Option(min=1, help="Random calibration batches, where no data is given.")]
TrainData = Annotated[
    str | None,
    typer.Option(help=".npz or .safetensors with an array 'labels', or file.py:function that returns batches."),
]
TrainBatch = Annotated[int, typer.Option(min=1, help="Rows of a training batch, where arrays are given.")]
Loss = Annotated[
    str | None, typer.Option(help="file.py:function of outputs and labels, or one of torch.nn.functional.")
]
Evaluate = Annotated[str | None, typer.Option(help="file.py:function from a module to a score.")]
HigherIsBetter = Annotated[
    bool | None,
    typer.Option(
        "--higher-is-better/--lower-is-better", help="Which of two scores is better. Default: the higher one."
    ),
]
Workdir = Annotated[
    Path | None, typer.Option(help="Folder that keeps the program after every pass: an interrupted run goes on there.")
]
ExampleInputs = Annotated[
    str | None,
    typer.Option(
        help="What the model is traced with: .npy, .npz or .safetensors (arrays by the names of inputs), or "
        "file.py:function. Default: the model's own, where it says what it takes."
    ),
]
Dynamic = Annotated[
    str,
    typer.Option(
        metavar="SIZES",
        help="Sizes that stay free: auto (batch and lengths), batch, all, none, or by input and dimension, with names "
        "and bounds: images:0=batch,images:2=height[32..512].",
    ),
]
RuntimeName = Annotated[str, typer.Option(help="What runs files.", autocompletion=complete_plugin("RUNTIMES"))]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of random weights, data and choices.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the runtime.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of the input.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each file runs.")]
Storage = Annotated[str | None, typer.Option(help="packed: pruned weights as a bit mask and what is not zero.")]
Values = Annotated[str | None, typer.Option(help="float16 or bfloat16: what packed weights are rounded to.")]

_SHARED = {
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors, and draw no progress.")],
    "verbose": Annotated[
        bool, typer.Option("--verbose", "-v", help="All details: settings at their defaults, operators, source lines.")
    ],
    "as_json": Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")],
}


def command(function: Command) -> Command:
    """Registers a command with the options of every command: `--quiet`, `--verbose`, `--json`.

    Our errors become one message and exit status 2; any other error is a bug and shows its traceback.
    """
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def run(quiet: bool, verbose: bool, as_json: bool, **given: Any) -> None:
        from lobo_fx.terminal.progress import no_progress

        data = ""
        # what models, data and scores of the user print is no part of the JSON
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            try:
                with no_progress() if quiet else contextlib.nullcontext():
                    answer = function(**given)
            except LoboError as error:
                _fail(error)
            if as_json:
                from lobo_fx.report.json import as_json as plain

                data = _dumped(plain(answer.data()))
        if as_json:
            _say(data)
        elif not quiet:
            _say(answer.text(verbose).rstrip("\n"))
        if answer.status:
            raise typer.Exit(answer.status)

    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(name, kind, default=False, annotation=hint) for name, hint in _SHARED.items()]
    parameters = [*signature.parameters.values(), *shared]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command()(run)
    return function


def _say(text: str) -> None:
    try:
        typer.echo(text)
    except BrokenPipeError:  # a reader has read enough, which click knows
        raise
    except OSError as error:
        sys.stdout = None  # so that Python does not try again at its end
        _fail(InvalidInput(f"can't write to standard output: {error.strerror}"))


def _dumped(data: Any) -> str:
    import json

    return json.dumps(data, indent=2, allow_nan=False)


def _fail(error: LoboError) -> NoReturn:
    from rich.console import Console

    from lobo_fx.terminal.tables import printable

    said = f"error: {printable(str(error))}"
    Console(stderr=True).print(said, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2) from None
