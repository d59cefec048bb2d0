"""Shape propagation: computes every node's dtype and shape from the inputs', with free dimensions as symbols.

Runs the graph on fake tensors (no data, no arithmetic). A graph and its copies share the symbols of free dimensions, so
a pass that makes one a constant is refused at once, before the constant reaches the copies.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from lobo_fx.graph.known_shapes import known_result, shapes_known
from lobo_fx.graph.operators import arguments, is_call
from lobo_fx.graph.tensors import fetch
from lobo_fx.terminal.quiet import quiet

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
    "names_in",
    "output_values",
    "propagate",
    "storage_of",
    "tensor_specs",
]

Dimension = int | str

SEQUENCES = (2, 3)
"""Numbers of dimensions that sequences may have: rows of numbers or tokens, or such rows with channels."""


def names_in(size: Dimension) -> set[str]:
    """The names of free dimensions in a size: `length` in `2*length`."""
    return set(re.findall(r"[^\W\d]\w*", str(size)))


class PropagationError(Exception):
    """The graph does not fit together at `node`; `reason` is the operator's own complaint."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclasses.dataclass(frozen=True)
class FreeDimension:
    """What is known of a free dimension besides its position.

    Attributes:
        name: the name that the user gave; empty if none.
        lowest: the smallest allowed size; None without a known limit.
        highest: the largest allowed size, likewise.
        step: the program was traced for sizes this far apart only, as its code branched on the size.
        offset: remainder of the allowed sizes divided by `step`.
    """

    name: str = ""
    lowest: int | None = None
    highest: int | None = None
    step: int = 1
    offset: int = 0

    @property
    def is_fixed(self) -> bool:
        """Whether only one size is allowed."""
        return self.lowest is not None and self.lowest == self.highest

    def allows(self, size: int) -> bool:
        """Whether the program was traced for this size."""
        above, below = self.lowest is None or size >= self.lowest, self.highest is None or size <= self.highest
        return above and below and size % self.step == self.offset

    def __str__(self) -> str:
        """The allowed sizes, in words."""
        bounds = [f"from {self.lowest}"] * (self.lowest is not None) + [f"to {self.highest}"] * (
            self.highest is not None
        )
        steps = [f"in steps of {self.step}" + f" from {self.offset}" * bool(self.offset)] * (self.step > 1)
        return " ".join([*bounds, *steps]) or "any size"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one input or output; a free dimension is text such as "batch"."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dimension, ...]

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class _Computed:
    """The value of a node, and what it was computed from.

    Attributes:
        mode: the fake mode, which also holds the symbols.
        call: the operator and its arguments.
        stored: shape, dtype, strides and so on of the stored tensor that the node reads.
        inputs: values of the nodes that it reads.
        value: the result.
    """

    mode: FakeTensorMode
    call: tuple[Any, ...]
    stored: tuple[Any, ...]
    inputs: tuple[Any, ...]
    value: Any = None

    def holds(self, now: _Computed, value: Any) -> bool:
        """Whether the same would be computed now, and `value` is still the result."""
        same = self.mode is now.mode and self.call == now.call and self.stored == now.stored
        inputs = len(self.inputs) == len(now.inputs) and all(map(operator.is_, self.inputs, now.inputs))
        return same and inputs and self.value is value


_COMPUTED = "lobo_fx_computed"
"""Metadata key of a node's `_Computed`; copies of a graph keep it, as they keep the values."""


class _FakeInterpreter(fx.Interpreter):
    """Runs a graph on fake tensors and keeps each node's value in its metadata.

    A node whose call and inputs are unchanged keeps its value: passes change only parts of a graph, and an operator on
    fake tensors takes as long as a small layer on real ones.
    """

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, on_node: Callable[[fx.Node, Any], None] | None):
        super().__init__(module)
        self.mode, self.on_node = mode, on_node
        self.stored: dict[int, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        now, known = self._computed(n), n.meta.get("val")
        if now and self.on_node is None and (last := n.meta.get(_COMPUTED)) and last.holds(now, known):
            return known
        try:
            value = super().run_node(n)
            if is_call(n, torch.ops.aten.dropout.default) and not arguments(n)["train"]:
                value = self.map_nodes_to_values(n.args[0], n)  # it returns its input, but its decomposition copies
        except Exception as error:
            raise PropagationError(n, str(error).split("\n\n")[0]) from error
        if self.on_node:
            self.on_node(n, value)
        elif _alike(known, value, self.mode):
            value = known  # the same object, so that nodes that read it keep their values too
        n.meta["val"], n.meta[_COMPUTED] = value, now and dataclasses.replace(now, value=value)
        return value

    def _computed(self, node: fx.Node) -> _Computed | None:
        """What the node's value depends on; None for a subgraph of a branch, which may change inside."""
        inputs = tuple(source.meta["val"] for source in node.all_input_nodes)
        value = fetch(self.module, str(node.target)) if node.op == "get_attr" else None
        if any(isinstance(each, fx.GraphModule) for each in (value, *inputs)):
            return None
        facts: tuple[Any, ...] = ()
        if isinstance(value, torch.Tensor):
            facts = value.shape, value.dtype, value.stride(), value.requires_grad, value.device
        return _Computed(
            self.mode,
            (node.op, node.target, str(node.args), str(node.kwargs), torch.get_default_dtype()),
            facts,
            inputs,
        )

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self.stored:  # not `from_tensor`, which caches parameters even if their data is replaced
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            self.stored[id(value)] = fake.requires_grad_(value.requires_grad)
        return self.stored[id(value)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        known = known_result(target, args, kwargs)
        return super().call_function(target, args, kwargs) if known is None else known

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Observers return their input, and must not see fake tensors."""
        return args[0]


def _alike(known: Any, value: Any, mode: FakeTensorMode) -> bool:
    """Whether two values are equal: the same structure of numbers and of fake tensors of this mode."""
    (before, structure), (after, expected) = pytree.tree_flatten(known), pytree.tree_flatten(value)
    return structure == expected and all(_facts(a, mode) == _facts(b, mode) for a, b in zip(before, after, strict=True))


def _facts(value: Any, mode: FakeTensorMode) -> Any:
    """Facts of a value, read without evaluating its symbols, which would make them constants."""
    if isinstance(value, torch.Tensor):
        sizes = tuple(map(expression, (*value.shape, *value.stride())))
        ours = isinstance(value, FakeTensor) and value.fake_mode is mode
        return ours, sizes, value.dtype, value.device, value.requires_grad
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.shape_env is mode.shape_env, value.node.expr
    return value


class _Symbols(ShapeEnv):
    """The free dimensions of a graph and its copies: none may become a constant, or an expression of others."""

    def _set_replacement(self, a: sympy.Symbol, tgt: sympy.Expr, msg: str) -> None:
        """Called by PyTorch where an operator allows only some sizes; refused, as it would hold for copies too."""
        if a in self.backed_var_to_val and a not in tgt.free_symbols:
            raise ValueError(f"a free dimension became {tgt}")
        super()._set_replacement(a, tgt, msg)


@shapes_known()
def propagate(module: fx.GraphModule, on_node: Callable[[fx.Node, Any], None] | None = None) -> None:
    """Sets `meta["val"]` of every node to a fake tensor, from the placeholders' shapes.

    Only what changed since the last time is computed.

    Args:
        module: its placeholders must carry a `val` (as traced), whose symbols stay free.
        on_node: called with each node and its value; every node is then computed anew.

    Raises:
        PropagationError: an operator refused its inputs, or a free dimension was made a constant.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    mode = None if on_node else _last_mode(placeholders)
    if mode is None:
        mode, symbols = FakeTensorMode(shape_env=_Symbols(), allow_non_fake_inputs=True), dict[Any, Any]()
        for node in placeholders:
            node.meta["val"] = _refresh(node.meta.get("val"), mode, symbols)
    with quiet(), mode, enable_python_dispatcher():  # the Python forms of composite operators keep sizes symbolic
        values = (node.meta["val"] for node in placeholders)
        _FakeInterpreter(module, mode, on_node).run(*values, enable_io_processing=False)
    assert mode.shape_env is not None
    mode.shape_env.pending_fresh_unbacked_symbols.clear()  # later traces with these values would miss them


def _last_mode(placeholders: Sequence[fx.Node]) -> FakeTensorMode | None:
    """The mode in which all inputs are unchanged since the last propagation; None without one."""
    known = [node.meta.get(_COMPUTED) for node in placeholders]
    same = all(last and last.value is node.meta["val"] for last, node in zip(known, placeholders, strict=True))
    modes = {last.mode for last in known if last}
    return modes.pop() if same and len(modes) == 1 else None


def _refresh(value: Any, mode: FakeTensorMode, symbols: dict[sympy.Symbol, sympy.Symbol]) -> Any:
    """The placeholder's value in a new fake mode, with new symbols for the free dimensions."""
    from torch._dynamo.source import ConstantSource  # a second or two, which only those wait for who trace

    environment = mode.shape_env
    assert environment is not None
    if not isinstance(value, torch.Tensor):
        return value

    def dimension(size: int | torch.SymInt) -> int | torch.SymInt:
        if isinstance(size, int):
            return size
        formula = expression(size)
        for symbol in sorted(formula.free_symbols - set(symbols), key=str):
            hint = size.node.shape_env.backed_var_to_val.get(symbol)
            if hint is None:  # in a program from a file, whose inputs hold only multiples of the symbol
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


def has_free_dimension(value: object) -> bool:
    """Whether any size of a (fake) tensor is symbolic."""
    return isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


def free_symbols(graph: fx.Graph) -> dict[sympy.Symbol, torch.SymInt]:
    """The symbols of the inputs' free dimensions, in order, each with the first size that holds it."""
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    found: dict[sympy.Symbol, torch.SymInt] = {}
    for size in sizes:
        for symbol in sorted(expression(size).free_symbols, key=str):
            found.setdefault(symbol, size)
    return found


def dimension_names(graph: fx.Graph, known: Sequence[FreeDimension] = ()) -> dict[sympy.Symbol, sympy.Symbol]:
    """Names of the free dimensions: the given one, else `batch` for the first at position 0 and `length` for sequences.

    Args:
        graph: a graph with shapes propagated.
        known: what is known of each of its `free_symbols`; their names are kept.
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
    """A size as a sympy expression."""
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
