"""Two tables that PyTorch builds anew for every export, half of the time of a small one: here they are built once."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

__all__ = ["tables_built_once"]


@contextlib.contextmanager
def tables_built_once() -> Iterator[None]:
    """Builds them once a process.

    The one holds PyTorch's 550 ONNX translations; every export gets lists of its own, since ours are added to them. The
    other is `torch.ops` filled with all composite operators: filled once, it is full.
    """
    import torch.ao.quantization.fx._decomposed  # noqa: F401  the table holds only operators that exist by then
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parsed = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*args: Any, **kwargs: Any) -> ONNXRegistry:
        registry = copy.copy(parsed(*args, **kwargs))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    with (
        mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)),
        mock.patch.object(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops)),
    ):
        yield
