"""What training lowers: a module whose forward is the loss of a batch."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.operators import set_argument, training_flag
from lobo_fx.graph.provenance import module_name

__all__ = ["Objective", "frozen_parts", "trainable"]


class Objective(nn.Module):
    """The loss of a batch by the user's `loss_fn`, or by the model itself. All of its parameters are trained.

    Args:
        module: the module to train.
        context: gives the loss.
    """

    def __init__(self, module: nn.Module, context: Context) -> None:
        super().__init__()
        self.module, self.context = module, context
        super().train(module.training)

    def forward(self, inputs: Inputs, labels: Any) -> torch.Tensor:
        """The loss of a batch, a scalar."""
        return self.context.loss(self.module(*inputs.args, **inputs.kwargs), labels)

    @property
    def running(self) -> nn.Module:
        """The module that is called in training; its parameters are those of `module`."""
        return self.module

    def begin_step(self, share: float) -> None:
        """Called before every step with the share of the training that is done."""

    def to_device(self, device: torch.device) -> None:
        """Moves every module that takes part to a device, also those that are not trained."""
        self.to(device)


def trainable(objective: Objective) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name.

    Raises:
        InvalidInput: there are none.
    """
    found = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    if not found:
        raise InvalidInput("nothing is left to train: every parameter is frozen, or stored as integers")
    return found


@contextlib.contextmanager
def frozen_parts(module: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """Freezes modules that match a pattern: their parameters, and the statistics of their batch norms.

    Args:
        module: a module in training mode.
        patterns: patterns of names of modules or parameters.
    """
    named = module.named_parameters(remove_duplicate=False)  # any name of a tied one freezes it
    frozen = {p for name, p in named if _matches(name, patterns) and p.requires_grad}
    for parameter in frozen:
        parameter.requires_grad_(False)
    if isinstance(module, fx.GraphModule):
        stopped = [(node, flag) for node in module.graph.nodes if (flag := training_flag(node)) is not None]
        for node, flag in stopped:
            if _matches(f"{module_name(node)}.", patterns):
                set_argument(node, flag, False)
        if stopped and patterns:
            module.recompile()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a name, or that of a module above it."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatch.filter(above, pattern) for pattern in patterns)
