"""What a training step of a compiled module costs beside one of the module that it was made of.

    python benchmarks/training_step.py [--rounds 20]

Forward, loss, backward and a step of AdamW, in turn, in one run, at equal width (nothing is removed).
Bar: at most 1.15 times the eager module's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import lobo_fx
from lobo_fx import sources
from lobo_fx.measures.machine import machine
from lobo_fx.terminal.tables import new_table, render

BAR = 1.15


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Networks with random weights, and a batch for each."""
    sources.declare_torchvision_operators()
    import timm
    import torchvision

    torch.manual_seed(0)
    return {
        "ResNet-18": (torchvision.models.resnet18(), torch.randn(8, 3, 96, 96)),
        "EfficientNet-B0": (torchvision.models.efficientnet_b0(), torch.randn(8, 3, 96, 96)),
        "ViT-tiny": (timm.create_model("vit_tiny_patch16_224"), torch.randn(4, 3, 224, 224)),
    }


def step_of(module: nn.Module, inputs: torch.Tensor) -> Callable[[], None]:
    """One step of training on a batch."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters())
    labels = torch.zeros(len(inputs), dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs), labels)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    """CPU time of one call, which other work on the machine hardly moves."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    """Prints a row for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = new_table(
        f"A training step, compiled beside eager, {machine()}", ["network", "eager ms", "compiled ms", "ratio"]
    )
    for name, (module, inputs) in networks().items():
        compiled = lobo_fx.compile(module, [], example_inputs=inputs[:2], progress=False).module
        steps = [step_of(copy.deepcopy(module), inputs), step_of(copy.deepcopy(compiled), inputs)]
        for step in steps:
            step()
        times = [[seconds(step) for step in steps] for _ in range(options.rounds)]
        eager, traced = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        table.add_row(name, f"{eager:.1f}", f"{traced:.1f}", f"{ratio:.2f}")
    print(render(table))


if __name__ == "__main__":
    main()
