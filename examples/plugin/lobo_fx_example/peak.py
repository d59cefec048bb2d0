"""A criterion: how much a channel matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import torch

import lobo_fx
from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.members import Member
from lobo_fx.passes.pruning.criteria import Criterion, Scorer
from lobo_fx.plugins.settings import Range

__all__ = ["Peak"]


@dataclasses.dataclass(frozen=True)
class Peak(Criterion):
    """Sum of a high power of each weight, so that the largest ones decide.

    Attributes:
        power: what magnitudes are raised to.
    """

    power: Annotated[float, Range(above=0, most=16)] = 4

    def scorer(self, inference: Inference, context: lobo_fx.Context) -> Scorer:
        """Each parameter that a leaf runs through adds its elements' scores; nothing is gathered before."""

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            parts = [member.along(leaf, member.weight.abs() ** self.power) for member in members]
            return torch.stack(parts).sum(0)

        return score
