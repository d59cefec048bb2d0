"""Models that can't be traced whatever the inputs are: named for what they are, before any work."""

from __future__ import annotations

import keyword

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs

__all__ = ["check_traceable"]


def check_traceable(model: nn.Module, inputs: Inputs) -> None:
    """Refuses what `torch.export` can't capture, and says what to pass instead.

    Raises:
        InvalidInput: a module is scripted or quantized, a weight holds no plain numbers, a name is a word of Python's.
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
