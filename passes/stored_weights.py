"""Weights as codes in a graph: which can be stored so, who reads them, and the surgery that puts codes in their place.

Codes keep the parameter's name; scales and zero points stand beside it under `_scale` and `_zero_point`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lobo_fx.context import Context
from lobo_fx.formats import Format, pack
from lobo_fx.measures import mark_weights
from lobo_fx.operators import CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS, arguments, aten, is_call
from lobo_fx.own_operators import DECODE
from lobo_fx.passes.weight_rounding import Rounded
from lobo_fx.program import Program, fetch, register
from lobo_fx.provenance import describe, inherit
from lobo_fx.rewriting import free_name

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
            context.note(f"'{names[key][0]}' is left alone: it is {dtype}, not float32")
        elif not all(roles):
            other = next(user for node in nodes for user in node.users if not _role(user, node))
            context.note(f"'{names[key][0]}' is left alone: {describe(other)} reads it too")
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
class Stored:
    """A weight in codes, in the graph.

    Attributes:
        codes: the node that reads them.
        scale: likewise.
        zero_point: likewise; None where the format has a fixed one.
        number: the format.
        shape: of the weight as it is stored.
        block_size: neighbours that share a scale.
    """

    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    number: Format
    shape: list[int]
    block_size: int

    @property
    def layout(self) -> tuple[Any, ...]:
        """The arguments that say how codes are to be read, as our operators take them."""
        return (self.number.name, self.shape, self.block_size)


def store(program: Program, weight: Weight, rounded: Rounded, number: Format, block_size: int) -> Stored:
    """Registers codes in place of a parameter; its readers still read it."""
    mark_weights(program.module)
    for name in weight.names:
        path, _, leaf = name.rpartition(".")
        delattr(program.module.get_submodule(path), leaf)
    values = {"": rounded.codes.view(weight.shape) if number.bits == 8 else pack(rounded.codes, number.bits)}
    values["_scale"] = rounded.scale
    if rounded.zero_point is not None:
        values["_zero_point"] = pack(rounded.zero_point, number.bits)
    nodes = {}
    with program.graph.inserting_before(weight.reads[0]):
        for suffix, value in values.items():
            name = free_name(program, weight.name + suffix)
            register(program.module, name, value)
            nodes[suffix] = program.graph.get_attr(name)
    return Stored(nodes[""], nodes["_scale"], nodes.get("_zero_point"), number, weight.shape, block_size)


def decode_for_readers(program: Program, weight: Weight, stored: Stored) -> None:
    """Gives those who still read the parameter its decoded values, and drops the reads of it."""
    graph, readers = program.graph, weight.readers
    if readers:
        with graph.inserting_before(weight.reads[0]):
            value = graph.call_function(DECODE, (stored.codes, stored.scale, stored.zero_point, *stored.layout))
            inherit(value, readers[0])
            if weight.transposed:
                value = graph.call_function(aten.permute.default, (value, [1, 0]))
            elif weight.shape != list(weight.tensor.shape):
                value = graph.call_function(aten.view.default, (value, list(weight.tensor.shape)))
        inherit(value, readers[0])
    for read in weight.reads:
        if read.users:
            read.replace_all_uses_with(value)
        graph.erase_node(read)
    program.module.recompile()


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


def replace_reader(program: Program, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Puts a call of `target` in the place of `node`."""
    with program.graph.inserting_before(node):
        new = program.graph.call_function(target, args)
    inherit(new, node)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
