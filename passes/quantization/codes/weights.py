"""Finds the weights that can be stored as codes, and their readers, and notes why others can't be stored so."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx, nn

from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import LOOKUPS, is_constant, layer_of
from lobo_fx.graph.operators import RECURRENT, arguments, aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import source_line
from lobo_fx.graph.rewriting import call
from lobo_fx.graph.wording import phrase

__all__ = ["Product", "Weight", "as_product", "find_weights"]

_TABLES = frozenset({aten.add.Tensor})
"""Operators that read a table which is no operator's weight: learned positions, added to activations."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of at least two dimensions that only layers, lookups, or sums with activations read.

    Codes are a matrix whose rows are outputs: a scale belongs to a row, or to a block of neighbours in it.

    Attributes:
        names: names that the parameter is registered under; several if it is tied.
        tensor: the parameter.
        reads: the parameter's `get_attr` nodes.
        readers: the calls that read it, directly or through its mask.
        order: the parameter's dimensions in the order of rows and columns: outputs before inputs.
        row_dims: how many of these make up the rows.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    reads: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    order: tuple[int, ...]
    row_dims: int

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> list[int]:
        """Shape of the stored weight: rows first; the window of a convolution keeps its dimensions."""
        sizes = [self.tensor.shape[dim] for dim in self.order]
        return [math.prod(sizes[: self.row_dims]), *sizes[self.row_dims :]]

    @property
    def matrix(self) -> torch.Tensor:
        """The values: (rows, columns)."""
        return self.tensor.detach().permute(self.order).reshape(self.shape[0], -1)

    def put(self, matrix: torch.Tensor) -> None:
        """Writes a matrix, shaped as `matrix` is, into the parameter."""
        sizes = [self.tensor.shape[dim] for dim in self.order]
        with torch.no_grad():
            self.tensor.copy_(matrix.reshape(sizes).permute(self._back))

    def restored(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """Gives the stored weight the parameter's shape, by calls at the graph's insertion point."""
        sizes = [self.tensor.shape[dim] for dim in self.order]
        if self.shape != sizes:
            value = call(graph, aten.view.default, value, sizes)
        if self._back != sorted(self._back):
            value = call(graph, aten.permute.default, value, self._back)
        return value

    @property
    def _back(self) -> list[int]:
        return sorted(range(len(self.order)), key=lambda at: self.order[at])


def find_weights(program: Program, context: Context) -> list[Weight]:
    """Returns the weights that can be codes, in graph order; notes every other parameter of two or more dimensions."""
    module, found = program.module, []
    reads: dict[int, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        if isinstance(tensor := program.parameter(node), nn.Parameter) and tensor.dim() > 1 and tensor.numel():
            reads.setdefault(id(tensor), []).append(node)
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for key, nodes in reads.items():
        tensor = program.parameter(nodes[0])
        if (reason := _why_not(tensor, nodes)) is not None:
            context.note(f"is left alone: {reason}", parameter=names[key][0])
        else:
            found.append(_weight(tuple(names[key]), tensor, nodes))
    return found


def _why_not(tensor: torch.Tensor, reads: list[fx.Node]) -> str | None:
    """The reason why a parameter can't be stored as codes; None if it can."""
    users = [(user, read) for read in reads for user in read.users]
    if not users:
        return "nothing reads it"
    if tensor.dtype != torch.float32:
        return f"it is {str(tensor.dtype).removeprefix('torch.')}, not float32"
    other = next((user for user, read in users if not _is_weight_of(user, read)), None)
    if other is None:
        return None
    alone = not any(_is_weight_of(user, read) for user, read in users)
    # without its module, which the parameter's name tells, so that notes of alike layers become one
    reader = phrase(str(other.target), "", source_line(other))
    return ("it is an output" if other.op == "output" else f"{reader} reads it") + ("" if alone else " too")


def _is_weight_of(user: fx.Node, read: fx.Node) -> bool:
    """Whether `user` reads a parameter as its weight, through swapped dimensions too, or as a table that it adds."""
    if is_call(user, *RECURRENT):
        return read in arguments(user)["params"]
    if (layer := layer_of(user)) is not None:
        return layer.weight is read and read not in (layer.input, layer.bias)
    if is_call(user, *LOOKUPS):
        return arguments(user)["weight"] is read
    if user.target in _TABLES:
        return sum(size > 1 for size in read.meta["val"].shape) > 1 and not is_constant(
            user
        )  # a sum of parameters is itself a weight
    swaps = [layer for reader in user.users if (layer := layer_of(reader)) is not None and layer.weight is user]
    return bool(swaps) and len(swaps) == len(user.users) and all(layer.read is read for layer in swaps)


def _weight(names: tuple[str, ...], tensor: torch.Tensor, reads: list[fx.Node]) -> Weight:
    readers = tuple(user for read in reads for user in read.users)
    found = [layer for reader in readers if (layer := layer_of(reader)) is not None and not layer.swapped]
    order, row_dims = tuple(range(tensor.dim())), 1
    if found and all(layer.kind.group_dim is not None for layer in found) and len(found) == len(readers):
        order, row_dims = (0, 2, 1), 2  # a matrix per group, stored as (groups, inputs, outputs)
    elif all(reader.target in _TABLES for reader in readers):
        row_dims = next(dim for dim, size in enumerate(tensor.shape) if size > 1) + 1
    return Weight(names, tensor, tuple(reads), readers, order, row_dims)


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear layer that reads a weight as its rows and columns are stored, and adds a bias or nothing."""

    x: fx.Node
    bias: fx.Node | None


def as_product(node: fx.Node, weight: Weight) -> Product | None:
    """`node` as `linear(x, W, bias)` of rows of float32; None where it is something else."""
    layer = layer_of(node)  # asked anew: surgery on other weights may have changed what it reads
    if layer is None or layer.read not in weight.reads or layer.swapped:
        return None
    if layer.kind.convolves or layer.kind.group_dim is not None:
        return None
    fits = layer.is_batched and layer.input.meta["val"].dtype == torch.float32
    return Product(layer.input, layer.bias) if fits else None
