"""The members of a leaf: the parameters that it runs through. Lists the leaves that can be pruned."""

from __future__ import annotations

import dataclasses

import torch

from lobo_fx.axes.axis import Axis
from lobo_fx.axes.call import Axes
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.removal import project

__all__ = ["Member", "members"]


@dataclasses.dataclass(frozen=True)
class Member:
    """A dimension of a stored tensor that a leaf runs through.

    Attributes:
        name: dotted name of the parameter or buffer.
        tensor: its values.
        axes: the axes of the tensor.
        dim: the dimension that the leaf runs through.
    """

    name: str
    tensor: torch.Tensor
    axes: Axes
    dim: int

    @property
    def weight(self) -> torch.Tensor:
        """The values, detached from gradients."""
        return self.tensor.detach()

    def along(self, leaf: Axis, elements: torch.Tensor) -> torch.Tensor:
        """Sums scores of the tensor's elements into one score for each position of the leaf."""
        others = [dim for dim in range(elements.dim()) if dim != self.dim]
        summed = elements.sum(others) if others else elements
        return project(self.axes[self.dim], leaf, summed.double())


def members(inference: Inference) -> dict[Axis, list[Member]]:
    """Every unlocked leaf that runs through a stored tensor, with its members, in graph order."""
    found: dict[Axis, list[Member]] = {}
    seen: set[int] = set()
    for node in inference.program.graph.find_nodes(op="get_attr"):
        tensor = inference.program.parameter(node)
        if id(tensor) in seen or id(tensor) not in inference.stored:
            continue
        seen.add(id(tensor))
        axes = inference.stored[id(tensor)]
        for dim, axis in enumerate(axes):
            for leaf in dict.fromkeys(axis.leaves()):
                if not leaf.locks and leaf.size != 1:
                    found.setdefault(leaf, []).append(Member(str(node.target), tensor, axes, dim))
    return found
