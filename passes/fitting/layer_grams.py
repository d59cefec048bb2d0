"""XᵀX of the inputs of layers, over calibration data: what rounding a weight costs its layer's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.operators import CONVOLUTIONS, arguments, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.passes.fitting.linear_problem import channels, draw, gram, is_batched
from lobo_fx.passes.quantization.codes.weights import Weight, as_product
from lobo_fx.terminal.quiet import quiet


def collect_grams(program: Program, weights: Iterable[Weight], context: Context) -> dict[fx.Node, torch.Tensor]:
    """The sums by layer, `[groups, columns, columns]`, for the products and convolutions that read the weights.

    Raises:
        InvalidInput: a value is NaN or infinite.
    """
    layers: dict[fx.Node, fx.Node] = {}
    kernels: dict[fx.Node, torch.Size] = {}
    for weight in weights:
        for reader in weight.readers:
            if (product := as_product(reader, weight)) is not None:
                layers[reader] = product.x
            elif is_call(reader, *CONVOLUTIONS) and is_batched(reader, weight.tensor):
                layers[reader] = arguments(reader)["input"]
                kernels[reader] = weight.tensor.shape[2:]
    return _Grams(program, layers, kernels).collect(context) if layers else {}


def gram_of(weight: Weight, grams: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The sum over all readers of a weight; None where one of them is neither product nor convolution."""
    known = [grams[reader] for reader in weight.readers if reader in grams]
    return torch.stack(known).sum(0) if known and len(known) == len(weight.readers) else None


def shrink(gram: torch.Tensor, rows: int) -> torch.Tensor:
    """XᵀX drawn towards a multiple of the identity, the more the fewer rows it was summed over.

    Rounding that serves four rows alone would do worse than nearest on all others.

    Args:
        gram: groups × columns × columns.
        rows: of X.

    Source: Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", 2010: OAS,
        without its terms that vanish with many columns.
    """
    columns = gram.shape[-1]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    squared_trace, square = diagonal.sum(1).square(), gram.square().sum((1, 2))
    share = (square + squared_trace) / ((rows + 1) * (square - squared_trace / columns))
    share = share.nan_to_num(1.0).clamp(0, 1)[:, None, None]
    return (1 - share) * gram + share * torch.diag_embed(diagonal.mean(1, keepdim=True).expand_as(diagonal))


class _Grams(fx.Interpreter):
    """Runs calibration data; products that share an input share the sum.

    Args:
        program: to run.
        layers: each with its input.
        kernels: of those that are convolutions.
    """

    def __init__(self, program: Program, layers: dict[fx.Node, fx.Node], kernels: dict[fx.Node, torch.Size]) -> None:
        super().__init__(program.module)
        self.layers, self.kernels = layers, kernels
        first: dict[fx.Node, fx.Node] = {}
        for layer, source in layers.items():
            first.setdefault(layer if layer in kernels else source, layer)
        self.first = {layer: first[layer if layer in kernels else source] for layer, source in layers.items()}
        self.sums: dict[fx.Node, torch.Tensor] = {}
        self.rows: dict[fx.Node, int] = {}
        self.generator = torch.Generator().manual_seed(0)

    def collect(self, context: Context) -> dict[fx.Node, torch.Tensor]:
        """The sums over all batches."""
        with torch.no_grad(), quiet():
            for inputs in context.calibration_batches():
                self.run(*inputs.leaves, enable_io_processing=False)
        for layer, total in self.sums.items():
            if not bool(total.isfinite().all()):
                raise InvalidInput(f"calibration data gives NaN or infinity at the input of {describe(layer)}")
        shrunk = {layer: shrink(total, self.rows[layer]) for layer, total in self.sums.items() if bool(total.any())}
        return {layer: shrunk[first] for layer, first in self.first.items() if first in shrunk}

    def run_node(self, n: fx.Node) -> Any:
        if self.first.get(n) is not n:
            return super().run_node(n)
        x = self.env[self.layers[n]].detach()  # let go once it was read for the last time
        value = super().run_node(n)
        chosen = draw(value.numel() // value.shape[channels(n)], 1, self.generator)
        self.rows[n] = self.rows.get(n, 0) + len(chosen)
        self.sums[n] = self.sums.get(n, 0) + gram(n, x, self.kernels.get(n, torch.Size()), chosen)
        return value
