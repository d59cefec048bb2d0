"""A layer as a linear problem: rows of inputs × weight = rows of outputs, and the sums that least squares needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx, nn

from lobo_fx.graph.layers import Layer
from lobo_fx.graph.operators import arguments

__all__ = [
    "Means",
    "Moments",
    "by_channel",
    "count_rows",
    "draw",
    "input_rows",
    "matrix_of",
    "output_rows",
    "put_matrix",
]

_ROWS = 65_536
"""Most rows of a problem, drawn at random: with all rows, XᵀX of a convolution over images would take seconds."""


class Means:
    """Sums from which the bias of a layer follows, for `x` (groups, rows, inputs) and `y` (groups, rows, outputs)."""

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = torch.zeros(())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows."""
        self.count += x.shape[1]
        self.x, self.y = self.x + x.sum(1, dtype=torch.double), self.y + y.sum(1, dtype=torch.double)

    @property
    def mean_x(self) -> torch.Tensor:
        return self.x / self.count

    @property
    def mean_y(self) -> torch.Tensor:
        return self.y / self.count

    def bias(self, weight: torch.Tensor) -> torch.Tensor:
        """ȳ − W·x̄."""
        return self.mean_y - (weight @ self.mean_x.unsqueeze(2)).squeeze(2)


class Moments(Means):
    """What least squares of `y` (groups, rows, outputs) on `x` (groups, rows, inputs) needs.

    It keeps the rows while they are fewer than the inputs, then the sums of their products: the smaller of the two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.xx = self.xy = torch.zeros(())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows."""
        super().add(x, y)
        self.rows.append((x.double(), y.double()))
        if self.count >= x.shape[2]:
            for kept_x, kept_y in self.rows:
                self.xx, self.xy = self.xx + kept_x.mT @ kept_x, self.xy + kept_x.mT @ kept_y
            self.rows.clear()

    @property
    def covariance(self) -> torch.Tensor:
        """Covariance of the inputs, if there are at least as many rows as inputs."""
        return self.xx / self.count - self.mean_x.unsqueeze(2) * self.mean_x.unsqueeze(1)

    @property
    def cross(self) -> torch.Tensor:
        """Covariance of inputs and outputs, if there are at least as many rows as inputs."""
        return self.xy / self.count - self.mean_x.unsqueeze(2) * self.mean_y.unsqueeze(1)

    def _centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows less their means, over √count: their products are covariances."""
        x, y = (torch.cat(parts, 1) for parts in zip(*self.rows, strict=True))
        root = math.sqrt(self.count)
        return (x - self.mean_x.unsqueeze(1)) / root, (y - self.mean_y.unsqueeze(1)) / root

    def weight(self, start: torch.Tensor, ridge: float) -> torch.Tensor:
        """argmin_W ‖(y − ȳ) − (x − x̄)·Wᵀ‖² + λ·‖W − start‖², by the normal equations.

        With fewer rows than inputs, the dual is solved: a combination of rows that is added to the start.

        Args:
            start: (groups, outputs, inputs).
            ridge: λ as a share of the mean variance of the inputs.
        """
        if not self.rows:
            covariance = self.covariance  # (groups, inputs, inputs)
            added = self._ridge(covariance.diagonal(dim1=1, dim2=2), self.xx.diagonal(dim1=1, dim2=2), ridge)
            root = torch.linalg.cholesky(covariance + added * torch.eye(covariance.shape[1], dtype=covariance.dtype))
            return torch.cholesky_solve(self.cross + added * start.mT, root).mT
        x, y = self._centred()  # (groups, rows, inputs), (groups, rows, outputs)
        variance = x.square().sum(1)
        added = self._ridge(variance, self.count * (variance + self.mean_x.square()), ridge)
        root = torch.linalg.cholesky(x @ x.mT + added * torch.eye(x.shape[1], dtype=x.dtype))
        return start + torch.cholesky_solve(y - x @ start.mT, root).mT @ x

    def _ridge(self, variance: torch.Tensor, squares: torch.Tensor, share: float) -> torch.Tensor:
        """λ of each group, from the variances of the inputs and the sums of their squares, both (groups, inputs)."""
        # Inputs that hardly vary have next to no variance of their own to scale the ridge by; their energy bounds it.
        scale = variance.mean(1).maximum(1e-9 * squares.mean(1) / self.count)
        scale = torch.where(scale > 0, scale, 1.0)  # if all inputs are zero, any scale does
        return share * scale.view(-1, 1, 1)

    def gain(self, weight: torch.Tensor) -> torch.Tensor:
        """Factors in [0, 1], (groups, outputs), that bring the outputs of a weight nearest to the targets."""
        if self.rows:
            x, y = self._centred()
            given = x @ weight.mT
            product, square = (given * y).sum(1), given.square().sum(1)
        else:
            product = (weight * self.cross.mT).sum(2)
            square = ((weight @ self.covariance) * weight).sum(2)
        return torch.where(square > 0, product / square, 1.0).clamp(0.0, 1.0)


def matrix_of(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """The stored weight as the problem has it: (groups, outputs of a group, columns)."""
    if layer.kind.group_dim is not None:
        return weight.mT  # stored as (groups, inputs, outputs)
    rows = weight.T if layer.swapped else weight
    return rows.reshape(layer.groups, len(rows) // layer.groups, -1)


def put_matrix(layer: Layer, weight: torch.Tensor, matrix: torch.Tensor) -> None:
    """Writes a solution, shaped as `matrix_of` gives it, into the stored weight."""
    if layer.kind.group_dim is not None:
        weight.copy_(matrix.mT)
    else:
        rows = matrix.flatten(0, 1)
        weight.copy_(rows.T if layer.swapped else rows.reshape(weight.shape))


def count_rows(layer: Layer, output: torch.Tensor) -> int:
    """How many rows a layer's output has: places of a convolution, else all dimensions but the last (and groups)."""
    columns = output.shape[layer.kind.channel_dim]
    return output.numel() // (columns * (layer.groups if layer.kind.group_dim is not None else 1))


def input_rows(layer: Layer, value: torch.Tensor, window: Sequence[int], chosen: torch.Tensor) -> torch.Tensor:
    """Chosen rows of the input that are multiplied with the matrix: (groups, rows, columns).

    Args:
        layer: a convolution, a linear layer, or a product with a matrix per group.
        value: the layer's input, with a batch.
        window: sizes of a convolution's weight along space; empty for other layers.
        chosen: indices among the rows of the layer's output.
    """
    if layer.kind.group_dim is not None:
        return value[:, chosen]
    rows = _windows(layer.node, value, window, chosen) if layer.kind.convolves else _flat(value)[chosen]
    return rows.view(len(rows), layer.groups, -1).transpose(0, 1)


def output_rows(layer: Layer, value: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Chosen rows of the output: (groups, rows, outputs of a group)."""
    if layer.kind.group_dim is not None:
        return value[:, chosen]
    rows = _flat(value.movedim(layer.kind.channel_dim, -1))[chosen]
    return rows.view(len(rows), layer.groups, -1).transpose(0, 1)


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1])


def _windows(node: fx.Node, value: torch.Tensor, window: Sequence[int], chosen: torch.Tensor) -> torch.Tensor:
    """The inputs under a convolution's window at chosen places: (places, channels × window), channels first."""
    given = arguments(node)
    rank = len(window)
    strides, dilations = _each(given["stride"], rank), _each(given["dilation"], rank)
    spans = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, window, strict=True)]
    patches = nn.functional.pad(value, _padding(given["padding"], spans))  # (rows, channels, space …)
    for dim, (span, stride, dilation) in enumerate(zip(spans, strides, dilations, strict=True), 2):
        patches = patches.unfold(dim, span, stride)[..., ::dilation]  # a view: nothing is copied until places are taken
    patches = patches.movedim(1, 1 + rank)  # (rows, places …, channels, window …)
    places = torch.unravel_index(chosen, patches.shape[: 1 + rank])
    return patches[places].flatten(1)


def draw(count: int, batches: int, generator: torch.Generator, most: int | None = None) -> torch.Tensor:
    """Draws row indices of one batch, so that all `batches` together give at most `most` rows (by default 65,536)."""
    return torch.randperm(count, generator=generator)[: max(1, (_ROWS if most is None else most) // batches)]


def _padding(padding: str | int | Sequence[int], spans: Sequence[int]) -> list[int]:
    """Zeros before and after each dimension, the last dimension first, as `pad` takes them."""
    if padding == "same":
        pairs = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    else:
        pairs = [(size, size) for size in _each(0 if isinstance(padding, str) else padding, len(spans))]
    return [size for pair in reversed(pairs) for size in pair]


def by_channel(value: torch.Tensor) -> torch.Tensor:
    """(channels, rows, 1), each channel a problem of its own."""
    return value.movedim(1, 0).flatten(1).unsqueeze(2).double()


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
