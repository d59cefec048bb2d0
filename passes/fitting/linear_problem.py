"""A layer as a linear problem: rows of inputs × weight = rows of outputs, and the sums that least squares needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from lobo_fx.graph.operators import CONVOLUTIONS, arguments

RIDGE = 1e-3
_ROWS = 65_536
"""Most rows of a problem; of more, as many are drawn at random."""


class Moments:
    """Sums that least squares of `y` (groups, rows, outputs) on `x` (groups, rows, inputs) needs."""

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = self.xx = self.xy = torch.zeros(())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows."""
        x, y = x.double(), y.double()
        self.count += x.shape[1]
        self.x, self.y = self.x + x.sum(1), self.y + y.sum(1)
        self.xx, self.xy = self.xx + x.mT @ x, self.xy + x.mT @ y

    @property
    def mean_x(self) -> torch.Tensor:
        return self.x / self.count

    @property
    def mean_y(self) -> torch.Tensor:
        return self.y / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Of the inputs with each other."""
        return self.xx / self.count - self.mean_x.unsqueeze(2) * self.mean_x.unsqueeze(1)

    @property
    def cross(self) -> torch.Tensor:
        """Covariance of the inputs with the outputs."""
        return self.xy / self.count - self.mean_x.unsqueeze(2) * self.mean_y.unsqueeze(1)

    def weight(self, start: torch.Tensor) -> torch.Tensor:
        """argmin_W ‖(y − ȳ) − (x − x̄)·Wᵀ‖² + λ·‖W − start‖², by the normal equations."""
        covariance = self.covariance
        energy = self.xx.diagonal(dim1=1, dim2=2).mean(1) / self.count
        scale = covariance.diagonal(dim1=1, dim2=2).mean(1).maximum(1e-9 * energy).clamp_min(1e-12)
        ridge = RIDGE * scale.view(-1, 1, 1) * torch.eye(covariance.shape[1], dtype=covariance.dtype)
        solved: torch.Tensor = torch.linalg.solve(covariance + ridge, self.cross + ridge @ start.mT)
        return solved.mT

    def bias(self, weight: torch.Tensor) -> torch.Tensor:
        """ȳ − W·x̄."""
        return self.mean_y - (weight @ self.mean_x.unsqueeze(2)).squeeze(2)


def channels(node: fx.Node) -> int:
    """The dimension of a layer's outputs."""
    return 1 if node.target in CONVOLUTIONS else -1


def is_batched(node: fx.Node, weight: torch.Tensor) -> bool:
    """Whether a convolution has a batch, which `input_rows` needs; true of products."""
    return node.target not in CONVOLUTIONS or bool(node.meta["val"].dim() == weight.dim())


def input_rows(node: fx.Node, value: torch.Tensor, kernel: Sequence[int], chosen: torch.Tensor) -> torch.Tensor:
    """Chosen rows of the input that are multiplied with the flattened weight.

    Args:
        node: a convolution, or a product with a weight.
        value: the layer's input, with a batch.
        kernel: of a convolution.
        chosen: indices among the rows of the layer's output.
    """
    if node.target not in CONVOLUTIONS:
        return value.reshape(-1, value.shape[-1])[chosen]
    given = arguments(node)
    rank = len(kernel)
    strides, dilations = _each(given["stride"], rank), _each(given["dilation"], rank)
    spans = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True)]
    patches = nn.functional.pad(value, _padding(given["padding"], spans))
    for dim, (span, stride, dilation) in enumerate(zip(spans, strides, dilations, strict=True), 2):
        patches = patches.unfold(dim, span, stride)[..., ::dilation]
    patches = patches.movedim(1, 1 + rank)
    places = torch.unravel_index(chosen, patches.shape[: 1 + rank])
    return patches[places].flatten(1)


def draw(count: int, batches: int, generator: torch.Generator) -> torch.Tensor:
    """Which of the rows of one of several batches are used."""
    return torch.randperm(count, generator=generator)[: max(1, _ROWS // batches)]


def _padding(padding: str | int | Sequence[int], spans: Sequence[int]) -> list[int]:
    """Zeros before and after, last dimension first."""
    if padding == "same":
        pairs = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    else:
        pairs = [(size, size) for size in _each(0 if isinstance(padding, str) else padding, len(spans))]
    return [size for pair in reversed(pairs) for size in pair]


def output_rows(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The output with its channels last, as rows."""
    return value.movedim(channels(node), -1).reshape(-1, value.shape[channels(node)])


def by_channel(value: torch.Tensor) -> torch.Tensor:
    """(channels, rows, 1), each channel a problem of its own."""
    return value.movedim(1, 0).flatten(1).unsqueeze(2).double()


def grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(groups, rows, columns of a group)."""
    return rows.view(len(rows), groups, -1).transpose(0, 1)


def gram(node: fx.Node, value: torch.Tensor, kernel: Sequence[int], chosen: torch.Tensor) -> torch.Tensor:
    """XᵀX of chosen rows of a layer's input: (groups, columns of a group, columns of a group)."""
    rows = grouped(input_rows(node, value, kernel, chosen), arguments(node).get("groups", 1))
    return rows.mT @ rows


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
