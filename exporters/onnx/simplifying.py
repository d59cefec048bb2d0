"""Folds constants of a translated graph and rewrites it by onnxscript's rules, but for those that round.

`onnxscript.optimizer.optimize_ir`, which `torch.onnx` calls, takes a constant within 1e-8 of zero for zero and one
within 1e-5 of one for one: it drops the ε of `log(x + 1e-10)`, and the logarithm of zero is infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions, pattern
from onnxscript.rewriter.rules.common import _no_op

__all__ = ["simplify"]

_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}
"""By operator, the second operand that changes nothing."""


def _no_operation(operator: str, neutral: float) -> Callable[[Any, Any], Any]:
    """A pattern: the operator with exactly that constant."""
    return lambda op, x: getattr(op, operator)(x, pattern.Constant(neutral, rel_tol=0, abs_tol=0))


_EXACT = [
    pattern.RewriteRule(_no_operation(operator, neutral), lambda op, x: op.Identity(x))
    for operator, neutral in _NEUTRAL.items()
]
_RULES = [*_EXACT, *(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in [*_no_op.rules])]
_STEPS = 2
"""How often constants are folded and rules applied at most, as in `optimize_ir`."""


def simplify(model: ir.Model) -> None:
    """Rewrites the model in place; its outputs stay the same, bit for bit but for folded constants."""
    common.InlinePass()(model)
    for _ in range(_STEPS):
        folded = optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewritten = rewriter.RewritePass(_RULES)(model)
        for remove in (common.RemoveUnusedNodesPass, common.RemoveUnusedFunctionsPass, common.RemoveUnusedOpsetsPass):
            remove()(model)
        if not (folded.modified or rewritten.modified):
            break
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)
    onnx_fusions.fuse(model)
