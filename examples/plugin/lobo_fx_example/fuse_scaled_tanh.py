"""A pass: it finds a pattern and writes one operator for it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from torch import fx

import lobo_fx
from lobo_fx.graph.operators import aten
from lobo_fx.graph.rewriting import Match, Op, Rejected, rewrite
from lobo_fx.plugins.settings import Range
from lobo_fx_example.operator import SCALED_TANH

__all__ = ["FuseScaledTanh"]


@dataclasses.dataclass(frozen=True)
class FuseScaledTanh(lobo_fx.Pass):
    """`tanh(x) · weight` → `scaled_tanh(x, weight)`, where the weight is stored and has one entry a channel.

    Attributes:
        least: channels that a product must have to be fused.
        others: whether the report names products that are left alone: `silent` or `noted`.
    """

    least: Annotated[int, Range(1)] = 1
    others: Literal["silent", "noted"] = "noted"

    promise: ClassVar[lobo_fx.Promise] = lobo_fx.Promise.EXACT

    def run(self, program: lobo_fx.Program, context: lobo_fx.Context) -> lobo_fx.Program:
        """Writes the operator; the compiler checks that outputs stay what they were."""

        def fuse(match: Match) -> fx.Node | Rejected:
            x, weight = match.arguments("tanh")["self"], match.arguments("product")["other"]
            is_stored = isinstance(weight, fx.Node) and weight.op == "get_attr"
            channels = x.meta["val"].shape[-1]
            if not is_stored or list(weight.meta["val"].shape) != [channels]:
                return Rejected(match.root, "its weight is not stored, one entry a channel")
            if channels < self.least:
                return Rejected(match.root, f"it has {channels} channels, less than {self.least}")
            return program.graph.call_function(SCALED_TANH, (x, weight))

        rejected = rewrite(program, Op(aten.mul.Tensor, Op(aten.tanh.default, name="tanh"), name="product"), fuse)
        for one in rejected if self.others == "noted" else ():
            context.note(f"not fused: {one.reason}", one.node)
        return program
