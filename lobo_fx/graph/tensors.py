"""Tensors of a module by their dotted names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["fetch", "lazy_clones", "memory_of", "register", "require", "unusual_weight"]


def register(module: nn.Module, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
    """Registers a parameter or buffer under its dotted name, creating plain modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
        return
    if leaf in module.__dict__:
        delattr(module, leaf)
    module.register_buffer(leaf, tensor, persistent=persistent)


def require(holds: bool | torch.SymBool, message: str) -> None:
    """Checks a condition on sizes, which may be symbolic; the message says what is wrong.

    Raises:
        RuntimeError: the condition does not hold; the type of error that PyTorch's operators raise.
    """
    torch._check(holds, lambda: message)  # type: ignore[no-untyped-call]


def unusual_weight(module: nn.Module) -> str:
    """A phrase about the first weight in bfloat16 or float64, which CPU runtimes don't compute in; empty if none."""
    for name, parameter in module.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float64):
            return f"'{name}' is {str(parameter.dtype).removeprefix('torch.')}, which runtimes do not compute in on CPU"
    return ""


def fetch(module: nn.Module, name: str) -> Any:
    """The attribute with a dotted name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Identity of a tensor's memory: the same for tensors that are the same weight.

    Unlike `data_ptr()`, which promises the caller memory to write into, it makes no copy of a lazy clone.
    """
    return int(tensor.untyped_storage()._cdata), int(tensor.storage_offset())


def lazy_clones(tensors: Sequence[torch.Tensor]) -> dict[int, Any]:
    """Copies of tensors that take memory only once either is written into, by `id`, as `deepcopy` takes them.

    Tensors that can't be shared so (views of one memory, memory of other libraries or processes, other devices) are
    left out: they are copied at once.
    """
    sharing = Counter(memory_of(tensor)[0] for tensor in tensors)
    clones: dict[int, Any] = {}
    for tensor in tensors:
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
        if not plain or tensor.layout is not torch.strided or sharing[memory_of(tensor)[0]] > 1:
            continue
        try:
            lazy = torch._lazy_clone(tensor.detach())
        except RuntimeError:
            continue
        if isinstance(tensor, nn.Parameter):
            clones[id(tensor)] = nn.Parameter(lazy, tensor.requires_grad)
        elif not tensor.requires_grad:
            clones[id(tensor)] = lazy
    return clones
