"""Moves a layer towards its fit only as far as its error on held-out rows, which no fit saw, falls."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["ROWS", "Affine", "HeldOut"]

ROWS = 4096
"""Most held-out rows of a layer: enough to know its error to a few percent."""
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
    """Held-out rows of a layer's inputs and of its target outputs."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows: (groups, rows, columns) and (groups, rows, outputs)."""
        self.parts.append((x.double(), y.double()))

    def error(self, layer: Affine) -> float:
        """Sum of squared differences between a layer's outputs and the targets."""
        return sum(float((y - layer(x)).square().sum()) for x, y in self.parts)

    def approach(self, start: Affine, end: Affine) -> tuple[Affine, float, float]:
        """The best layer between two layers; its share of the way from start to end, and its error.

        At the share s, the error is ‖r − s·d‖², with r the targets less the start's outputs and d the end's outputs
        less the start's: a parabola in s.
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
