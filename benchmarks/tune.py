"""What tuning keeps of what ONNX Runtime offers, and what it brings.

    python benchmarks/tune.py [--models small_bert timm:vit_tiny_patch16_224 torchvision:resnet50]

Weights are random (seed 0). Of each choice: its time over that of the file without it, both loaded afresh in up to
three rounds, in processes of their own, called in turn on one core and one thread; times are the CPU's. Then the tuned
file over the untuned one in the same way, and by the medians of the clock, which other work on the machine sways.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lobo_fx
from lobo_fx.measures.machine import machine, versions
from lobo_fx.sources.models import build
from lobo_fx.sources.torchvision_operators import declare_torchvision_operators
from lobo_fx.terminal.tables import new_table, render

MODELS = ["small_bert", "timm:vit_tiny_patch16_224", "torchvision:resnet50"]


def small_bert() -> tuple[Any, Any]:
    """BERT of four layers of 256, on 64 tokens."""
    declare_torchvision_operators()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    tokens = torch.randint(0, config.vocab_size, (2, 64))
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model.eval(), (tokens, torch.ones_like(tokens))


def tuned(name: str, folder: Path) -> tuple[dict[str, Any], float]:
    """What tuning says of a model, and the tuned file's latency over the untuned one's, by the clock."""
    model, inputs = small_bert() if name == "small_bert" else build(name)
    result = lobo_fx.compile(model, [], example_inputs=inputs)
    result.export_original(folder / "untuned.onnx")  # no pass ran: it is the same model
    artifact = result.export(folder / "tuned.onnx", tune=True)
    return dict(artifact.details["tuning"]), result.benchmark(memory=False).ratio("compiled", "p50")


def main(models: list[str]) -> None:
    """Prints a table a model."""
    print(machine(), ", ".join(f"{package} {version}" for package, version in versions().items()))
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            found, clock = tuned(name, Path(folder))
        table = new_table(name, ["choice", "time", "kept"])
        for trial in found["tried"]:
            ratio = "not measured" if trial["ratio"] is None else f"{trial['ratio']:.3f}"
            table.add_row(trial["name"], ratio, "yes" if trial["kept"] else trial["reason"] or "no")
        print(render(table), end="")
        whole = (
            "none was faster" if found["ratio"] is None else f"together {found['ratio']:.3f} of the untuned CPU time"
        )
        print(f"{whole}; the file as written, by the clock: {clock:.3f}; ", end="")
        print(f"copies of one file differed by {found['noise']:.1%} at most\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    main(**vars(parser.parse_args()))
