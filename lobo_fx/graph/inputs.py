"""Example inputs: what a user may pass, how they bind to `forward`, and which sizes stay free."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lobo_fx.errors import InvalidInput

__all__ = ["FREED", "HOW_TO_PASS", "DynamicShapes", "Inputs", "as_inputs", "check_tensors", "dynamic_shapes_of"]

DynamicShapes = Any
"""A word of `FREED`, None, or a specification as `torch.export.export(dynamic_shapes=...)` takes it."""

FREED = ("auto", "batch", "all")
"""Which sizes stay free where the model allows: batch and sequence lengths; only the batch; all sizes."""

HOW_TO_PASS = (
    "Pass example_inputs= a tensor, a tuple of positional inputs, or a dict of keyword inputs, "
    "as the model's forward takes them."
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of one call: positional `args` and keyword `kwargs`, tensors at the leaves."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def leaves(self) -> list[Any]:
        """Tensors and constants in the order in which the traced graph takes them."""
        return list(pytree.tree_leaves((self.args, dict(self.kwargs))))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def map(self, function: Any) -> Inputs:
        """Applies `function` to every tensor."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, function, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def to(self, device: torch.device | str) -> Inputs:
        return self.map(lambda tensor: tensor.to(device))


def as_inputs(value: object) -> Inputs:
    """Reads a tensor, a tuple or list, or a dict of keyword inputs.

    Raises:
        InvalidInput: `value` is anything else, holds no tensor, or a tensor that `check_tensors` refuses.
    """
    if isinstance(value, Inputs):
        inputs = value
    elif isinstance(value, torch.Tensor):
        inputs = Inputs((value,))
    elif isinstance(value, Mapping):
        inputs = Inputs((), dict(value))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        inputs = Inputs(tuple(value))
    else:
        raise InvalidInput(f"example_inputs is a {type(value).__name__}. {HOW_TO_PASS}")
    if not inputs.tensors:
        raise InvalidInput(f"example_inputs holds no tensor. {HOW_TO_PASS}")
    check_tensors(inputs, "example_inputs")
    return inputs


def check_tensors(inputs: Inputs, source: str) -> None:
    """Refuses tensors that hold no values to compute with, or are not dense arrays.

    Raises:
        InvalidInput: a tensor is on the meta device, sparse or nested, or has no rows.
    """
    for tensor in inputs.tensors:
        if tensor.is_meta:
            raise InvalidInput(f"{source} holds a tensor on the meta device, which has no values")
        if tensor.layout != torch.strided:
            kind = str(tensor.layout).removeprefix("torch.")
            raise InvalidInput(f"{source} holds a tensor of layout {kind}; make it dense with .to_dense()")
        if tensor.dim() and not tensor.shape[0]:
            raise InvalidInput(
                f"{source} holds a tensor of shape {list(tensor.shape)}: without rows nothing can be verified"
            )


def dynamic_shapes_of(inputs: Inputs, forward: Callable[..., Any], describe: Callable[[Any], Any]) -> dict[str, Any]:
    """A `torch.export` specification with the result of `describe` for each leaf, nested as `forward` binds the inputs.

    Inputs gathered by `*args` are a tuple under that name; those gathered by `**kwargs` keep their own names.
    """
    args, kwargs = pytree.tree_map(describe, (inputs.args, dict(inputs.kwargs)))
    signature = inspect.signature(forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    gathered = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    named: dict[str, Any] = bound.pop(gathered, {})
    return bound | named
