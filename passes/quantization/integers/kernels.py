"""The table of integer kernels: which operators a runtime computes on 8-bit integers, and what it asks of them.

No other place says so. A line stands for a family of operators; the lines of a runtime make up a `KernelTable`.
Three things can happen to a quantized value: an operator computes with it (`computes`), hands it on as it is
(`passes`), or only cuts its range and is folded into the operator before (`fuses`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.layers import LAYERS, layer_of, weight_uses
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import VALUE_PRESERVING, arguments, aten, is_call
from lobo_fx.plugins.kernels import Kernel, Setting

__all__ = [
    "ONNX_RUNTIME",
    "TABLES",
    "TRACED",
    "IntegerKernel",
    "KernelTable",
    "Sizes",
    "attention_kernel",
    "conversion",
    "kernel_table",
    "one_row",
]

Description = Kernel | str
"""A kernel whose cost can be asked, or the reason why the cost model has no name for it."""


class Sizes:
    """Sizes of tensors as they were traced; a subclass gives other sizes."""

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Shape of a node's tensor with one row in the batch; None if it is not known."""
        return one_row(node)

    def argument(self, node: fx.Node, name: str) -> Any:
        """An argument of a call that may depend on sizes, as `groups` does."""
        return arguments(node)[name]


TRACED = Sizes()


@dataclasses.dataclass(frozen=True)
class IntegerKernel:
    """A line of the table: a family of operators that a runtime computes on integers.

    Attributes:
        operators: the operators.
        describe: gives the kernel of a call at these sizes, or the reason why there is none.
        refuse: gives the reason why a call has no integer kernel; an empty string if nobody would expect one (a
            constant is added); None if it has one.
        gives_float: whether results are float, since the next operator mostly is; otherwise they are quantized.
        starts: whether its inputs are quantized for its sake, wherever it stands; the others run as integers only
            between integers, unless the costs say otherwise.
    """

    operators: frozenset[object]
    describe: Callable[[fx.Node, Sizes], Description]
    refuse: Callable[[fx.Node], str | None]
    gives_float: bool = False
    starts: bool = False


@dataclasses.dataclass(frozen=True)
class KernelTable:
    """The integer kernels of a runtime.

    Attributes:
        runtime: name of the runtime, as its plug-in is registered.
        lines: the families that it computes.
        passing: operators that hand integers on, of the same scale and zero point.
        fusing: activations that are folded into the operator before them: they only cut the range that is quantized.
        absorbed: activations that the runtime merges into a float product of two dimensions with a bias: the product
            then runs as integers only if its outputs are quantized.
        crossed: the operators of `passing` that the runtime moves a conversion to integers across, to before them,
            whatever that costs. For an operator that computes, the function that describes its kernel: after a float
            layer it is slow, since its input is not in the layout of integer layers.
    """

    runtime: str
    lines: tuple[IntegerKernel, ...]
    passing: frozenset[object]
    fusing: frozenset[object]
    absorbed: frozenset[object] = frozenset()
    crossed: Mapping[object, Callable[[fx.Node, Sizes], Description] | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [operator for line in self.lines for operator in line.operators] + [*self.passing, *self.fusing]
        assert len(named) == len(set(named)), "an operator stands in one line only"
        assert self.crossed.keys() <= self.passing

    def line(self, node: fx.Node) -> IntegerKernel | None:
        """The family that a call belongs to."""
        return next((line for line in self.lines if is_call(node, *line.operators)), None)

    def refusal(self, node: fx.Node) -> str | None:
        """Why a call stays float: a reason, or "" where nobody would expect integers; None where it need not."""
        line = self.line(node)
        if line is not None:
            return line.refuse(node)
        return "there is no integer kernel for it" if weight_uses(node) else ""

    def passes(self, node: fx.Node) -> bool:
        """Whether an operator hands integers on."""
        return is_call(node, *self.passing)

    def crosses(self, node: fx.Node) -> bool:
        """Whether the runtime moves a conversion to integers from behind a node to before it."""
        return is_call(node, *self.crossed) and len(node.all_input_nodes[0].users) == 1

    def crossing(self, node: fx.Node, sizes: Sizes = TRACED) -> Kernel | None:
        """The kernel of an operator that conversions are moved across; None for others, and if it only moves values."""
        describe = self.crossed[node.target] if self.crosses(node) else None
        found = None if describe is None else describe(node, sizes)
        return found if isinstance(found, Kernel) else None

    def fuses(self, node: fx.Node) -> bool:
        """Whether an activation only cuts a range that holds zero, as every quantized range does."""
        if not is_call(node, *self.fusing):
            return False
        given = arguments(node)
        low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
        return (low is None or low <= 0) and (high is None or high >= 0)

    def end(self, node: fx.Node) -> fx.Node:
        """The node whose value leaves a kernel: the activation that is fused, or the operator itself."""
        users = list(node.users)
        fused = len(users) == 1 and self.fuses(users[0]) and users[0].args[0] is node
        return users[0] if fused else node

    def gives_integers(self, node: fx.Node) -> bool:
        """Whether the outputs of an operator are quantized if it runs as integers."""
        line = self.line(node)
        return line is None or not line.gives_float or self._is_absorbing(node)

    def _is_absorbing(self, node: fx.Node) -> bool:
        layer, reader = layer_of(node), _reader(node)
        if layer is None or layer.bias is None or reader is None or not is_call(reader, *self.absorbed):
            return False
        source = layer.input.args[0] if layer.input.op == "call_module" else layer.input  # what is observed
        value = source.meta.get("val") if isinstance(source, fx.Node) else None
        return value is not None and value.dim() == 2


def _reader(node: fx.Node) -> fx.Node | None:
    """The only reader of a node, behind an observer or two; None where it has several, or none."""
    users = list(node.users)
    while len(users) == 1 and users[0].op == "call_module":
        users = list(users[0].users)
    return users[0] if len(users) == 1 else None


# Why a call has no integer kernel. Tensors come as nodes whose `meta["val"]` holds dtype and shape.


def _layer_refusal(node: fx.Node) -> str | None:
    """Refuses a layer unless it multiplies float32 with a stored weight."""
    layer = layer_of(node)
    if layer is None or _is_quantized(layer.weight):
        return ""
    if layer.read is None:
        return "its weight is computed, not a parameter"
    return None if _is_float32(layer.input) else f"its input is {_dtype(layer.input)}, not float32"


def _joined_refusal(node: fx.Node) -> str | None:
    """Refuses an operator unless it joins two or more computed float32 tensors; none of them may be a constant."""
    if layer_of(node) is not None:
        return "no integer kernel has weights of three dimensions"
    sources = node.all_input_nodes
    if len(sources) < 2 or any(weight_node(source) is not None for source in sources):
        return ""
    return None if all(map(_is_float32, sources)) else ""


def _sum_refusal(node: fx.Node) -> str | None:
    refusal = _joined_refusal(node)
    return "one of its operands is scaled" if refusal is None and arguments(node)["alpha"] != 1 else refusal


def _single_refusal(node: fx.Node) -> str | None:
    """Refuses a pool or an activation unless it reads float32."""
    return None if _is_float32(node.all_input_nodes[0]) else ""


def _is_quantized(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "quantized_decomposed"


def _is_float32(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


# What a call's cost depends on.

_UNKNOWN = "its size depends on the data"


def one_row(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor with one row in the batch; other free sizes as in the example; None if not known."""
    sizes = node.meta["val"].shape
    known = [size if isinstance(size, int) else size.node.hint for size in sizes]
    if not all(isinstance(size, int) for size in known):
        return None
    free = [not isinstance(size, int) for size in sizes]
    return tuple(max(1, size if dim else 1) if free[dim] else size for dim, size in enumerate(known))


def _described(
    operator: str, sources: Iterable[fx.Node], sizes: Sizes, settings: Iterable[tuple[str, Setting]] = ()
) -> Description:
    """The kernel of an operator on these tensors."""
    shapes = [sizes.shape(source) for source in sources]
    known = tuple(shape for shape in shapes if shape is not None)
    return Kernel(operator, known, tuple(settings)) if len(known) == len(shapes) else _UNKNOWN


def _convolution(node: fx.Node, sizes: Sizes) -> Description:
    layer, given = layer_of(node), arguments(node)
    assert layer is not None
    if node.meta["val"].dim() != layer.weight.meta["val"].dim():
        return "its input has no batch dimension"
    places = layer.weight.meta["val"].shape[2:]
    stride, dilation = (_each(given[name], len(places)) for name in ("stride", "dilation"))
    padding = _padding(given["padding"], places, dilation)
    if padding is None:
        return "it pads one side more than the other"
    settings = (
        ("stride", stride),
        ("padding", padding),
        ("dilation", dilation),
        ("groups", int(sizes.argument(node, "groups"))),
    )
    return _described("conv", (layer.input, layer.weight), sizes, settings)


def _padding(padding: str | int | Sequence[int], places: Sequence[int], dilation: Sequence[int]) -> Any:
    """Zeros on either side of each dimension; None where the sides differ."""
    if padding != "same":
        return _each(0 if isinstance(padding, str) else padding, len(places))
    both = [step * (size - 1) for step, size in zip(dilation, places, strict=True)]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """A setting with an entry for each dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def _linear(node: fx.Node, sizes: Sizes) -> Description:
    layer = layer_of(node)
    assert layer is not None
    rows, weight = sizes.shape(layer.input), sizes.shape(layer.weight)
    if rows is None or weight is None:
        return _UNKNOWN
    return Kernel("linear", (rows, weight[::-1]))  # inputs × outputs, as products have it


def _inputs(operator: str) -> Callable[[fx.Node, Sizes], Description]:
    """Describes an operator whose cost depends only on the shapes of its inputs."""
    return lambda node, sizes: _described(operator, node.all_input_nodes, sizes)


def _concatenation(node: fx.Node, sizes: Sizes) -> Description:
    given = arguments(node)
    axis = given["dim"] % max(1, node.meta["val"].dim())
    return _described("concat", given["tensors"], sizes, (("axis", axis),))


def _average_pool(node: fx.Node, sizes: Sizes) -> Description:
    given = arguments(node)
    if given["ceil_mode"] or given["divisor_override"] is not None:
        return "it rounds sizes up, or divides by a number of its own"
    return _pool("average_pool", node, sizes)


def _max_pool(node: fx.Node, sizes: Sizes) -> Description:
    given = arguments(node)
    more = [("ceil_mode", 1)] if given["ceil_mode"] else []
    return _pool("max_pool", node, sizes, [("dilation", _each(given["dilation"], 2)), *more])


def _pool(operator: str, node: fx.Node, sizes: Sizes, more: Iterable[tuple[str, Setting]] = ()) -> Description:
    given = arguments(node)
    if node.meta["val"].dim() != 4:
        return "its input has no batch dimension"
    settings = {"kernel_size": given["kernel_size"], "stride": given["stride"] or given["kernel_size"]}
    settings["padding"] = given["padding"]
    each = [(name, _each(value, 2)) for name, value in settings.items()]
    return _described(operator, [given["self"]], sizes, (*each, *more))


def _global_average_pool(node: fx.Node, sizes: Sizes) -> Description:
    given = arguments(node)
    if node.meta["val"].dim() != 4:
        return "its input has no batch dimension"
    if list(given["output_size"]) != [1, 1]:
        return "it pools to more than one place"
    return _described("global_average_pool", [given["self"]], sizes)


def attention_kernel(node: fx.Node, sizes: Sizes = TRACED) -> Description:
    """The kernel of an attention, whose cost as one fused operator is compared with several; or why it has none."""
    given = arguments(node)
    tensors = [given[name] for name in ("query", "key", "value")]
    shapes = [sizes.shape(tensor) for tensor in tensors]  # [batch, heads, length, head_dim] each
    if None in shapes:
        return _UNKNOWN
    query, key, value = (shape for shape in shapes if shape is not None)
    if {len(query), len(key), len(value)} != {4}:
        return "it is not over [batch, heads, length, head_dim]"
    if not query[:2] == key[:2] == value[:2]:
        return "keys have other heads, or another batch, than queries"
    if query[3] != key[3] or key[2] != value[2]:
        return "its queries, keys and values don't fit together"
    return _described("attention", tensors, sizes)


def conversion(node: fx.Node, sizes: Sizes = TRACED) -> Kernel | None:
    """The conversion of a node's tensor between float and integers; images change their layout too."""
    shape = sizes.shape(node)
    if shape is None:
        return None
    return Kernel("convert", (shape if len(shape) == 4 else (math.prod(shape),),))


def _layers(word: str) -> frozenset[object]:
    """The operators that the table of layers calls by this word."""
    return frozenset(operator for operator, kind in LAYERS.items() if kind.word == word)


def _line(
    operators: Collection[object],
    describe: Callable[[fx.Node, Sizes], Description],
    refuse: Callable[[fx.Node], str | None],
    gives_float: bool = False,
    starts: bool = False,
) -> IntegerKernel:
    return IntegerKernel(frozenset(operators), describe, refuse, gives_float, starts)


_CUTTING = frozenset({aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default})

# Softmax has no line: its integer kernel is slower wherever measured, and rounds in a way of its own.
ONNX_RUNTIME = KernelTable(
    "onnxruntime",
    lines=(
        _line(_layers("convolution"), _convolution, _layer_refusal, starts=True),
        _line(_layers("linear layer"), _linear, _layer_refusal, starts=True, gives_float=True),
        _line({aten.matmul.default, aten.bmm.default}, _inputs("matmul"), _joined_refusal),
        _line({aten.add.Tensor}, _inputs("add"), _sum_refusal),
        _line({aten.mul.Tensor}, _inputs("mul"), _joined_refusal),
        _line({aten.cat.default}, _concatenation, _joined_refusal),
        _line({aten.avg_pool2d.default}, _average_pool, _single_refusal),
        _line({aten.adaptive_avg_pool2d.default}, _global_average_pool, _single_refusal),
        _line({aten.sigmoid.default}, _inputs("sigmoid"), _single_refusal),
        _line({aten.leaky_relu.default}, _inputs("leaky_relu"), _single_refusal),
    ),
    passing=VALUE_PRESERVING
    | {aten.upsample_nearest2d.vec, aten.pixel_shuffle.default, aten.expand.default, aten.repeat.default},
    fusing=_CUTTING,
    absorbed=_CUTTING  # by Gemm, before ONNX Runtime looks for integers
    | {aten.leaky_relu.default, aten.elu.default, aten.selu.default, aten.softplus.default}
    | {aten.sigmoid.default, aten.tanh.default, aten.hardsigmoid.default},
    crossed={
        **dict.fromkeys([aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int]),
        **dict.fromkeys([aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.slice.Tensor]),
        aten.max_pool2d.default: _max_pool,
    },
)

TABLES: Mapping[str, KernelTable] = {table.runtime: table for table in (ONNX_RUNTIME,)}
"""Kernel tables by name of the runtime."""


def kernel_table(runtime: str) -> KernelTable:
    """The integer kernels of a runtime.

    Raises:
        InvalidInput: none are known.
    """
    if runtime not in TABLES:
        raise InvalidInput(f"no integer kernels of the runtime '{runtime}' are known; {suggestion(runtime, TABLES)}")
    return TABLES[runtime]
