"""Structured pruning: whole channels, heads and groups leave the network, wherever they run through it."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.algebra import Removal, kept
from lobo_fx.axes.members import Member, members
from lobo_fx.axes.surgery import remove, zero
from lobo_fx.context import Context
from lobo_fx.errors import ContractError, InvalidInput
from lobo_fx.masks import strip_masks
from lobo_fx.measures import largest_error
from lobo_fx.operators import CONVOLUTIONS, arguments, aten
from lobo_fx.passbase import EXACT_TOLERANCE, Pass, Promise
from lobo_fx.passes.compensation import METHODS, fit
from lobo_fx.passes.importance import ELEMENTWISE, Elementwise, importance
from lobo_fx.program import Program


@dataclasses.dataclass(frozen=True)
class PruneChannels(Pass):
    """Removes the positions that matter least from every free axis: channels, heads, head dimensions, groups.

    Which dimensions belong together is inferred from the graph (`lobo_fx.axes`): nothing about the architecture
    needs to be said, and what is not understood keeps its size. Before: `conv(x, W[64, 3, 7, 7])` and whatever
    reads its channels. After: `conv(x, W[32, 3, 7, 7])`, and each reader 32 wide.

    Where nothing but weighted sums runs over an axis, removal equals zeroing, and the compiler checks that.
    Where a norm or a mean runs over it, the report says so and gives the signal-to-noise ratio.

    Attributes:
        ratio: share of each axis to remove, in [0, 1); or shares by pattern of module names, for the output
            widths of the modules matched (`{"layer1.*": 0.3}`).
        importance: `l1`, `l2`, `random`, or a function that scores each element of a parameter.
        round_to: widths that stay are multiples of this, where the axis is at least twice as wide.
        minimum: no axis gets narrower.
        compensation: what is fitted to calibration data after removal, so that the outputs stay near the
            original's: `none`, `recalibrate` (batch norms), `bias` (and biases), `reconstruct` (and weights, by
            least squares); `auto` is `reconstruct` where calibration data is given, else `none`.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, for the problem; Li et al.,
        "Pruning Filters for Efficient ConvNets", 2017, for magnitudes.
    """

    ratio: float | Mapping[str, float] = 0.5
    importance: str | Elementwise = "l2"
    round_to: int = 8
    minimum: int = 1
    compensation: str = "auto"

    promise: ClassVar[Promise] = Promise.MASKED

    def __post_init__(self) -> None:
        ratios = self.ratio.values() if isinstance(self.ratio, Mapping) else [self.ratio]
        for ratio in ratios:
            if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
                raise InvalidInput(f"ratio is {ratio!r}; it must be in [0, 1), the share of an axis to remove")
        known = [*ELEMENTWISE, "random"]
        if isinstance(self.importance, str) and self.importance not in known:
            raise InvalidInput(
                f"importance is {self.importance!r}; it must be one of {', '.join(known)}, or a function"
            )
        if self.compensation not in ("auto", *METHODS):
            raise InvalidInput(
                f"compensation is {self.compensation!r}; it must be one of {', '.join(('auto', *METHODS))}"
            )
        for name in ("round_to", "minimum"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1")

    def run(self, program: Program, context: Context) -> Program:
        method = self.compensation
        if method == "auto":
            method = "none" if context.calibration_data is None else "reconstruct"
        if method != "none":
            context.require(["calibration_data"], self.name)
        strip_masks(program)
        original = program if method == "none" else program.clone()
        inference = Inference(program).run()
        for operator, where in inference.unknown.items():
            context.note(f"{operator} has no axis rule, so what it touches keeps its size: {where}")
        free = members(inference)
        generator = context.generator()
        removal: Removal = {}
        for leaf, ratio in self._ratios(free).items():
            stay = self._width(leaf.size, ratio)
            if stay < leaf.size:
                scores = importance(leaf, free[leaf], self.importance, generator)
                removal[leaf] = torch.zeros(leaf.size, dtype=torch.bool)
                removal[leaf][scores.argsort(descending=True, stable=True)[:stay]] = True
        if not removal:
            context.note("prune_channels found nothing to remove")
            return program
        zero(inference, removal)
        if reasons := {reason for leaf in removal for reason in leaf.inexact}:
            context.note(f"removal is more than zeroing on some axes: {'; '.join(sorted(reasons))}")
        else:
            context.expect(program.run())
        remove(inference, removal)
        if method != "none":
            self._check_removal(program, context)
            batches = list(context.calibration_batches())
            fit(program, original, kept_outputs(inference, removal), batches, method, context.show_progress)
        return program

    def _check_removal(self, program: Program, context: Context) -> None:
        """Compares removal with zeroing now: fitting moves the outputs on purpose."""
        outputs = program.run()
        for expected in context.expected:
            error = largest_error(expected, outputs)
            if error > EXACT_TOLERANCE:
                raise ContractError(f"{self}: removing differs from zeroing by {error:.1e} of the output range")
        context.expected.clear()

    def _width(self, size: int, ratio: float) -> int:
        """How many positions of an axis stay."""
        stay = size * (1 - ratio)
        if size >= 2 * self.round_to:
            stay = max(self.round_to, self.round_to * math.floor(stay / self.round_to + 0.5))
        return min(size, max(self.minimum, 1, round(stay)))

    def _ratios(self, free: Mapping[Axis, Sequence[Member]]) -> dict[Axis, float]:
        """The share to remove from each free axis that is to be pruned."""
        if not isinstance(self.ratio, Mapping):
            return dict.fromkeys(free, self.ratio)
        makers = {
            leaf: {member.name.rpartition(".")[0] for member in found if member.dim == 0}
            for leaf, found in free.items()
        }
        names = sorted(set().union(*makers.values()))
        chosen: dict[Axis, float] = {}
        for pattern, ratio in self.ratio.items():
            matched = [leaf for leaf, modules in makers.items() if fnmatch.filter(modules, pattern)]
            if not matched:
                near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3)
                raise InvalidInput(f"'{pattern}' matches no module with a width to prune; near: {', '.join(near)}")
            chosen |= dict.fromkeys(matched, ratio)
        return chosen


def kept_outputs(inference: Inference, removal: Removal) -> dict[str, torch.Tensor]:
    """By name of a convolution or linear layer, which of its original outputs stay."""
    found = {}
    for node in inference.program.graph.nodes:
        if node.op == "call_function" and node.target in CONVOLUTIONS | {aten.linear.default}:
            weight = arguments(node)["weight"]
            if isinstance(weight, fx.Node) and weight in inference.values:
                found[node.name] = kept(inference.of(weight)[0], removal)
    return found
