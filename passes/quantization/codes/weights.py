"""Weights as codes in a graph: which can be stored so, who reads them, and the surgery that puts codes in their place.

Codes keep the parameter's name; scales and zero points stand beside it under `_scale` and `_zero_point`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import fx, nn

from lobo_fx.contracts.context import Context
from lobo_fx.graph.operators import CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS, arguments, aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.tensors import fetch

# Products with a weight: the argument that is it, and whether it is stored as inputs × outputs.
PRODUCTS: Mapping[object, tuple[str, bool]] = {
    aten.linear.default: ("weight", False),
    aten.addmm.default: ("mat2", True),
    aten.mm.default: ("mat2", True),
    aten.matmul.default: ("other", True),
}

_WHOLE = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | {aten.embedding.default}
_TABLES = {aten.add.Tensor}
"""Readers of tables that are no operator's weight: learned positions, added to activations."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of at least two dimensions that operators with weights, or sums with activations, alone read.

    Attributes:
        names: under which it is registered; several where it is tied.
        tensor: the parameter.
        reads: the `get_attr` nodes of it.
        role: `straight`; `transposed`, where products read it as inputs × outputs; `table`, where sums read it.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    reads: tuple[fx.Node, ...]
    role: str

    @property
    def transposed(self) -> bool:
        return self.role == "transposed"

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def readers(self) -> list[fx.Node]:
        return [user for read in self.reads for user in read.users]

    @property
    def matrix(self) -> torch.Tensor:
        """Rows are outputs."""
        values = self.tensor.detach()
        return values.T.contiguous() if self.transposed else values.reshape(self.shape[0], -1)

    def put(self, matrix: torch.Tensor) -> None:
        """Gives the parameter the values of a matrix whose rows are outputs."""
        with torch.no_grad():
            self.tensor.copy_(matrix.T if self.transposed else matrix.view(self.tensor.shape))

    @property
    def shape(self) -> list[int]:
        """Of what is stored: outputs first; a table without the dimensions of size one before its rows."""
        sizes = list(self.tensor.shape)
        while self.role == "table" and sizes[0] == 1:
            sizes.pop(0)
        return sizes[::-1] if self.transposed else sizes


def find_weights(program: Program, context: Context) -> list[Weight]:
    """What can be stored as codes, in graph order; what can't be, and is a weight, is noted."""
    module, found = program.module, []
    reads: dict[int, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        if isinstance(fetch(module, str(node.target)), nn.Parameter):
            reads.setdefault(id(program.parameter(node)), []).append(node)
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for key, nodes in reads.items():
        tensor = program.parameter(nodes[0])
        roles = [_role(user, node) for node in nodes for user in node.users]
        if tensor.dim() < 2 or not tensor.numel() or not any(roles):
            continue
        if tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            context.note(f"is left alone: it is {dtype}, not float32", parameter=names[key][0])
        elif not all(roles):
            other = next(user for node in nodes for user in node.users if not _role(user, node))
            context.note(f"is left alone: {describe(other)} reads it too", parameter=names[key][0])
        else:
            role = roles[0] if len(set(roles)) == 1 else "straight"
            found.append(Weight(tuple(names[key]), tensor, tuple(nodes), role))
    return found


def _role(user: fx.Node, read: fx.Node) -> str:
    """What `user` reads a weight for, as in `Weight`; nothing where that is not known."""
    if user.target in _TABLES:
        is_table = sum(size > 1 for size in read.meta["val"].shape) > 1 and _comes_in(user)
        return "table" if is_table else ""
    if user.target in PRODUCTS:
        name, transposed = PRODUCTS[user.target]
        given = arguments(user)
        others = [value for key, value in given.items() if key != name]
        if given[name] is not read or read in others or read.meta["val"].dim() != 2:
            return ""
        return "transposed" if transposed else "straight"
    if is_call(user, *RECURRENT):
        return "straight" if read in arguments(user)["params"] else ""
    return "straight" if is_call(user, *_WHOLE) and arguments(user)["weight"] is read else ""


def _comes_in(node: fx.Node) -> bool:
    """Whether a value depends on an input: a sum of parameters is itself a weight."""
    seen, found = {node}, [node]
    while found:
        if (source := found.pop()).op == "placeholder":
            return True
        new = set(source.all_input_nodes) - seen
        seen |= new
        found += new
    return False


@dataclasses.dataclass(frozen=True)
class Product:
    """A product that reads a weight as its rows and columns are stored, and adds a bias or nothing."""

    x: fx.Node
    bias: fx.Node | None


def as_product(node: fx.Node, weight: Weight) -> Product | None:
    """`node` as `linear(x, W, bias)` of rows of float32; None where it is something else."""
    if node.target not in PRODUCTS or PRODUCTS[node.target][1] != weight.transposed:
        return None
    given = arguments(node)
    x: fx.Node = next(given[name] for name in ("input", "mat1", "self") if name in given)
    bias = given.get("bias")
    if node.target is aten.addmm.default:
        bias = given["self"]
        if (given["alpha"], given["beta"]) != (1, 1) or bias.meta["val"].shape != (weight.shape[0],):
            return None
    return Product(x, bias) if x.meta["val"].dim() >= 2 and x.meta["val"].dtype == torch.float32 else None
