"""Refuses models that can't be traced with any inputs, with the reason, before any work."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import AdditionalInputs, Dim, ShapesCollection
from torch.nn.parameter import is_lazy

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.inputs import FREED, DynamicShapes, Inputs, dynamic_shapes_of

__all__ = ["check_dynamic_shapes", "check_traceable"]

_SIZE = (Dim, type(Dim.AUTO), int, type(None))
_SIZES = "a Dim, Dim.AUTO, Dim.DYNAMIC, Dim.STATIC, the example's size or None"


def check_traceable(model: nn.Module, inputs: Inputs) -> None:
    """Refuses models that `torch.export` can't capture, and says what to pass instead.

    Raises:
        InvalidInput: a module is scripted or quantized, a weight is no plain tensor, or a name is a Python keyword.
    """
    for name, module in model.named_modules():
        kind = type(module)
        where = f"module '{name}'" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise InvalidInput(f"{where} is scripted (torch.jit), and no graph leads through it; pass the original")
        if kind.__module__.startswith("torch.ao.nn") and ".quantized" in kind.__module__:
            raise InvalidInput(f"{where} is quantized already ({kind.__qualname__}); pass the model in float")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InvalidInput(f"'{name}' has no shape yet (a lazy module); call the model once, then compile it")
        kind = type(tensor.data)
        if tensor.is_meta:
            raise InvalidInput(f"{type(model).__name__} is on the meta device and holds no weights; load them first")
        if kind is not torch.Tensor:
            raise InvalidInput(f"'{name}' is a {kind.__qualname__}, no plain tensor; pass the model in float")
        if tensor.is_inference():
            raise InvalidInput(f"'{name}' was made under torch.inference_mode(); make or load the model outside of it")
    names = {*inputs.kwargs, *(name for name, _ in (*model.named_modules(), *model.named_parameters()))}
    for name in sorted(names):
        if any(keyword.iskeyword(part) for part in name.split(".")):
            raise InvalidInput(f"'{name}' holds a word that Python keeps for itself, which no graph can; rename it")


def check_dynamic_shapes(model: nn.Module, inputs: Inputs, given: DynamicShapes) -> None:
    """Refuses dynamic shapes that don't fit the model's inputs, before any work.

    Raises:
        InvalidInput: an unknown word, or a specification that doesn't fit the inputs.
    """
    words = ", ".join(map(repr, FREED))
    if isinstance(given, str) and given not in FREED:
        raise InvalidInput(f"dynamic_shapes is {given!r}; it must be {words}, None, or as torch.export takes it")
    if given is None or isinstance(given, (str, ShapesCollection, AdditionalInputs)):
        return
    if not isinstance(given, (Mapping, list, tuple)):
        raise InvalidInput(
            f"dynamic_shapes is a {type(given).__name__}; it must be {words}, None, or a dict of what is free of each "
            "input: {'x': {0: Dim('batch')}}"
        )
    if given:
        bound = dynamic_shapes_of(inputs, model.forward, lambda leaf: leaf)
        _check_entries("dynamic_shapes", given, bound if isinstance(given, Mapping) else list(bound.values()))


def _check_entries(place: str, given: Any, inputs: Any) -> None:
    """Refuses a specification, or a part of one, that doesn't fit the inputs it describes."""
    if isinstance(inputs, torch.Tensor):
        _check_sizes(place, given, inputs)
    elif given is not None and isinstance(inputs, Mapping):
        if not isinstance(given, Mapping):
            raise InvalidInput(f"{place} is {given!r}; it must be a dict by the names {list(inputs)}")
        for name in given:
            if name not in inputs:
                known = suggestion(str(name), map(str, inputs))
                raise InvalidInput(f"{place} speaks of {name!r}, which is no input; {known}")
        if missing := [name for name in inputs if name not in given]:
            raise InvalidInput(f"{place} says nothing of {missing}; give None for what is fixed")
        for name, entry in given.items():
            _check_entries(f"{place}[{name!r}]", entry, inputs[name])
    elif given is not None and isinstance(inputs, (list, tuple)):
        if not isinstance(given, (list, tuple)) or len(given) != len(inputs):
            raise InvalidInput(
                f"{place} is {given!r}; it must be a list with an entry for each of {len(inputs)} inputs"
            )
        for at, (entry, value) in enumerate(zip(given, inputs, strict=True)):
            _check_entries(f"{place}[{at}]", entry, value)


def _check_sizes(place: str, given: Any, tensor: torch.Tensor) -> None:
    """Refuses a specification of sizes that doesn't fit a tensor."""
    shape = list(tensor.shape)
    if given is None:
        return
    if not isinstance(given, (Mapping, list, tuple)):
        raise InvalidInput(f"{place} is {given!r}; it must be a dict from dimensions to sizes: {{0: Dim('batch')}}")
    if not isinstance(given, Mapping) and len(given) != len(shape):
        raise InvalidInput(f"{place} has {len(given)} entries; the input has {len(shape)} dimensions: {shape}")
    for dim, size in given.items() if isinstance(given, Mapping) else enumerate(given):
        if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < len(shape):
            raise InvalidInput(f"{place} speaks of dimension {dim!r}; the input has 0 to {len(shape) - 1}: {shape}")
        if isinstance(size, bool) or not isinstance(size, _SIZE):
            raise InvalidInput(f"{place}[{dim}] is {size!r}; it must be {_SIZES}")
        if isinstance(size, int) and size != shape[dim]:
            raise InvalidInput(f"{place}[{dim}] fixes a size of {size}; the example's is {shape[dim]}")
        low, high = getattr(size, "min", None), getattr(size, "max", None)
        if not (low or 0) <= shape[dim] <= (shape[dim] if high is None else high):
            raise InvalidInput(f"{place}[{dim}] is {size}; the example's size of {shape[dim]} is not within")
