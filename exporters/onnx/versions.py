"""Lowers the versions that a file needs as far as its operators and types allow, so that older runtimes read it."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import defs, helper

__all__ = ["MICROSOFT", "lower_versions", "needs"]

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
_INITIALIZERS_ALONE = 4
"""The IR version since which an initializer need not be an input too."""
_FUNCTIONS = 8
"""The IR version since which a model may hold functions."""
_TYPES = {9: "FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ", 10: "INT4 UINT4", 11: "FLOAT4E2M1"}
_TYPES |= {12: "FLOAT8E8M0", 13: "INT2 UINT2"}
"""By IR version, the types that it brought (onnx.proto)."""


_RUNTIMES = {18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18"}
"""By version of the standard operators, the first ONNX Runtime that knows them (its compatibility table)."""


def needs(model: ir.Model) -> str:
    """What a file asks of its runtime, in words."""
    opset, contributed = model.opset_imports[""], sorted(domain for domain in model.opset_imports if domain)
    said = f"It needs opset {opset} and IR version {model.ir_version}"
    if not contributed and (release := _RUNTIMES.get(max(opset, min(_RUNTIMES)))):
        said += f": ONNX Runtime {release} or newer"
    return said + (f", and operators of {', '.join(contributed)}" if contributed else "") + "."


def lower_versions(model: ir.Model, keep_opset: bool = False) -> None:
    """Lowers the operator sets that a model imports, and its IR version, as far as it means the same.

    An operator means the same from the version of its set that defined it to the next version that changes it: a model
    needs the newest of the versions that defined its operators. Sets that are not used are removed.

    Args:
        model: changed in place.
        keep_opset: whether the standard operators' version was asked for.
    """
    nodes = [
        *model.graph.all_nodes(),
        *(node for function in model.functions.values() for node in function.all_nodes()),
    ]
    used = {node.domain for node in nodes} | {""}
    for domain in [domain for domain in model.opset_imports if domain not in used]:
        del model.opset_imports[domain]
    if not keep_opset and not model.functions:
        current = model.opset_imports[""]
        defined = [_defined(node.op_type, current) for node in nodes if node.domain == ""]
        model.opset_imports[""] = max(defined, default=current)
    model.ir_version = _ir_version(model)


def _defined(operator: str, opset: int) -> int:
    """The version of the standard operators that defined one as it is in `opset`."""
    try:
        return int(defs.get_schema(operator, opset, "").since_version)
    except defs.SchemaError:
        return opset


def _ir_version(model: ir.Model) -> int:
    """The lowest IR version that allows the model's operator sets, and the types of its tensors."""
    imported = [helper.make_opsetid(*entry) for entry in model.opset_imports.items()]
    needed = [_INITIALIZERS_ALONE, helper.find_min_ir_version_for(imported, ignore_unknown=True)]
    needed += [_FUNCTIONS] * bool(model.functions)
    types = {value.dtype for graph in model.graphs() for value in [*graph.inputs, *graph.outputs]}
    types |= {
        value.const_value.dtype
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value
    }
    names = {kind.name for kind in types if kind is not None}
    needed += [version for version, brought in _TYPES.items() if names & set(brought.split())]
    return int(min(max(needed), onnx.IR_VERSION))
