"""Unstructured pruning: single weights become zero."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import nn

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.layers import LOOKUPS, weight_uses
from lobo_fx.graph.masks import mask_weight, masks, weight_node
from lobo_fx.graph.operators import is_call
from lobo_fx.graph.program import Program
from lobo_fx.passes.left_alone import note_left_alone

__all__ = ["SCORES", "PruneWeights", "Score", "input_dims", "prunable_weights"]

Score = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

# Score of each weight; the lowest go first. Squares rank weights as magnitudes do, within and across layers.
SCORES: dict[str, Score] = {
    "l1": lambda weight, generator: weight.detach().abs(),
    "l2": lambda weight, generator: weight.detach().square(),
    "random": lambda weight, generator: torch.rand(weight.shape, generator=generator),
}


@dataclasses.dataclass(frozen=True)
class PruneWeights(Pass):
    """Zeroes the weights of convolutions, linear and recurrent layers that matter least; biases and norms stay.

    The zeros are masked, so fine-tuning keeps them. They make a packed or compressed file smaller; ONNX Runtime
    computes zeros as fast as anything else, so latency does not change.

    Attributes:
        amount: share of the weights to remove, in [0, 1). Ignored when `pattern` is given.
        criterion: `l1` or `l2` magnitude, or `random`.
        scope: `layer` removes the share from each layer; `global` ranks all layers together.
        pattern: N:M sparsity such as "2:4": of every 4 weights in a row along the input dimension,
            at most 2 are kept.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015;
        N:M: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
    """

    amount: float = 0.5
    criterion: Literal["l1", "l2", "random"] = "l1"
    scope: Literal["layer", "global"] = "layer"
    pattern: str | None = None

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def __post_init__(self) -> None:
        if not isinstance(self.amount, (int, float)) or not 0 <= self.amount < 1:
            raise InvalidInput(f"amount is {self.amount!r}; it must be in [0, 1), the share of weights to remove")
        if self.pattern is not None:
            kept, group = _parse(self.pattern)
            if not 0 < kept < group:
                raise InvalidInput(f"pattern is {self.pattern!r}; in N:M, N must be at least 1 and less than M")
        super().__post_init__()  # last, since the messages above say more

    def portion(self, before: float, after: float, start: Program, now: Program) -> PruneWeights:
        """The pass that goes on from the share `before` of the way to the share `after`: masked weights stay masked.

        Args:
            before: where `now` is.
            after: where to go, in (0, 1]. A part of the way to the pattern 2:4 is 3:4.
            start: the program when nothing was removed.
            now: the program as it is.
        """
        if self.pattern is not None:
            kept, group = _parse(self.pattern)
            removed = math.ceil((group - kept) * after)
            return dataclasses.replace(self, pattern=f"{group - removed}:{group}")
        return dataclasses.replace(self, amount=self.amount * after)

    def run(self, program: Program, context: Context) -> Program:
        generator = context.generator()
        weights = prunable_weights(program)
        if not weights:
            context.note("prune_weights found no convolution, linear or recurrent layer to prune")
        note_left_alone(program, weights.values(), context)
        for node in program.graph.nodes:
            read = weight_node(node.args[0]) if is_call(node, *LOOKUPS) else None
            if read is not None and any(program.parameter(read) is weight for weight in weights.values()):
                context.note("is masked too: its weight is tied to a layer's", node)
        known = masks(program)
        scores = {}
        for name, weight in weights.items():
            score = SCORES[self.criterion](weight, generator)
            # weights that were removed before count towards the share, and stay removed
            scores[name] = score.masked_fill(~known[name], -1.0) if name in known else score
        for name, mask in self._masks(scores, input_dims(program), context).items():
            mask_weight(program, name, mask)
        return program

    def _masks(
        self, scores: dict[str, torch.Tensor], dims: dict[str, int], context: Context
    ) -> dict[str, torch.Tensor]:
        if self.pattern is not None:
            found = {name: _n_of_m(score, *_parse(self.pattern), dims[name]) for name, score in scores.items()}
            for name in [name for name, mask in found.items() if mask is None]:
                context.note(
                    f"keeps its weights: its inputs don't divide into groups of {self.pattern}", parameter=name
                )
            return {name: mask for name, mask in found.items() if mask is not None}
        if self.scope == "layer" or not scores:
            return {name: _lowest(score, self.amount) for name, score in scores.items()}
        together = _lowest(torch.cat([score.flatten() for score in scores.values()]), self.amount)
        parts = torch.split(together, [score.numel() for score in scores.values()])
        return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


def prunable_weights(program: Program) -> dict[str, torch.Tensor]:
    """Weights of layers and recurrent layers by name; a tied weight once."""
    return {name: program.module.get_parameter(name) for name in input_dims(program)}


def input_dims(program: Program) -> dict[str, int]:
    """The input dimension of each weight that can be pruned, by the weight's name."""
    found: dict[int, tuple[str, int]] = {}
    for node in program.graph.nodes:
        for use in weight_uses(node):
            weight = program.parameter(use.read)
            if isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() > 1:
                found.setdefault(id(weight), (str(use.read.target), use.input_dim))
    return dict(found.values())


def _lowest(score: torch.Tensor, amount: float) -> torch.Tensor:
    """Mask that removes exactly round(amount · n) entries, the lowest first; ties by position."""
    flat = score.flatten()
    count = round(amount * flat.numel())
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    removed = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    removed[ties[: count - int(removed.sum())]] = True
    return removed.logical_not_().view_as(score)


def _n_of_m(score: torch.Tensor, kept: int, group: int, dim: int) -> torch.Tensor | None:
    """Mask that keeps the `kept` highest of every `group` neighbours along `dim`; None if they don't divide."""
    moved = score.movedim(dim, -1)
    if moved.shape[-1] % group:
        return None
    grouped = moved.reshape(-1, group)
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    mask.scatter_(1, grouped.topk(kept, dim=1).indices, True)
    return mask.view(moved.shape).movedim(-1, dim).contiguous()


def _parse(pattern: object) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None:
        raise InvalidInput(f"pattern is {pattern!r}; write it as N:M, for instance '2:4' (quoted in YAML)")
    return int(match[1]), int(match[2])
