"""The members of a leaf: the parameters that it runs through. Lists the leaves that can be pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from lobo_fx.axes.axis import Axis
from lobo_fx.axes.call import Axes
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.kept import names_of_tensors
from lobo_fx.axes.removal import project

__all__ = ["Member", "members", "parameters"]


@dataclasses.dataclass(frozen=True)
class Member:
    """A dimension of a stored tensor that a leaf runs through.

    Attributes:
        name: dotted name of the parameter or buffer.
        tensor: its values.
        axes: the axes of the tensor.
        dim: the dimension that the leaf runs through.
        names: all names of the tensor, which may be tied.
    """

    name: str
    tensor: torch.Tensor
    axes: Axes
    dim: int
    names: tuple[str, ...] = ()

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
    """Every unlocked leaf that runs through a parameter, with its members, buffers too, in graph order.

    Leaves of buffers alone (the bins of a spectrogram's filters) are as the user made them: nothing tells which
    positions matter.
    """
    found: dict[Axis, list[Member]] = {}
    seen: set[int] = set()
    names = names_of_tensors(inference.program.module)
    for node in inference.program.graph.find_nodes(op="get_attr"):
        tensor = inference.program.parameter(node)
        if id(tensor) in seen or id(tensor) not in inference.stored:
            continue
        seen.add(id(tensor))
        axes, name = inference.stored[id(tensor)], str(node.target)
        aliases = tuple(names.get(id(tensor), (name,)))
        for dim, axis in enumerate(axes):
            for leaf in dict.fromkeys(axis.leaves()):
                if not leaf.locks and leaf.size != 1:
                    found.setdefault(leaf, []).append(Member(name, tensor, axes, dim, aliases))
    return {leaf: through for leaf, through in found.items() if parameters(through)}


def parameters(found: Sequence[Member]) -> list[Member]:
    """The members that are parameters, by which importance is scored; buffers are only cut with them."""
    return [member for member in found if isinstance(member.tensor, nn.Parameter)]
