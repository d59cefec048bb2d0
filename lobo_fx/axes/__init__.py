"""Axes: which dimensions of which tensors mean the same, and what can be removed from them.

`Inference(program).run()` finds the axes of a traced program; with `strict=True` an operator without a rule is an
error instead of a lock. `kind` says what a leaf is used as. A rule for an operator of your own is registered with
`axis_rule`; it gets a `Call`, unifies axes of its arguments, and returns the axes of the output. `zeros=` says where
the output is zero if channels of its operands are; if left out, that counts as unknown. `call.multiplies` states the
number of multiply-accumulates:

    @axis_rule(torch.ops.mylib.scale.default, zeros=any_of("x", "weight"))
    def scale(call: Call) -> tuple[Axis, ...]:
        # x[… c] · weight[c] → [… c]
        *rest, channels = call.axes("x")
        return (*rest, call.unify(channels, call.axes("weight")[0]))

`lobo_fx.axes.rules` holds the rules for PyTorch's own operators, one file a family.
"""

from lobo_fx.axes.axis import Axis, AxisError
from lobo_fx.axes.call import Call, axis_rule
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.kinds import KINDS, kind
from lobo_fx.axes.zeros import MOVED, NOWHERE, all_of, any_of, elementwise, through

__all__ = [
    "KINDS",
    "MOVED",
    "NOWHERE",
    "Axis",
    "AxisError",
    "Call",
    "Inference",
    "all_of",
    "any_of",
    "axis_rule",
    "elementwise",
    "kind",
    "through",
]
