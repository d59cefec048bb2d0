"""Whether a trace is worth keeping in a file: processor time of tracing a model, beside that of reading it back.

    python benchmarks/kept_traces.py [torchvision:resnet18 timm:vit_tiny_patch16_224 ...]

A `workdir` keeps what passes leave and measure; it would keep traces too if reading one took far less than making it.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import lobo_fx
from lobo_fx.files import temporary_folder
from lobo_fx.sources.models import build
from lobo_fx.terminal.tables import new_table, to_markdown

MODELS = ("torchvision:efficientnet_b0", "timm:vit_tiny_patch16_224", "transformers:whisper-tiny")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time, and what it returns."""
    begun = time.process_time()
    found = run()
    return time.process_time() - begun, found


def main() -> None:
    """Prints a row for each model."""
    torch.set_num_threads(1)
    table = new_table("", ["model", "traced (s)", "read (s)"])
    for name in sys.argv[1:] or MODELS:
        model, inputs = build(name)
        lobo_fx.trace(model, inputs)  # what is imported only then
        traced, program = timed(functools.partial(lobo_fx.trace, model, inputs))
        with temporary_folder() as folder:
            lobo_fx.compile(program, [], progress=False).save(folder / "saved")
            lobo_fx.load(folder / "saved")
            read, _ = timed(functools.partial(lobo_fx.load, folder / "saved"))
        table.add_row(name, f"{traced:.1f}", f"{read:.1f}")
    print(to_markdown(table))


if __name__ == "__main__":
    main()
