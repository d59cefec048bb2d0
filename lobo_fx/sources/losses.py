"""Losses for the command line."""

from __future__ import annotations

import inspect

from torch.nn import functional

from lobo_fx.contracts.context import LossFunction
from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.sources.user_code import function_from_file

__all__ = ["loss_names", "read_loss"]


def read_loss(spec: str) -> LossFunction:
    """A loss of outputs and labels: `file.py:function`, or the name of one of `torch.nn.functional`.

    Raises:
        InvalidInput: no such file, function or name; similar ones are suggested.
    """
    if ":" in spec or spec.endswith(".py"):
        return function_from_file(spec)
    known = loss_names()
    if spec not in known:
        raise InvalidInput(
            f"'{spec}' is no loss of torch.nn.functional and no file.py:function; {suggestion(spec, known)}"
        )
    found: LossFunction = getattr(functional, spec)
    return found


def loss_names() -> list[str]:
    """The functions of `torch.nn.functional` that reduce a first argument and a `target` to a number."""

    def is_loss(function: object) -> bool:
        if not inspect.isfunction(function):
            return False
        settings = inspect.signature(function).parameters
        required = [name for name, entry in settings.items() if entry.default is entry.empty]
        return len(required) == 2 and required[1] == "target" and "reduction" in settings

    return sorted(name for name, value in vars(functional).items() if not name.startswith("_") and is_loss(value))
