"""How example inputs bind to a model's `forward`, and which of their dimensions stay free."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import HOW_TO_PASS, Inputs, dynamic_shapes_of

__all__ = ["check_arity", "free_batch", "gathered_named", "in_order"]


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


def in_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """Keyword inputs in the order of the model's forward."""
    known = list(inspect.signature(model.forward).parameters)
    place = {name: index for index, name in enumerate(known)}
    names = sorted(inputs.kwargs, key=lambda name: place.get(name, len(known)))
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in names})


@contextlib.contextmanager
def gathered_named(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Has a model with `forward(**kwargs)` state the names it is given, for a while.

    `torch.export` frees no dimension of an input that the signature of `forward` does not name.
    """
    forward, before = model.forward, vars(model).get("forward")
    signature = inspect.signature(forward)
    stated = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(stated) == len(signature.parameters):
        yield
        return

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    gathered = [name for name in inputs.kwargs if name not in signature.parameters]
    stated += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in gathered]
    named.__signature__ = signature.replace(parameters=stated)  # type: ignore[attr-defined]
    model.forward = named
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def free_batch(inputs: Inputs, forward: Callable[..., Any]) -> tuple[Inputs, Any]:
    """Inputs with at least two rows, and a specification for `torch.export` that leaves the batch free.

    `torch.export` treats a size of 1 as a constant, so a single row is repeated. Only tensors whose
    first dimension equals that of the first tensor carry the batch; the others stay as they are.

    Args:
        inputs: as the model takes them.
        forward: the model's.
    """
    rows = next((tensor.shape[0] for tensor in inputs.tensors if tensor.dim()), 0)

    def carries_batch(leaf: object) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows

    if rows == 1:
        inputs = inputs.map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if carries_batch(t) else t)
        rows = 2
    batch = Dim("batch")
    return inputs, dynamic_shapes_of(inputs, forward, lambda leaf: {0: batch} if carries_batch(leaf) else None)
