"""XᵀX of the inputs of layers, over calibration data: what rounding a weight costs its layer's outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.layers import Layer
from lobo_fx.graph.operators import named_values
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.running import AS_IT_IS, Runner
from lobo_fx.passes.fitting.linear_problem import count_rows, draw, gram
from lobo_fx.terminal.quiet import quiet

__all__ = ["collect_grams", "gram_of", "shrink"]


def collect_grams(program: Program, layers: Iterable[Layer], context: Context) -> dict[fx.Node, torch.Tensor]:
    """The sums by layer's node, (groups, columns, columns); layers without rows of inputs have none.

    Raises:
        InvalidInput: a value is NaN or infinite.
    """
    found = [layer for layer in layers if layer.is_batched and not layer.kind.mirrored]
    return _Grams(program, found).collect(context) if found else {}


def gram_of(readers: Collection[fx.Node], grams: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The sum over all readers of a weight; None where one of them is no layer."""
    known = [grams[reader] for reader in readers if reader in grams]
    return torch.stack(known).sum(0) if known and len(known) == len(readers) else None


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
    # The share of the identity is 1 where the eigenvalues are as even as noise would make them, and goes to 0 as rows
    # grow or a few directions stand out.
    diagonal = gram.diagonal(dim1=1, dim2=2)
    squared_trace, square = diagonal.sum(1).square(), gram.square().sum((1, 2))
    share = (square + squared_trace) / ((rows + 1) * (square - squared_trace / columns))
    share = share.nan_to_num(1.0).clamp(0, 1)[:, None, None]
    return (1 - share) * gram + share * torch.diag_embed(diagonal.mean(1, keepdim=True).expand_as(diagonal))


class _Grams:
    """Sums over calibration data; linear layers that share an input share the sum.

    Args:
        program: to run.
        layers: whose inputs are summed over.
    """

    def __init__(self, program: Program, layers: Iterable[Layer]) -> None:
        self.program = program
        self.layers = {layer.node: layer for layer in layers}
        first: dict[object, fx.Node] = {}
        for layer in self.layers.values():
            first.setdefault(_shared_by(layer), layer.node)
        self.first = {node: first[_shared_by(layer)] for node, layer in self.layers.items()}
        self.sums: dict[fx.Node, torch.Tensor] = {}
        self.rows: dict[fx.Node, int] = {}
        self.generator = torch.Generator().manual_seed(0)

    def collect(self, context: Context) -> dict[fx.Node, torch.Tensor]:
        """The sums over all batches."""
        runner = Runner(self.program.module, instead=self._add)
        with quiet():
            for inputs in context.fitting_batches():
                runner(inputs)
        for node, total in self.sums.items():
            if not bool(total.isfinite().all()):
                raise InvalidInput(f"calibration data gives NaN or infinity at the input of {describe(node)}")
        shrunk = {node: shrink(total, self.rows[node]) for node, total in self.sums.items() if bool(total.any())}
        return {node: shrunk[first] for node, first in self.first.items() if first in shrunk}

    def _add(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes a layer, and adds the rows of its input to the sum."""
        if self.first.get(node) is not node:
            return AS_IT_IS
        layer = self.layers[node]
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        given = named_values(node, args, kwargs)
        window = given[layer.kind.weight].shape[2:] if layer.kind.convolves else ()
        chosen = draw(count_rows(layer, value), 1, self.generator)
        self.rows[node] = self.rows.get(node, 0) + len(chosen)
        self.sums[node] = self.sums.get(node, 0) + gram(layer, given[layer.kind.input], window, chosen)
        return value


def _shared_by(layer: Layer) -> object:
    """What layers with the same sum have in common: linear layers their input, others nothing but themselves."""
    plain = not layer.kind.convolves and layer.kind.group_dim is None
    return ("linear", layer.input) if plain else layer.node
