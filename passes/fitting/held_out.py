"""How far a layer should move from what it computes towards what was fitted: as far as rows that no fit saw gain."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["ROWS", "Affine", "HeldOut"]

ROWS = 4096
"""Most rows that judge: their error is known to a few percent, whatever the layer."""
_WHOLE = 1.01
"""A fitted layer is taken whole where its error is no more than this times that of the best mixture."""


@dataclasses.dataclass(frozen=True)
class Affine:
    """What a layer computes: x·Wᵀ + b, in each group.

    Attributes:
        weight: (groups, outputs, columns).
        bias: (groups, outputs).
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(groups, rows, columns) to (groups, rows, outputs)."""
        return x @ self.weight.mT + self.bias.unsqueeze(1)

    def towards(self, other: Affine, share: float) -> Affine:
        """The mixture of two layers."""
        return Affine(torch.lerp(self.weight, other.weight, share), torch.lerp(self.bias, other.bias, share))


class HeldOut:
    """Rows of a layer's inputs, and of what it should make of them, that no fit saw."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows: (groups, rows, columns) and (groups, rows, outputs)."""
        self.parts.append((x.double(), y.double()))

    def error(self, layer: Affine) -> float:
        """Sum of squares of what a layer gives too much or too little."""
        return sum(float((y - layer(x)).square().sum()) for x, y in self.parts)

    def approach(self, start: Affine, end: Affine) -> tuple[Affine, float, float]:
        """The best layer on the way from one to another; its share of the way, and its error.

        The error along the way is ‖r − s·d‖², with r what the start lacks and d what the end changes: a parabola in s.
        """
        square = product = change = 0.0
        for x, y in self.parts:
            given = start(x)
            lacks, moved = y - given, end(x) - given
            square, product, change = (
                square + float(lacks.square().sum()),
                product + float((lacks * moved).sum()),
                change + float(moved.square().sum()),
            )

        def error(share: float) -> float:
            return square - 2 * share * product + share * share * change

        share = min(max(product / change, 0.0), 1.0) if change > 0 else 0.0
        if error(1.0) <= _WHOLE * error(share) and error(1.0) < square:
            share = 1.0
        return start.towards(end, share), share, error(share)
