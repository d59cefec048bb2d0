"""Names of a file's nodes: the user's module, then the operator, as `layer1.0.conv1/Conv`.

Netron shows these names, Model Explorer folds nodes by the namespace that is noted beside the name, a level for each
part of the module's name, and profiles report by them. Values keep the names that the program's nodes have.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["NAMESPACE", "module_of", "name_nodes"]

NAMESPACE = "namespace"
"""Metadata key of the groups that Model Explorer puts a node in, the outermost first, with a slash between."""

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of the modules in which `torch.onnx` saw a node called, the outermost first, and the node's own name."""
_RULE = "pkg.onnxscript.rewriter.rule_name"
_FUSED = "FuseBatchNorm"
"""A convolution with a batch norm in it is noted as the batch norm."""
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""The module that `torch.export` notes where it knows none."""


def name_nodes(model: ir.Model) -> None:
    """Gives every node a name of its own; operators that a module has several of are numbered."""
    modules = _modules(model)
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        module = modules.get(node, "")
        name = f"{module}/{node.op_type}" if module else node.op_type
        node.name = next(name for name in _numbered(name) if name not in taken)
        taken.add(node.name)
        node.metadata_props.pop(NAMESPACE, None)
        if "." in module:  # else the node's name says it
            node.metadata_props[NAMESPACE] = module.replace(".", "/")


def module_of(name: str) -> str:
    """The user's module that a node of a file belongs to, by the node's name; empty for the model itself."""
    return name.rpartition("/")[0]


def _numbered(name: str) -> Iterator[str]:
    return itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))


def _modules(model: ir.Model) -> dict[ir.Node, str]:
    """The module of each node, as `torch.onnx` noted it; nodes that decode stored tensors belong to their readers."""
    nodes, stored = list(model.graph.all_nodes()), _of_stored(model)
    found: dict[ir.Node, str] = {}
    for node in reversed(nodes):
        readers = [found[reader] for value in node.outputs for reader, _ in value.uses() if reader in found]
        noted = None if node in stored else _noted(node)
        module = noted if noted is not None else next(iter(readers), "")
        found[node] = module
    return found


def _noted(node: ir.Node) -> str | None:
    if _SCOPES not in node.metadata_props:
        return None
    if _FUSED in node.metadata_props.get(_RULE, "") and "." in (weight := str(node.inputs[1] and node.inputs[1].name)):
        return weight.rpartition(".")[0]
    *scopes, _ = ast.literal_eval(node.metadata_props[_SCOPES])
    return scopes[-1] if scopes and scopes[-1] != _NO_MODULE else None


def _of_stored(model: ir.Model) -> set[ir.Node]:
    """Nodes that read stored tensors alone."""
    found: set[ir.Node] = set()
    for node in model.graph:
        sources = [value for value in node.inputs if value is not None]
        if sources and all(value.is_initializer() or value.producer() in found for value in sources):
            found.add(node)
    return found
