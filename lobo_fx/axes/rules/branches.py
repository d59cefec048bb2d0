"""Branches of `cond`: subgraphs, one of which runs."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.axis import AxisError
from lobo_fx.axes.call import Axes, Call, axis_rule, rule_of, sizes_of
from lobo_fx.graph.operators import arguments
from lobo_fx.graph.tensors import fetch

__all__ = ["cond"]


@axis_rule(torch.ops.higher_order.cond)
def cond(call: Call) -> list[Axes]:
    """Outputs of both branches are unified, dimension by dimension."""
    predicate, true_read, false_read, operands = call.node.args
    if isinstance(predicate, fx.Node):
        call.of(predicate)
    assert isinstance(operands, Sequence)
    first, second = (_outputs(call, read, operands) for read in (true_read, false_read))
    return [tuple(call.unify(*pair) for pair in zip(*both, strict=True)) for both in zip(first, second, strict=True)]


def _outputs(call: Call, read: Any, operands: Sequence[Any]) -> list[Axes]:
    """The axes of a branch's outputs, from those of its operands, by the rules of the operators in it.

    Raises:
        AxisError: an operator in it has no rule, it holds a tensor of its own, or its shapes no longer fit the
            operands.
    """
    owner = call.node.graph.owning_module
    assert owner is not None
    graph = fetch(owner, str(read.target)).graph
    inside: dict[fx.Node, Any] = {}
    known = collections.ChainMap(inside, call.known)  # type: ignore[arg-type]
    feeds = iter(operands)
    for node in graph.nodes:
        if node.op == "placeholder":
            inside[node] = _fed(call, node, next(feeds))
        elif node.op == "call_function":
            rule = rule_of(node)
            if rule is None:
                raise AxisError(f"in a branch, {node.target} has no axis rule")
            inside[node] = rule(Call(node, arguments(node), known, call.findings))
        elif node.op == "get_attr":
            raise AxisError("a branch holds a tensor of its own")
    return [inside[output] for output in graph.output_node().args[0]]


def _fed(call: Call, placeholder: fx.Node, operand: Any) -> Any:
    if not isinstance(operand, fx.Node):
        return None
    axes = call.of(operand)
    if tuple(axis.find().size for axis in axes) != sizes_of(placeholder.meta["val"]):
        raise AxisError("the shapes in its branches are not known")
    return axes
