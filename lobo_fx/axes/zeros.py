"""Where zeroed channels stay zero: what tells a removal that equals zeroing from one that does not.

Zeroing a channel zeroes every weight that makes or reads it. Where its values are summed with weights, that is
the same as removing it. Where values are summed without weights (attention, a plain sum), it is the same only
if they are still zero there: `relu(0)` is, `sigmoid(0)` is not, and neither is a sum with a value that the
channel does not run through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.axis import Axis
from lobo_fx.graph.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, arguments, aten

__all__ = ["MOVED", "Leaves", "Sum", "Zero", "Zeros", "all_of", "any_of", "mark_inexact_zeros"]

Sum = tuple[fx.Node, Axis, tuple[fx.Node, ...]]
"""A node that sums over an axis, and the operands whose product is summed."""
Leaves = frozenset[Axis]
Zeros = Mapping[fx.Node, Leaves]
"""By node: the leaves at whose zeroed positions its values are zero."""


@dataclasses.dataclass(frozen=True)
class Zero:
    """Where an operator's output is zero, from where its operands are.

    Attributes:
        operands: their names; none stands for all that the leaf runs through.
        all: whether all of them must be zero, or any.
    """

    operands: tuple[str, ...]
    all: bool


def any_of(*operands: str) -> Zero:
    """Zero wherever one of these operands is: a product."""
    return Zero(operands, all=False)


def all_of(*operands: str) -> Zero:
    """Zero wherever each of these operands is: a sum."""
    return Zero(operands, all=True)


MOVED = Zero((), all=True)
"""Values only move: zero wherever every operand that the leaf runs through is."""

# f(0) = 0, element by element.
_PRESERVING = frozenset(
    getattr(aten, name).default
    for name in (
        *("relu", "gelu", "silu", "tanh", "neg", "abs", "hardswish", "hardtanh", "relu6", "elu", "selu", "celu"),
        *("mish", "leaky_relu", "sqrt", "square", "sin", "tan", "sign", "round", "floor", "ceil", "erf", "dropout"),
        *("clone", "contiguous", "detach", "alias", "feature_dropout", "expand_as", "type_as"),
    )
) | {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other}
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor})
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar})
_WEIGHTED = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | {aten.linear.default}
_WEIGHTED |= {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_NORMS = frozenset({aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default})
_NORMS |= {aten.instance_norm.default}
_ZEROS = frozenset({aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default, aten.zero.default})
# Not zero for zeros; what is computed element by element and tagged so need not be named here.
_NONZERO = frozenset(
    {
        *(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default),
        *(aten.logsumexp.default, aten.copy.default, aten.fill.Scalar, aten.fill.Tensor, aten.softplus.default),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf),
        *(aten.where.Scalar, aten.hardsigmoid.default, aten.log_sigmoid.default, aten.empty_like.default),
        *(aten.ones_like.default, aten.full_like.default, aten.new_ones.default, aten.new_full.default),
    }
)
# By argument: not finite where it is zero.
_SINGULAR = dict.fromkeys(_QUOTIENTS, "other") | dict.fromkeys(
    [aten.reciprocal.default, aten.rsqrt.default, aten.log.default, aten.log2.default, aten.log10.default], "self"
)
_PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})
# The other tensor lends its shape or dtype, not its values.
_BORROWING = frozenset(
    {aten.expand_as.default, aten.type_as.default, aten.to.other, aten.view_as.default, aten.reshape_as.default}
)


def mark_inexact_zeros(
    graph: fx.Graph, values: Mapping[fx.Node, Any], sums: list[Sum], declared: Mapping[object, Zero]
) -> None:
    """Marks axes inexact that are summed where zeroed positions are not zero, or divided by where they are.

    Args:
        graph: in order.
        values: the axes of every node.
        sums: where values are summed.
        declared: where outputs are zero, by operator.
    """
    zeros: dict[fx.Node, Leaves] = {}
    carried: dict[fx.Node, Leaves] = {}
    for node in graph.nodes:
        carried[node] = frozenset(_leaves(values.get(node)))
        zeros[node] = _zeros(node, zeros, carried, declared) & carried[node] if carried[node] else frozenset()
        divisor = arguments(node).get(_SINGULAR[node.target]) if node.target in _SINGULAR else None
        for leaf in zeros[divisor] if isinstance(divisor, fx.Node) else ():
            leaf.mark_inexact(f"{node.target} is not finite for a zeroed channel")
    for node, axis, operands in sums:
        zero = frozenset[Axis]().union(*(zeros[operand] for operand in operands))
        for leaf in axis.leaves():
            if leaf not in zero:
                leaf.mark_inexact(f"{node.target} sums values over it that are not zero for a zeroed channel")


def _zeros(node: fx.Node, zeros: Zeros, carried: Zeros, declared: Mapping[object, Zero]) -> Leaves:
    if node.op != "call_function":
        return carried[node] if node.op == "get_attr" else frozenset()
    target, given = node.target, arguments(node)
    nowhere: Leaves = frozenset()

    def operand(name: str) -> Leaves:
        value = given.get(name)
        if isinstance(value, fx.Node):
            return zeros[value]
        return carried[node] if value in (0, None) else nowhere

    if target in _PRODUCTS:
        return operand("self") | operand("other")
    if target in _QUOTIENTS:
        return operand("self")
    if target in _SUMS:
        return operand("self") & operand("other")
    if target in _WEIGHTED:
        return (operand("weight") & operand("bias")) | (nowhere if given["bias"] else operand("input"))
    if target in _NORMS:
        kept = operand("input") if target is aten.rms_norm.default else nowhere
        return kept | (operand("weight") if given["weight"] else nowhere)
    if target is aten.scaled_dot_product_attention.default:
        return operand("value")
    if target in _ZEROS:
        return carried[node]
    if target in _NONZERO or (target in _PADS and given["value"]):
        return nowhere
    if target not in _PRESERVING and isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return nowhere
    rule = declared.get(target, MOVED if target in _PRESERVING else None)
    if rule is None:
        return nowhere
    if rule.operands:
        found = [operand(name) for name in rule.operands if given.get(name) is not None]
        combine = frozenset.intersection if rule.all else frozenset.union
        return combine(*found) if found else nowhere
    moved = _moved(node, zeros, carried)
    return moved & operand("self") if target in (aten.addmm.default, aten.baddbmm.default) else moved


def _moved(node: fx.Node, zeros: Zeros, carried: Zeros) -> Leaves:
    """Views, cuts, joins, products: zero wherever every tensor that the leaf runs through is."""
    found: set[Axis] = set()
    sources = [arguments(node)["self"]] if node.target in _BORROWING else node.all_input_nodes
    for source in sources:
        found |= zeros[source]
    for source in sources:
        found -= carried[source] - zeros[source]
    return frozenset(found)


def _leaves(axes: Any) -> Iterator[Axis]:
    """The leaves of a tensor's axes, or of several tensors'."""
    if isinstance(axes, Axis):
        yield from axes.leaves()
    elif isinstance(axes, (tuple, list)):
        for axis in axes:
            yield from _leaves(axis)
