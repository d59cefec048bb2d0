"""Where zeroed channels stay zero: what tells a removal that equals zeroing from one that does not.

Zeroing a channel zeroes every weight that makes or reads it. Where its values are summed with weights, that is
the same as removing it. Where values are summed without weights (attention, a plain sum), it is the same only
if they are still zero there: `relu(0)` is, `sigmoid(0)` is not.
"""

from __future__ import annotations

import torch
from torch import fx

from lobo_fx.axes.algebra import Axis
from lobo_fx.operators import arguments, aten

Sum = tuple[fx.Node, Axis, tuple[fx.Node, ...]]
"""A node that sums over an axis, and the operands whose product is summed."""

# f(0) = 0, element by element.
_PRESERVING = frozenset(
    getattr(aten, name).default
    for name in (
        *(
            "relu",
            "gelu",
            "silu",
            "tanh",
            "neg",
            "abs",
            "hardswish",
            "hardtanh",
            "relu6",
            "elu",
            "selu",
            "celu",
            "mish",
        ),
        *("leaky_relu", "sqrt", "square", "sin", "tan", "sign", "round", "floor", "ceil", "erf", "dropout", "clone"),
        *("contiguous", "detach", "alias", "feature_dropout", "zeros_like", "expand_as", "type_as"),
    )
    if hasattr(getattr(aten, name), "default")
) | {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other}
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_WEIGHTED = frozenset({aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
_NORMS = frozenset({aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default})
_NORMS |= {aten.instance_norm.default}
_NONZERO = frozenset(
    {aten.softmax.int, aten.log_softmax.int, aten.ones.default, aten.full.default, aten.arange.default}
)
_NONZERO |= {aten.new_ones.default, aten.new_full.default, aten.ones_like.default, aten.full_like.default}


def mark_unweighted_sums(graph: fx.Graph, sums: list[Sum]) -> None:
    """Marks axes inexact that are summed where zeroed positions are not zero."""
    zero: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        zero[node] = _stays_zero(node, zero)
    for node, axis, operands in sums:
        if not any(zero[operand] for operand in operands):
            axis.mark_inexact(f"{node.target} sums values over it that are not zero for a zeroed channel")


def _stays_zero(node: fx.Node, zero: dict[fx.Node, bool]) -> bool:
    if node.op in ("get_attr", "placeholder") or node.op != "call_function":
        return True
    inputs = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]
    target = node.target
    if target in _PRODUCTS:
        return any(zero[source] for source in inputs)
    if target in _QUOTIENTS:
        first = node.args[0]
        return isinstance(first, fx.Node) and zero[first]
    if target in _SUMS:
        return all(zero[source] for source in inputs) and not any(_is_number(value) for value in node.args[:2])
    if target in _WEIGHTED:
        return zero[arguments(node)["weight"]]
    if target in _NORMS:
        return isinstance(arguments(node).get("weight"), fx.Node)
    if target is aten.scaled_dot_product_attention.default:
        return zero[arguments(node)["value"]]
    if target in _NONZERO:
        return False
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if pointwise and target not in _PRESERVING:
        return False
    return all(zero.get(source, True) for source in node.all_input_nodes)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and value != 0
