"""Finds values that one scale would drown: inputs of a concatenation, or channels of an output, far below the others.

A concatenation of boxes in pixels and of scores below one has one scale; rounded to it, every score is zero, while the
whole keeps a high signal-to-noise ratio. Inside a network the next layer may hardly notice, so only concatenations and
values that leave the network are checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import layer_of
from lobo_fx.graph.operators import VALUE_PRESERVING, aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import module_name
from lobo_fx.graph.running import watch
from lobo_fx.measures.fidelity import decibels
from lobo_fx.passes.quantization.integers.kernels import KernelTable
from lobo_fx.passes.quantization.integers.simulation import first_batches

__all__ = ["DECIBELS", "drowned"]

DECIBELS = 20.0
"""Signal-to-noise ratio that every part must keep at the shared scale: noise of a tenth of its size."""
_STEPS = 255
_MIXING = (aten.matmul.default, aten.bmm.default, aten.permute.default, aten.transpose.int)
"""Operators after which channels lie elsewhere, or nowhere."""


def drowned(program: Program, able: Iterable[str], table: KernelTable, context: Context) -> Mapping[str, str]:
    """Operators that are to stay float, since their one scale would drown a part: the reason by name of the node.

    Args:
        program: the program in float.
        able: names of the nodes that could run as integers.
        table: the integer kernels.
        context: gives calibration data, of which the first batches are measured.
    """
    names = set(able)
    nodes = [node for node in program.graph.nodes if node.name in names and table.gives_integers(node)]
    joins = [node for node in nodes if is_call(node, aten.cat.default)]
    last = [node for node in nodes if node not in joins and _leaves(table.end(node))]
    if not joins and not last:
        return {}
    sums: dict[fx.Node, _Parts] = {}
    for join in joins:
        sums |= {source: _Parts(None) for source in join.all_input_nodes}
    for node in last:
        sums[table.end(node)] = _Parts(_channel_dim(table.end(node)))
    watch(program.module, first_batches(context), {node: parts.add for node, parts in sums.items()})
    found: dict[str, str] = {}
    for node in nodes:
        ends = node.all_input_nodes if node in joins else [table.end(node)]
        if not all(end in sums and sums[end].count for end in ends):
            continue
        low, high = min(0.0, *(sums[end].low for end in ends)), max(0.0, *(sums[end].high for end in ends))
        noise = ((high - low) / _STEPS) ** 2 / 12
        for end in ends:
            worst = sums[end].least_energy
            if worst > 0 and decibels(worst, noise) < DECIBELS:
                part = f"what '{module_name(end) or end.name}' gives" if node in joins else "a channel of the output"
                found[node.name] = (
                    f"one scale would leave {part}, of size {math.sqrt(worst):.2g} in a range of {high - low:.2g}, "
                    f"{decibels(worst, noise):.0f} dB"
                )
                break
    return found


def _leaves(node: fx.Node) -> bool:
    """Whether a value reaches the outputs as it is, or through operators that read nothing else and keep its shape."""

    def alone(user: fx.Node) -> bool:
        shapes = [str(value.shape) for made in (user, node) if isinstance(value := made.meta["val"], torch.Tensor)]
        return len(user.all_input_nodes) == 1 and len(shapes) == 2 and shapes[0] == shapes[1]

    return any(
        user.op == "output" or ((is_call(user, *VALUE_PRESERVING) or alone(user)) and _leaves(user))
        for user in node.users
    )


def _channel_dim(node: fx.Node) -> int | None:
    """The dimension in which the channels of a value lie, by the layer that it comes from; None if none is met."""
    while (layer := layer_of(node)) is None:
        inputs = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]
        alike = [source for source in inputs if source.meta["val"].dim() == node.meta["val"].dim()]
        if node.op != "call_function" or not alike or is_call(node, *_MIXING):
            return None
        node = alike[0]
    return layer.kind.channel_dim


class _Parts:
    """Range and energy of a value: of each channel, which lie in a dimension, or of the whole without one."""

    def __init__(self, channel_dim: int | None) -> None:
        self.channel_dim = channel_dim
        self.low = self.high = 0.0
        self.count = 0
        self.energy = torch.zeros(())

    def add(self, value: torch.Tensor) -> None:
        """Adds the value of one batch."""
        if not value.numel():
            return
        self.low, self.high = min(self.low, float(value.min())), max(self.high, float(value.max()))
        squares = value.double().square()
        channels = None if self.channel_dim is None else self.channel_dim % value.dim()
        mean = squares.mean([dim for dim in range(value.dim()) if dim != channels])
        self.energy = (self.energy * self.count + mean) / (self.count + 1)
        self.count += 1

    @property
    def least_energy(self) -> float:
        """Mean square of the smallest channel that is not zero throughout."""
        alive = self.energy.flatten()
        alive = alive[alive > 0]
        return float(alive.min()) if len(alive) else 0.0
