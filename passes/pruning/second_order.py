"""Second-order selection: removes the inputs of a layer that its other inputs make up for at the least error.

Each position of an axis is a group of columns in the layers that read the axis. In each step, the positions go whose
columns the others replace best; then the remaining weights and the inverse Hessian are updated.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.members import members
from lobo_fx.axes.removal import positions
from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import Layer, layers
from lobo_fx.graph.program import Program
from lobo_fx.graph.randomness import seeded
from lobo_fx.graph.running import Runner, differentiated, kept_buffers
from lobo_fx.measures.fidelity import stacked, tensor_leaves, variation
from lobo_fx.passes.fitting.gram import Gram
from lobo_fx.passes.fitting.layer_grams import Role, collect_grams, in_parts
from lobo_fx.passes.fitting.linear_problem import matrix_of

__all__ = ["Elimination", "eliminations", "output_weights"]

_SHARE, _COARSE, _MANY = 16, 8, 128
"""One in `_SHARE` remaining positions goes in a step; one in `_COARSE` if the axis has more than `_MANY`."""
_WIDE = 1024
"""Matrices with more columns are kept in single precision."""
_TIMES = 8
"""Most rows of a batch, as a multiple of a layer's columns."""
_RIDGE = 1e-3
"""Ridge, as a share of the mean variance of the inputs: the least of those that refitting tries."""


@dataclasses.dataclass(frozen=True)
class Elimination:
    """The order in which positions of an axis are removed, and the error after each removal.

    Attributes:
        order: positions in order of removal.
        errors: (positions + 1,) error of the layers that read the axis, by number of removals, the rest refitted.
        halfway: how many positions were left when `weights` were recorded, about half of them.
        weights: by layer's node, its refitted weight at that time, as the call reads it, zero where positions are gone.
    """

    order: torch.Tensor
    errors: torch.Tensor
    halfway: int
    weights: Mapping[fx.Node, torch.Tensor]

    @property
    def scores(self) -> torch.Tensor:
        """The error that each position's removal added, never less than that of positions removed before it."""
        costs = self.errors.diff().cummax(0).values
        ties = torch.arange(len(costs), dtype=costs.dtype) * torch.finfo(costs.dtype).eps * costs[-1].clamp_min(1e-300)
        return torch.empty_like(costs).index_copy_(0, self.order, costs + ties)


@dataclasses.dataclass
class _Reader:
    """A layer that reads an axis, without the columns of removed positions.

    Attributes:
        layer: the layer.
        weight: (groups, outputs, columns), each output times the root of its count; the columns of the remaining
            positions come first, one position after the other, then the columns that are not of the axis.
        inverse: (groups, columns, columns), inverse of the damped covariance of the inputs.
        columns: indices of these columns in the whole matrix.
        each: number of columns of a position.
        counts: how much a squared error of each output counts, (groups, outputs, 1).
    """

    layer: Layer
    weight: torch.Tensor
    inverse: torch.Tensor
    columns: torch.Tensor
    each: int
    counts: torch.Tensor

    @property
    def refitted(self) -> torch.Tensor:
        """The weight as the call reads it, zero where positions are gone."""
        shape = self.layer.weight.meta["val"].shape
        matrix = self.weight / self.counts.sqrt().clamp_min(1e-30)
        whole = matrix.new_zeros(*matrix.shape[:2], shape.numel() // matrix[..., 0].numel())
        whole[:, :, self.columns] = matrix
        return (whole.mT if self.layer.kind.group_dim is not None else whole).reshape(shape).float()

    def costs(self, left: int) -> torch.Tensor:
        """The error that removing each remaining position adds: Σ W_p·(H⁻¹_pp)⁻¹·W_pᵀ."""
        groups, outputs, _ = self.weight.shape
        own = left * self.each
        blocks = self.inverse[:, :own, :own].view(groups, left, self.each, left, self.each)
        blocks = blocks.diagonal(dim1=1, dim2=3).movedim(3, 1)  # (groups, left, each, each)
        weights = self.weight[:, :, :own].view(groups, outputs, left, self.each).movedim(2, 1)
        squares = weights.mT @ weights  # (groups, left, each, each)
        costs: torch.Tensor = (torch.linalg.inv(blocks) * squares).sum((0, 2, 3))
        return costs.double()

    def leave_out(self, gone: torch.Tensor) -> float:
        """Removes positions and lets the others make up for them; returns the error that this adds."""
        chosen = (gone.unsqueeze(1) * self.each + torch.arange(self.each)).flatten()
        stays = torch.ones(self.weight.shape[2], dtype=torch.bool)
        stays[chosen] = False
        rest = stays.nonzero().flatten()
        across = self.inverse[:, chosen]
        block, weight = across[:, :, chosen], self.weight[:, :, chosen]
        replaced = torch.linalg.solve(block, across[:, :, rest])  # (groups, gone, rest)
        error = float((weight * torch.linalg.solve(block, weight.mT).mT).sum())
        self.weight = self.weight[:, :, rest] - weight @ replaced
        self.inverse = self.inverse[:, rest][:, :, rest] - across[:, :, rest].mT @ replaced
        self.columns = self.columns[rest]
        return error


def eliminations(
    inference: Inference,
    context: Context,
    weights: Mapping[fx.Node, torch.Tensor] | None = None,
    leaves: Iterable[Axis] | None = None,
) -> Iterator[tuple[Axis, Elimination | None]]:
    """The order of removal and its errors for each axis, None where no layer reads it; one axis after the other.

    The weights of all eliminations together may take more memory than the program: let go of one before the next.

    Args:
        inference: axes of the program.
        context: gives calibration data.
        weights: by layer's node, how much a squared error of each output counts, (outputs,), groups one after another;
            without them, errors are relative to the energy of the layer's outputs.
        leaves: the axes; None for every free one.

    Source: Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", 1992; the removal
        of groups with downdates: Kurtić et al., "ZipLM", 2023, and Meng et al., "OSSCAR", 2024.
    """
    program = inference.program
    roles = {
        layer: Role(layer.node, layer.read)
        for layer in layers(program.graph)
        if layer.read is not None and (layer.groups == 1 or layer.kind.group_dim is not None)
    }
    read_by: dict[Axis, list[Layer]] = defaultdict(list)
    for layer in roles:
        for leaf in dict.fromkeys(_axis_read(layer, inference).leaves()):
            read_by[leaf].append(layer)
    for part in in_parts(
        members(inference) if leaves is None else leaves, lambda leaf: [roles[layer] for layer in read_by[leaf]]
    ):
        needed = dict.fromkeys(roles[layer] for leaf in part for layer in read_by[leaf])
        grams = collect_grams(program, needed, context, centred=True, times=_TIMES)
        for leaf in part:
            seen = [layer for layer in read_by[leaf] if roles[layer] in grams]
            readers = [_reader(layer, grams[roles[layer]], leaf, inference, weights) for layer in seen]
            yield leaf, _eliminate(readers, leaf.size) if readers else None


def _axis_read(layer: Layer, inference: Inference) -> Axis:
    """The axis of a layer's inputs."""
    assert layer.read is not None
    return inference.stored[id(inference.program.parameter(layer.read))][layer.input_dim]


def _reader(
    layer: Layer, gram: Gram, leaf: Axis, inference: Inference, weights: Mapping[fx.Node, torch.Tensor] | None
) -> _Reader:
    """A layer as a reader of an axis."""
    assert layer.read is not None
    parameter = inference.program.parameter(layer.read)
    places, whose = positions(_axis_read(layer, inference), leaf)
    window = parameter.shape[2:].numel() if layer.kind.convolves else 1
    order = sorted(range(len(places)), key=lambda at: (whose[at], places[at]))
    own = torch.tensor([places[at] for at in order]).view(leaf.size, -1, 1) * window + torch.arange(window)
    each = own[0].numel()
    matrix = matrix_of(layer, parameter.detach()).double()
    moments = gram.shrunk()
    sums = (moments.sums + moments.ridge.view(-1, 1, 1) * torch.eye(matrix.shape[2]).double()) / moments.count
    scale = sums.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    damped = sums + _RIDGE * scale.view(-1, 1, 1) * torch.eye(matrix.shape[2], dtype=torch.double)
    if weights is None or layer.node not in weights:
        counts = 1 / ((matrix @ sums) * matrix).sum((1, 2)).clamp_min(1e-300).view(-1, 1, 1)
    else:
        counts = weights[layer.node].double().view(len(matrix), -1, 1)
    stays = torch.ones(matrix.shape[2], dtype=torch.bool)
    stays[own.flatten()] = False
    columns = torch.cat([own.flatten(), stays.nonzero().flatten()])
    precise = torch.double if len(columns) <= _WIDE else torch.float
    inverse = torch.linalg.inv(damped)[:, columns][:, :, columns].to(precise)
    counts = counts.expand(len(matrix), matrix.shape[1], 1)
    weight = (matrix * counts.sqrt())[:, :, columns]
    return _Reader(layer, weight.to(precise), inverse, columns, each, counts.to(precise))


def _eliminate(readers: Sequence[_Reader], size: int) -> Elimination:
    """Removes positions until one is left."""
    left, order, errors = torch.arange(size), list[int](), [0.0]
    halfway, weights = size, dict[fx.Node, torch.Tensor]()

    def costs() -> torch.Tensor:
        return sum((reader.costs(len(left)) for reader in readers), start=torch.zeros(len(left), dtype=torch.double))

    while len(left) > 1:
        if 2 * len(left) <= size + 1 and not weights:
            halfway, weights = len(left), {reader.layer.node: reader.refitted for reader in readers}
        count = max(1, len(left) // (_COARSE if size > _MANY else _SHARE))
        ranked = costs().argsort(stable=True)
        gone, stays = ranked[:count], ranked[count:].sort().values
        added = max(0.0, sum(reader.leave_out(gone) for reader in readers))
        errors += [errors[-1] + added * (at + 1) / count for at in range(count)]
        order += left[gone].tolist()
        left = left[stays]
    if not weights:
        halfway, weights = len(left), {reader.layer.node: reader.refitted for reader in readers}
    errors.append(errors[-1] + max(0.0, float(costs())))
    return Elimination(torch.tensor([*order, *left.tolist()]), torch.tensor(errors).double(), halfway, weights)


def output_weights(program: Program, context: Context, probes: int = 2) -> dict[fx.Node, torch.Tensor]:
    """How much noise a squared error of each output of a layer causes at the program's outputs, to first order.

    Hutchinson's estimate: the squares of Jᵀv for random v, summed over places, estimate the energies of the columns of
    the Jacobian J. Noise is relative to the variance of the program's outputs. The key is a layer's node; layers that
    get no gradient from a floating-point output are left out.

    Args:
        program: the program to run.
        context: gives calibration data, of which the held-out rows are taken.
        probes: random vectors for each batch.
    """
    chosen = {layer.node: layer for layer in layers(program.graph)}
    sums: dict[fx.Node, torch.Tensor] = {}
    found: dict[fx.Node, torch.Tensor] = {}
    given: list[list[torch.Tensor]] = []

    def see(node: fx.Node, value: torch.Tensor) -> None:
        if node in chosen and value.requires_grad:
            found[node] = value

    generator = context.generator()
    with differentiated(program.module):
        for inputs in context.held_out_batches():
            found.clear()
            with torch.enable_grad(), kept_buffers(program.module), seeded(program.module):
                outputs = tensor_leaves(Runner(program.module, see).run(*inputs.leaves, enable_io_processing=False))
            outputs = [y for y in outputs if y.requires_grad]
            given.append([y.detach() for y in outputs])
            nodes = list(found)
            for _ in range(probes if nodes and outputs else 0):
                vectors = [torch.randn(y.shape, generator=generator) for y in outputs]
                values = [found[node] for node in nodes]
                gradients = torch.autograd.grad(outputs, values, vectors, retain_graph=True, allow_unused=True)
                for node, gradient in zip(nodes, gradients, strict=True):
                    if gradient is not None:
                        kind = chosen[node].kind
                        own = {kind.channel_dim % gradient.dim(), *((0,) if kind.group_dim is not None else ())}
                        others = [dim for dim in range(gradient.dim()) if dim not in own]
                        energy = gradient.double().nan_to_num(0, 0, 0).square().sum(others)
                        sums[node] = sums.get(node, torch.zeros(())) + energy.flatten()
    signal = variation([stacked(parts) for parts in zip(*given, strict=True)])
    return {node: total / (probes * signal) for node, total in sums.items()}
