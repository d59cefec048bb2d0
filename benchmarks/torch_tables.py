"""What PyTorch does anew for every export, half of the time of a small one: here it is done once, or not at all."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import traceback
import types
import typing
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

    What a type or a method says of itself is asked once, and a line of source is read where it is shown, not for each
    of a hundred frames above each operator.

    And a trace exchanges methods of `nn.Module`, each for milliseconds where a thousand classes inherit from it, even
    if what it puts there does the same.
    """
    import torch.ao.quantization.fx._decomposed
    from torch._decomp import decomposition_table
    from torch._export import utils
    from torch._export.serde import serialize
    from torch.fx import _symbolic_trace
    from torch.fx.experimental.proxy_tensor import PythonKeyTracer, _ModuleStackTracer
    from torch.fx.graph import CodeGen
    from torch.onnx._internal.exporter import _decomp
    from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
    from torch.onnx._internal.exporter._registration import ONNXRegistry
    from torch.utils import _traceback

    parsed = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
        registry = copy.copy(parsed(opset_version))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    known: dict[Any, dict[Any, Any]] = {}
    build = _decomp.create_onnx_friendly_decomposition_table

    def decompositions(translated: set[Any]) -> dict[Any, Any]:
        key = frozenset(translated), len(torch.library._defs), len(decomposition_table)
        if key not in known:
            known[key] = build(translated)
        return dict(known[key])

    hints: dict[type, dict[str, Any]] = {}

    def type_hints(kind: type, globalns: dict[str, Any]) -> dict[str, Any]:
        if kind not in hints:
            hints[kind] = typing.get_type_hints(kind, globalns=globalns)
        return hints[kind]

    parameters = functools.cache(lambda function: inspect.signature(function).parameters)

    def call_checked(codegen: Any, method: Any, *args: Any, **given: Any) -> Any:
        taken = parameters(method.__func__)
        return method(*args, **{name: value for name, value in given.items() if name in taken})

    def frames(found: Any, skip: int) -> traceback.StackSummary:
        stack = traceback.StackSummary()
        stack.extend(
            traceback.FrameSummary(frame["filename"], frame["line"], frame["name"], lookup_line=False)
            for frame in reversed(found[skip:])
        )
        return stack

    exchange = _symbolic_trace._Patcher.patch_method
    originals = {"__call__": _symbolic_trace._orig_module_call, "__getattr__": _symbolic_trace._orig_module_getattr}

    def exchanged(patcher: Any, cls: type, name: str, new: Any, deduplicate: bool = True) -> None:
        closure = dict(zip(new.__code__.co_freevars, new.__closure__ or (), strict=True))
        tracer = closure["self"].cell_contents if "self" in closure else None
        same = type(tracer) is PythonKeyTracer or (
            type(tracer) is _ModuleStackTracer and name == "__getattr__" and not tracer.enable_attr_proxy
        )
        if not (same and cls is torch.nn.Module and getattr(cls, name) is originals[name]):
            exchange(patcher, cls, name, new, deduplicate)

    with (
        mock.patch.object(serialize, "typing", types.SimpleNamespace(**vars(typing) | {"get_type_hints": type_hints})),
        mock.patch.object(CodeGen, "_call_method_with_signature_check", call_checked),
        mock.patch.object(_traceback, "_extract_symbolized_tb", frames),
        mock.patch.object(_symbolic_trace._Patcher, "patch_method", exchanged),
        mock.patch.object(_decomp, "create_onnx_friendly_decomposition_table", decompositions),
        mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)),
        mock.patch.object(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops)),
    ):
        yield
