"""Fits every layer of a factorized network to the original layer's outputs, given the inputs that it really gets.

Least squares under a bound on the rank has a closed form (reduced-rank regression): of the best weight without the
bound, take the nearest weight of that rank, measured on the same inputs. So both factors are optimal at once.

Source: Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch

from lobo_fx.graph.layers import Layer, weight_uses
from lobo_fx.passes.fitting.gram import Gram
from lobo_fx.passes.fitting.held_out import Affine, HeldOut
from lobo_fx.passes.fitting.linear_problem import Moments, matrix_of
from lobo_fx.passes.low_rank.spectrum import spectrum
from lobo_fx.passes.pruning.layer_fitting import Fit

__all__ = ["LowRankFit"]


@dataclasses.dataclass
class LowRankFit(Fit):
    """Fits layers as after pruning, some of them under a bound on their rank.

    Attributes:
        ranks: bounds on the rank by name of the weight; the program comes with the nearest weights of these ranks by
            plain singular values.
        wholes: the same weights before their rank was lowered.
        fixed: names of weights that stay as they are.
    """

    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    wholes: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    fixed: Collection[str] = ()

    def _is_cut(self, node: torch.fx.Node) -> bool:
        return super()._is_cut(node) or any(use.read.target in self.ranks for use in weight_uses(node))

    def _why_fixed(self, layer: Layer) -> str | None:
        if layer.read is not None and layer.read.target in self.fixed:
            return "its zeros are to stay"
        return super()._why_fixed(layer)

    def _fit_weight(
        self, layer: Layer, start: torch.Tensor, moments: Moments, held_out: HeldOut, current: Affine
    ) -> tuple[Affine, float]:
        """The best of three on held-out rows: `current`; the whole weight and its fit, both cut to the lower rank."""
        assert layer.read is not None
        name = str(layer.read.target)
        if name not in self.ranks:
            return super()._fit_weight(layer, start, moments, held_out, current)
        whole = matrix_of(layer, self.wholes[name]).double()
        given = Affine(whole, moments.bias(whole))
        fitted, share = super()._fit_weight(layer, whole, moments, held_out, given)
        gram = Gram.of_moments(moments, centred=True).shrunk()
        best, moved, least = current, 0.0, held_out.error(current)
        for weight, way in ((whole, 0.0), (fitted.weight, share)):
            nearest = spectrum(weight[0], gram).nearest(self.ranks[name]).unsqueeze(0)
            found = Affine(nearest, moments.bias(nearest))
            if (error := held_out.error(found)) < least:
                best, moved, least = found, way, error
        return best, moved
