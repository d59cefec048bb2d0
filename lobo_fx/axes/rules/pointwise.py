"""Element by element: every tensor argument is broadcast."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from lobo_fx.axes.call import Axes, Call, axis_rule, pointwise
from lobo_fx.axes.kinds import is_stored
from lobo_fx.axes.zeros import MOVED, NOWHERE, Leaves, Operands, all_of, elementwise
from lobo_fx.graph.operators import aten

__all__ = ["POINTWISE", "added", "converted", "getitem", "prelu"]

# Pointwise operators that torch does not tag as such, or that have arguments other than tensors.
POINTWISE = (
    *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
    *(aten.feature_alpha_dropout.default, aten.clone.default, aten.contiguous.default, aten.to.dtype),
    *(aten.to.dtype_layout, aten.to.device, aten.detach.default),
    *(aten.alias.default, aten.rrelu.default, aten.ones_like.default),
    *(aten.relu6.default, aten._to_copy.default),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf),
    *(aten.where.Scalar, aten.hardswish.default, aten.hardsigmoid.default, aten.selu.default, aten.celu.default),
    *(aten.mish.default, aten.softplus.default, aten.copy.default, aten.fill.Scalar, aten.fill.Tensor),
    *(aten.square.default, aten.lift_fresh.default, aten.__and__.Tensor, aten.__or__.Tensor),
    *(aten.true_divide.Tensor, aten.float_power.Tensor_Scalar, aten.floor_divide.default),
    *(aten.expand_as.default, aten.nan_to_num.default, aten.log_sigmoid.default),
)
axis_rule(*POINTWISE, zeros=elementwise)(pointwise)
axis_rule(aten.empty_like.default, zeros=NOWHERE)(pointwise)
axis_rule(aten.zeros_like.default, aten.zero.default, zeros=all_of())(pointwise)
axis_rule(aten.full_like.default, zeros=all_of("fill_value"))(pointwise)


@axis_rule(aten.add.Tensor, zeros=elementwise)
def added(call: Call) -> Axes:
    """Broadcast; axes of two computed values of the same rank are marked as residual, unless one has size 1."""
    axes = pointwise(call)
    terms = [call.given[name] for name in ("self", "other") if call.has(name)]
    tensors = [call.of(term) for term in terms if not is_stored(term)]
    if len(tensors) == 2 and len(tensors[0]) == len(tensors[1]):
        for axis, *both in zip(axes, *tensors, strict=True):
            if all(term.find().size != 1 for term in both):
                axis.mark("residual")
    return axes


@axis_rule(aten.to.other, aten.type_as.default, zeros="self")
def converted(call: Call) -> Axes:
    """Only the dtype comes from the other tensor."""
    call.ignores("other")
    return call.axes("self")


def _of_values(call: Operands) -> Leaves:
    """Zeros of one of several results; integer results, such as indices of a max pool, are not zero for zeros."""
    value = call.node.meta["val"]
    return MOVED(call) if value.is_floating_point() or value.is_complex() else frozenset()


@axis_rule(operator.getitem, zeros=_of_values)
def getitem(call: Call) -> Any:
    """The axes of one of several results."""
    source, index = call.node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    return call.of(source)[index]


@axis_rule(aten.prelu.default, zeros="self")
def prelu(call: Call) -> Axes:
    """A slope per channel (dimension 1), or one for all."""
    x, weight = call.axes("self"), call.axes("weight")
    if weight[0].find().size != 1:
        call.unify(x[1], weight[0])
    return x
