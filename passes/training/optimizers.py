"""Optimizers and schedules, by name or as the user makes them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lobo_fx.contracts.context import users_code
from lobo_fx.errors import InvalidInput, suggestion

__all__ = ["SCHEDULES", "MakeOptimizer", "MakeSchedule", "make_optimizer", "make_schedule", "optimizer_class"]

MakeOptimizer = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer of groups of parameters and `lr=`: a class of `torch.optim`, or a `functools.partial` of one."""
MakeSchedule = Callable[[torch.optim.Optimizer], LRScheduler]
"""Makes a schedule for an optimizer, stepped after it: a `functools.partial` of a `torch.optim.lr_scheduler`."""

# The factor of the learning rate after a share of the steps, without warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}
_SETTINGS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9, "nesterov": True}}
"""Settings of optimizers that are given by name, beside the learning rate."""


_OTHERWISE = {
    "lbfgs": "calls the loss itself, several times a step",
    "sparseadam": "needs sparse gradients",
}
"""Optimizers that can't just take a step after a backward pass, and why."""


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of `torch.optim`, by its name in any case.

    Raises:
        InvalidInput: there is none; near names are suggested.
    """
    if name.lower() in _OTHERWISE:
        raise InvalidInput(f"optimizer is {name!r}, which {_OTHERWISE[name.lower()]}")
    found = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and key != "Optimizer"
    }
    if name.lower() not in found:
        raise InvalidInput(f"optimizer is {name!r}; {suggestion(name, found)}")
    return found[name.lower()]


def make_optimizer(
    kind: str | MakeOptimizer, parameters: Iterable[nn.Parameter], rate: float, decay: float
) -> torch.optim.Optimizer:
    """An optimizer over parameters; weights decay, biases and norms (one dimension) don't.

    A `functools.partial` that gives `weight_decay` says how much itself.

    Raises:
        InvalidInput: what was passed makes no optimizer.
    """
    parameters = list(parameters)
    if isinstance(kind, functools.partial):
        decay = kind.keywords.get("weight_decay", decay)
    groups = [
        {"params": chosen, "weight_decay": share}
        for chosen, share in (
            ([p for p in parameters if p.dim() > 1], decay),
            ([p for p in parameters if p.dim() <= 1], 0.0),
        )
        if chosen
    ]
    try:
        if isinstance(kind, str):
            found = optimizer_class(kind)
            return found(groups, lr=rate, **_SETTINGS.get(found.__name__, {}))  # type: ignore[call-arg]
        made = kind(groups, lr=rate)
    except (TypeError, ValueError) as error:  # a ValueError where it can't take such parameters
        raise InvalidInput(f"optimizer: {error}; expected a function of groups of parameters and lr=") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise InvalidInput(f"optimizer made a {type(made).__name__}; expected a torch.optim.Optimizer")
    return made


def make_schedule(kind: str | MakeSchedule, optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> LRScheduler:
    """A schedule; by name, the rate rises linearly over the share `warmup` of the steps first.

    Raises:
        InvalidInput: what was passed makes no schedule.
    """
    if not isinstance(kind, str):
        with users_code("schedule"):
            made = kind(optimizer)
        if not isinstance(made, LRScheduler):
            raise InvalidInput(f"schedule made a {type(made).__name__}; expected a torch.optim.lr_scheduler")
        if isinstance(made, ReduceLROnPlateau):
            raise InvalidInput(
                "schedule made a ReduceLROnPlateau, which is stepped by a score, but schedules are stepped after every "
                "step of the optimizer: give one that needs no score, or patience= to stop where no score is better"
            )
        return made
    rising = max(1, round(warmup * steps)) if warmup else 0

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return SCHEDULES[kind](min(1.0, (step - rising) / max(1, steps - rising)))

    return LambdaLR(optimizer, factor)
