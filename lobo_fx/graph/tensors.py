"""Tensors of a module by their dotted names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["fetch", "register", "require", "unusual_weight"]


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
