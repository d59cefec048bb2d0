"""How example inputs bind to a model's `forward`, and which of their dimensions stay free."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import HOW_TO_PASS, Inputs, dynamic_shapes_of

__all__ = ["check_arity", "free_batch", "in_order", "positional_names"]


def check_arity(model: nn.Module, inputs: Inputs) -> None:
    """Refuses inputs that the model's forward can't bind, before tracing.

    Raises:
        InvalidInput: too many, too few or unknown inputs.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise InvalidInput(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}. {HOW_TO_PASS}"
        ) from None


def positional_names(model: nn.Module, count: int) -> list[str]:
    """Names of the first `count` parameters of the model's forward; `*rest` for those that it gathers."""
    parameters = list(inspect.signature(model.forward).parameters.values())[:count]
    names = [parameter.name for parameter in parameters]
    gathered = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    return [*names[: names.index(gathered[0])], f"*{gathered[0]}"] if gathered else names


def in_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """Keyword inputs in the order of the model's forward."""
    known = list(inspect.signature(model.forward).parameters)
    place = {name: index for index, name in enumerate(known)}
    names = sorted(inputs.kwargs, key=lambda name: place.get(name, len(known)))
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in names})


def free_batch(inputs: Inputs, names: Sequence[str]) -> tuple[Inputs, Any]:
    """Inputs with at least two rows, and a specification for `torch.export` that leaves the batch free.

    `torch.export` treats a size of 1 as a constant, so a single row is repeated. Only tensors whose
    first dimension equals that of the first tensor carry the batch; the others stay as they are.

    Args:
        inputs: as the model takes them.
        names: of the positional inputs, as the model's forward has them.
    """
    rows = next((tensor.shape[0] for tensor in inputs.tensors if tensor.dim()), 0)

    def carries_batch(leaf: object) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows

    if rows == 1:
        inputs = inputs.map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if carries_batch(t) else t)
        rows = 2
    batch = Dim("batch")
    return inputs, dynamic_shapes_of(inputs, names, lambda leaf: {0: batch} if carries_batch(leaf) else None)
