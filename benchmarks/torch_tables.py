"""Tables that PyTorch builds anew for every export, half of the time of a small one: here they are built once."""

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

    The first holds PyTorch's 550 ONNX translations; every export gets lists of its own, since ours are added to them.
    The second is `torch.ops` filled with all composite operators: filled once, it is full. The third says how to
    decompose the operators without a translation; it is built again when operators are added.
    """
    import torch.ao.quantization.fx._decomposed
    from torch._decomp import decomposition_table
    from torch._export import utils
    from torch.onnx._internal.exporter import _decomp
    from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parsed = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
        registry = copy.copy(parsed(opset_version))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    known: dict[Any, dict[Any, Any]] = {}
    build = _decomp.create_onnx_friendly_decomposition_table

    def decompositions(translated: set[Any]) -> dict[Any, Any]:
        key = frozenset(translated), len(torch._C._dispatch_get_all_op_names()), len(decomposition_table)
        if key not in known:
            known[key] = build(translated)
        return dict(known[key])

    with (
        mock.patch.object(_decomp, "create_onnx_friendly_decomposition_table", decompositions),
        mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)),
        mock.patch.object(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops)),
    ):
        yield
