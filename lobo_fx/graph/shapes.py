"""Shape propagation: every node's dtype and shape from the inputs', free dimensions kept as symbols.

Runs the graph on fake tensors (no data, no arithmetic). A fresh shape environment each time, so a pass
that hard-codes a free dimension is caught rather than silently remembered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from lobo_fx.graph.operators import arguments, is_call
from lobo_fx.graph.recurrent import not_unrolled
from lobo_fx.graph.tensors import fetch

__all__ = [
    "SEQUENCES",
    "Dimension",
    "FreeDimension",
    "PropagationError",
    "TensorSpec",
    "dimension_names",
    "expression",
    "free_symbols",
    "has_free_dimension",
    "output_values",
    "propagate",
    "storage_of",
    "tensor_specs",
]

Dimension = int | str

SEQUENCES = (2, 3)
"""How many dimensions sequences have: rows of numbers or tokens, and rows of them with channels."""


class PropagationError(Exception):
    """The graph does not fit together at `node`; `reason` is the operator's own complaint."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclasses.dataclass(frozen=True)
class FreeDimension:
    """What is known of a free dimension beside its place.

    Attributes:
        name: as the user gave it, empty where none was given.
        lowest: the smallest size allowed; None where nothing is known to be too small.
        highest: the largest one, likewise.
        step: how far apart sizes are that the program was traced for: its code took one way of several.
        offset: what is left of them when they are divided by `step`.
    """

    name: str = ""
    lowest: int | None = None
    highest: int | None = None
    step: int = 1
    offset: int = 0

    def allows(self, size: int) -> bool:
        """Whether the program was traced for this size."""
        above, below = self.lowest is None or size >= self.lowest, self.highest is None or size <= self.highest
        return above and below and size % self.step == self.offset

    def __str__(self) -> str:
        """What sizes are allowed, in words."""
        bounds = [f"from {self.lowest}"] * (self.lowest is not None) + [f"to {self.highest}"] * (
            self.highest is not None
        )
        steps = [f"in steps of {self.step}" + f" from {self.offset}" * bool(self.offset)] * (self.step > 1)
        return " ".join([*bounds, *steps]) or "any size"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one input or output; a free dimension is a string such as "batch"."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dimension, ...]

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


class _FakeInterpreter(fx.Interpreter):
    """Runs a graph on fake tensors and keeps each node's value in its metadata."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.on_node: Callable[[fx.Node, Any], None] | None = None

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
            if is_call(n, torch.ops.aten.dropout.default) and not arguments(n)["train"]:
                value = self.map_nodes_to_values(n.args[0], n)  # the operator gives its input; its Python form a copy
        except Exception as error:
            raise PropagationError(n, str(error).split("\n\n")[0]) from error
        n.meta["val"] = value
        if self.on_node:
            self.on_node(n, value)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Observers hand their input through, and must not see fake tensors."""
        return args[0]


@not_unrolled()
def propagate(module: fx.GraphModule, on_node: Callable[[fx.Node, Any], None] | None = None) -> None:
    """Sets `meta["val"]` of every node to a fake tensor, from the placeholders' shapes.

    Nothing is done where the graph, what it stores and what it takes are as they were when it was done last.

    Args:
        module: its placeholders must carry a `val` (as traced), whose symbols stay free.
        on_node: called with each node and its value as it is computed.

    Raises:
        PropagationError: an operator refused its inputs, or a free dimension was made a constant.
    """
    propagated = _what_shapes_depend_on(module)
    if on_node is None and propagated is not None and module.meta.get(_PROPAGATED) == propagated:
        return
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}
    values = [_refresh(node.meta.get("val"), mode, environment, symbols) for node in placeholders]
    interpreter = _FakeInterpreter(module, mode)
    interpreter.on_node = on_node
    with mode, enable_python_dispatcher():  # the Python forms of composite operators keep sizes symbolic
        interpreter.run(*values, enable_io_processing=False)
    for symbol in symbols.values():
        if environment.replacements.get(symbol, symbol) != symbol:
            culprit = _first_constant(module, placeholders)
            raise PropagationError(culprit, f"a free dimension became {environment.replacements[symbol]}")
    module.meta[_PROPAGATED] = propagated


_PROPAGATED = "lobo_fx_propagated"
"""Where a module keeps what its shapes were propagated from; copies keep it, as they keep the shapes."""


def _what_shapes_depend_on(module: fx.GraphModule) -> list[Any] | None:
    """All that decides the shapes in a graph, as plain values; None where that includes graphs of branches."""
    found: list[Any] = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if value is None and node.op != "output":
            return None  # not propagated yet
        if node.op == "get_attr":
            value = fetch(module, str(node.target))
            if isinstance(value, fx.GraphModule):
                return None
        stored = node.op in ("get_attr", "placeholder") and isinstance(value, torch.Tensor)
        facts = (str(value.shape), value.dtype, str(value.stride()), value.requires_grad) if stored else None
        found.append((node.name, node.op, node.target, str(node.args), str(node.kwargs), facts))
    return found


def _refresh(value: Any, mode: FakeTensorMode, environment: ShapeEnv, symbols: dict[sympy.Symbol, sympy.Symbol]) -> Any:
    """The placeholder's value again, in a new fake mode and with new symbols for the free dimensions."""
    if not isinstance(value, torch.Tensor):
        return value

    def dimension(size: int | torch.SymInt) -> int | torch.SymInt:
        if isinstance(size, int):
            return size
        formula = expression(size)
        for symbol in sorted(formula.free_symbols - set(symbols), key=str):
            hint = size.node.shape_env.backed_var_to_val.get(symbol)
            if hint is None:  # of a program from a file, where an input holds nothing but multiples of it
                (hint,) = sympy.solve(formula - size.node.hint, symbol)
            source = ConstantSource(f"dimension_{len(symbols)}")
            symbols[symbol] = environment.create_symbol(int(hint), source, DimDynamic.DYNAMIC, None)
        return environment.create_symintnode(formula.xreplace(symbols), hint=int(size.node.hint))

    with mode:
        return torch.empty(
            [dimension(size) for size in value.shape],
            dtype=value.dtype,
            device=value.device,
            requires_grad=value.requires_grad,
        )


def _first_constant(module: fx.GraphModule, placeholders: list[fx.Node]) -> fx.Node:
    """The first computed node none of whose sizes is free any more: the likely culprit."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            fed = any(has_free_dimension(source.meta.get("val")) for source in node.all_input_nodes)
            if fed and not has_free_dimension(value):
                found: fx.Node = node
                return found
    return placeholders[0]


def has_free_dimension(value: object) -> bool:
    """Whether any size of a (fake) tensor is symbolic."""
    return isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


def free_symbols(graph: fx.Graph) -> dict[sympy.Symbol, torch.SymInt]:
    """The symbols of the inputs' free dimensions, in order, each with the size that it stands in first."""
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    found: dict[sympy.Symbol, torch.SymInt] = {}
    for size in sizes:
        for symbol in sorted(expression(size).free_symbols, key=str):
            found.setdefault(symbol, size)
    return found


def dimension_names(graph: fx.Graph, known: Sequence[FreeDimension] = ()) -> dict[sympy.Symbol, sympy.Symbol]:
    """Readable names of the free dimensions: as given; else the first at position 0 is `batch`, of a sequence `length`.

    Args:
        graph: shapes propagated.
        known: what is known of each of its `free_symbols`; names of their own are then kept.
    """
    free = free_symbols(graph)
    names = {symbol: dimension.name for symbol, dimension in zip(free, known, strict=False) if dimension.name}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for position, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            for symbol in sorted(expression(size).free_symbols - set(names), key=str):
                usual = "batch" if position == 0 else "length" if value.dim() in SEQUENCES else ""
                name = usual if usual and usual not in names.values() else f"{node.target}_{position}"
                while name in names.values():
                    name += "_in"
                names[symbol] = name
    return {symbol: sympy.Symbol(names[symbol]) for symbol in free}


def tensor_specs(
    names: list[str], values: list[Any], symbols: dict[sympy.Symbol, sympy.Symbol]
) -> tuple[TensorSpec | None, ...]:
    """Specifications of (fake) tensors; None where a value is not a tensor."""
    return tuple(
        TensorSpec(name, value.dtype, tuple(_dimension(size, symbols) for size in value.shape))
        if isinstance(value, torch.Tensor)
        else None
        for name, value in zip(names, values, strict=True)
    )


def expression(size: int | torch.SymInt) -> Any:
    """A size as sympy has it."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _dimension(size: int | torch.SymInt, symbols: dict[sympy.Symbol, sympy.Symbol]) -> Dimension:
    value = expression(size)
    return int(value) if value.is_number else str(value.xreplace(symbols))


def output_values(graph: fx.Graph) -> list[Any]:
    """The values that the graph returns, flat."""
    node = graph.output_node()
    return list(pytree.tree_leaves(fx.node.map_arg(node.args[0], lambda n: n.meta.get("val"))))


def storage_of(value: object) -> int | None:
    """Identity of the memory behind a fake tensor: two values with the same one are aliases."""
    if isinstance(value, FakeTensor):
        return int(value.untyped_storage()._cdata)
    return None
