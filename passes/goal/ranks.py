"""Ranks as axes: a large layer gets one more axis, the rank of its weight, whose full size leaves the weight whole.

So a solver of widths chooses ranks too. The loss of a rank has the same form as that of a width: the directions of a
layer's outputs with the least energy go first, and one run of the network with the layer at half its rank gives the
effect at the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.axis import same
from lobo_fx.axes.removal import size_with
from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import Layer
from lobo_fx.graph.program import Program
from lobo_fx.passes.fitting.linear_problem import put_matrix
from lobo_fx.passes.low_rank.candidates import Candidate, find_candidates, spectra
from lobo_fx.passes.low_rank.ranks import Shape
from lobo_fx.passes.pruning.second_order import Elimination
from lobo_fx.passes.pruning.widths import Widths

__all__ = ["RankAxis", "chosen_ranks", "find_ranks", "nodes_of", "rank_eliminations"]


@dataclasses.dataclass(frozen=True)
class RankAxis:
    """The rank of a weight as an axis.

    Attributes:
        leaf: the axis of the rank, with as many positions as the weight's full rank.
        candidate: the weight.
        outputs: axis of its rows.
        inputs: axis of its columns.
    """

    leaf: Axis
    candidate: Candidate
    outputs: Axis
    inputs: Axis

    def lowered(self, widths: Mapping[Axis, int]) -> int | None:
        """The rank, if two layers of that rank are smaller than one layer of these widths; else None."""
        rank, shape = widths[self.leaf], Shape(size_with(self.outputs, widths), size_with(self.inputs, widths))
        return rank if rank <= shape.highest else None


def find_ranks(inference: Inference, context: Context, large: Collection[str]) -> list[RankAxis]:
    """The weights that may be of a lower rank.

    Args:
        inference: axes of the program.
        context: takes no notes here.
        large: names of the nodes of layers that are large enough to become two.
    """
    found = []
    for one in find_candidates(inference.program, dataclasses.replace(context, notes=[])):
        layer = one.layers[0]
        axes = inference.stored[id(one.weight)]
        outputs, inputs = axes[layer.output_dim].find(), axes[layer.input_dim].find()
        if all(layer.node.name in large for layer in one.layers) and not same(outputs, inputs):
            found.append(RankAxis(Axis(one.shape.full), one, outputs, inputs))
    return found


def rank_eliminations(
    program: Program, ranks: Sequence[RankAxis], context: Context
) -> Iterator[tuple[Axis, Elimination]]:
    """Eliminations of the directions of layers' outputs, each with the leaf of its rank, one after the other."""
    leaves = {rank.candidate.name: rank.leaf for rank in ranks}
    for one, spectrum in spectra(program, [rank.candidate for rank in ranks], context):
        halfway = max(1, spectrum.full // 2)
        weights = {layer.node: _as_read(layer, one.weight, spectrum.nearest(halfway)) for layer in one.layers}
        last_first = torch.arange(spectrum.full - 1, -1, -1)
        yield leaves[one.name], Elimination(last_first, spectrum.errors.flip(0), halfway, weights)


def chosen_ranks(ranks: Iterable[RankAxis], widths: Widths) -> dict[str, int]:
    """The ranks of weights that get a lower one, by the weight's name."""
    found = {rank.candidate.name: rank.lowered(widths) for rank in ranks}
    return {name: rank for name, rank in found.items() if rank is not None}


def _as_read(layer: Layer, weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (outputs, inputs) in the shape of the weight that the layer's operator is given."""
    made = torch.empty_like(weight.detach())
    put_matrix(layer, made, matrix.unsqueeze(0).to(made.dtype))
    return made.T if layer.swapped else made


def nodes_of(ranks: Iterable[RankAxis]) -> dict[fx.Node, RankAxis]:
    """The rank axis of each layer, by the layer's node."""
    return {layer.node: rank for rank in ranks for layer in rank.candidate.layers}
