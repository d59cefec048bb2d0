"""The application that commands are added to, and the arguments that several share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lobo_fx.errors import LoboError

__all__ = [
    "MODEL_HELP",
    "AsJson",
    "Batch",
    "Batches",
    "CalibrationData",
    "Checkpoint",
    "Command",
    "Evaluate",
    "HigherIsBetter",
    "Loss",
    "ModelArgument",
    "Outputs",
    "Rounds",
    "Seed",
    "Static",
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

Widened = Annotated[bool, typer.Option("--float32", help="Widen (or round) all weights to float32.")]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--outputs", help="An output to keep, as files name it; may be repeated. Default: all, or the head's."
    ),
]
CalibrationData = Annotated[
    str | None, typer.Option(help=".npy, .npz, .safetensors, or file.py:function. Default: random data.")
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
Static = Annotated[bool, typer.Option("--static", help="Fix all sizes, the batch included.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of random weights, data and choices.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the runtime.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of the input.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each file runs.")]
Storage = Annotated[str | None, typer.Option(help="packed: pruned weights as a bit mask and what is not zero.")]
Values = Annotated[str | None, typer.Option(help="float16 or bfloat16: what packed weights are rounded to.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def command(function: Command) -> Command:
    """Turns our errors into one message and exit status 2; anything else is a bug and shows its trace."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except LoboError as error:
            from rich.console import Console

            from lobo_fx.terminal.tables import printable

            said = f"error: {printable(str(error))}"
            Console(stderr=True).print(said, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    app.command()(guarded)
    return function
