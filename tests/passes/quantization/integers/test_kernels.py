"""The table of integer kernels: what a call asks for, or why there is no kernel, or no name for its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lobo_fx
from lobo_fx.graph.operators import aten
from lobo_fx.passes.quantization.integers.kernels import (
    ONNX_RUNTIME,
    TRACED,
    IntegerKernel,
    KernelTable,
    Sizes,
    attention_kernel,
    conversion,
    kernel_table,
    one_row,
)
from lobo_fx.plugins.kernels import Kernel
from lobo_fx.plugins.registry import RUNTIMES

IMAGE, ROWS = torch.randn(2, 8, 12, 12), torch.randn(2, 7, 16)


class Calls(nn.Module):
    """One function of the input, with a layer of its own."""

    def __init__(self, function: Callable[..., Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer
        self.weight = nn.Parameter(torch.randn(16, 4))
        self.experts = nn.Parameter(torch.randn(2, 16, 4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def last_call(model: nn.Module, x: torch.Tensor, batch: str | None = "batch") -> fx.Node:
    """The call that gives the output of a traced model."""
    graph = lobo_fx.trace(model.eval(), x, dynamic_shapes=batch).graph
    calls: list[fx.Node] = [node for node in graph.nodes if node.op == "call_function"]
    return calls[-1]


def described(model: nn.Module, x: torch.Tensor, batch: str | None = "batch") -> str:
    """What the table says of a model's last call: the kernel's key, or a reason."""
    node = last_call(model, x, batch)
    line = ONNX_RUNTIME.line(node)
    assert line is not None
    assert line.refuse(node) is None
    found = line.describe(node, TRACED)
    return found.key if isinstance(found, Kernel) else found


def conv2d(**settings: Any) -> nn.Module:
    return nn.Conv2d(8, 4, settings.pop("size", 3), **settings)


@pytest.mark.parametrize(
    ("model", "x", "key"),
    [
        (conv2d(), IMAGE, "conv 1x8x12x12 4x8x3x3 stride=1x1 padding=0x0 dilation=1x1 groups=1"),
        (conv2d(padding="valid"), IMAGE, "conv 1x8x12x12 4x8x3x3 stride=1x1 padding=0x0 dilation=1x1 groups=1"),
        (
            conv2d(padding="same", dilation=2),
            IMAGE,
            "conv 1x8x12x12 4x8x3x3 stride=1x1 padding=2x2 dilation=2x2 groups=1",
        ),
        (
            nn.Conv1d(8, 8, 3, 2, groups=4),
            IMAGE[:, :, 0],
            "conv 1x8x12 8x2x3 stride=2 padding=0 dilation=1 groups=4",
        ),
        (
            nn.Conv3d(4, 4, (1, 2, 2)),
            IMAGE.view(2, 4, 2, 12, 12),
            "conv 1x4x2x12x12 4x4x1x2x2 stride=1x1x1 padding=0x0x0 dilation=1x1x1 groups=1",
        ),
        (nn.Linear(16, 4), ROWS, "linear 1x7x16 16x4"),
        (Calls(lambda m, x: F.linear(x, m.weight.permute(1, 0))), ROWS, "linear 1x7x16 16x4"),
        (Calls(lambda m, x: x @ x.mT), ROWS[:, :, :1] * ROWS[0, 0], "matmul 1x7x16 1x16x7"),
        (Calls(lambda m, x: torch.cat([x, x + 1, x], -1)), ROWS, "concat 1x7x16 1x7x16 1x7x16 axis=2"),
        (nn.AdaptiveAvgPool2d(1), IMAGE, "global_average_pool 1x8x12x12"),
        (nn.AvgPool2d(2, padding=1), IMAGE, "average_pool 1x8x12x12 kernel_size=2x2 stride=2x2 padding=1x1"),
    ],
)
def test_calls_name_their_kernel(model: nn.Module, x: torch.Tensor, key: str) -> None:
    assert described(model, x) == key


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (conv2d(size=2, padding="same"), IMAGE, "it pads one side more than the other"),
        (conv2d(), IMAGE[0], "its input has no batch dimension"),
        (nn.AvgPool2d(2), IMAGE[0], "its input has no batch dimension"),
        (nn.AdaptiveAvgPool2d(1), IMAGE[0], "its input has no batch dimension"),
        (nn.AdaptiveAvgPool2d(2), IMAGE, "it pools to more than one place"),
        (nn.AvgPool2d(2, ceil_mode=True), IMAGE, "it rounds sizes up, or divides by a number of its own"),
        (Calls(lambda m, x: torch.sigmoid(x[x[:, 0, 0] > 0])), ROWS, "its size depends on the data"),
    ],
)
def test_what_costs_do_not_describe_has_a_reason(model: nn.Module, x: torch.Tensor, reason: str) -> None:
    assert described(model, x, None) == reason


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.ConvTranspose2d(8, 4, 3), IMAGE, "there is no integer kernel for it"),
        (nn.Linear(16, 4).double(), ROWS.double(), "its input is float64, not float32"),
        (Calls(lambda m, x: F.linear(x, m.weight.mT * 2)), ROWS, "its weight is computed, not a parameter"),
        (
            Calls(lambda m, x: torch.bmm(x, m.experts)),
            ROWS,
            "no integer kernel has weights of three dimensions",
        ),
        (Calls(lambda m, x: torch.add(x, x.mT.mT.sin(), alpha=2)), ROWS, "one of its operands is scaled"),
        (Calls(lambda m, x: x + m.weight[0, 0]), ROWS, None),
        (Calls(lambda m, x: x + m.experts[0, 0, 0].exp()), ROWS, None),
        (Calls(lambda m, x: x.sin() + x), ROWS, None),
        (Calls(lambda m, x: x + 1), ROWS, ""),
        (Calls(lambda m, x: x * x), ROWS, ""),
        (Calls(lambda m, x: (x > 0) * (x < 1)), ROWS, ""),
        (Calls(lambda m, x: x.sin()), ROWS, ""),
    ],
)
def test_what_has_no_integer_kernel_has_a_reason(model: nn.Module, x: torch.Tensor, reason: str | None) -> None:
    """Reasons for what has weights, or could be one; nothing to say of what nobody expects to be integers."""
    assert ONNX_RUNTIME.refusal(last_call(model, x, None)) == reason


def attention(*shapes: tuple[int, ...]) -> fx.Node:
    """An attention over tensors of these shapes."""

    class Attention(nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.dim() == 4)

    graph = lobo_fx.trace(Attention(), tuple(torch.randn(shape) for shape in shapes), dynamic_shapes=None).graph
    found: list[fx.Node] = graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    return found[0]


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(2, 8, 7, 8), (2, 8, 5, 8), (2, 8, 5, 6)], "attention 2x8x7x8 2x8x5x8 2x8x5x6"),
        ([(2, 8, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8)], "keys have other heads, or another batch, than queries"),
        ([(2, 8, 7, 8), (1, 8, 7, 8), (1, 8, 7, 8)], "keys have other heads, or another batch, than queries"),
        ([(2, 7, 8)] * 3, "it is not over [batch, heads, length, head_dim]"),
        ([(2, 2, 4, 7, 8)] * 3, "it is not over [batch, heads, length, head_dim]"),
    ],
)
def test_attention_names_its_kernel_or_a_reason(shapes: list[tuple[int, ...]], found: str) -> None:
    kernel = attention_kernel(attention(*shapes))
    assert (kernel.key if isinstance(kernel, Kernel) else kernel) == found


def test_images_convert_with_their_layout_and_other_tensors_by_size() -> None:
    assert conversion(last_call(conv2d(), IMAGE)) == Kernel("convert", ((1, 4, 10, 10),))
    assert conversion(last_call(nn.Linear(16, 4), ROWS)) == Kernel("convert", ((28,),))
    assert conversion(last_call(Calls(lambda m, x: x[x > 0].sin()), ROWS)) is None
    assert conversion(last_call(Calls(lambda m, x: x.flatten()[x.flatten().nonzero()].mT), ROWS)) is None


def test_activations_are_folded_where_they_cut_a_range_that_holds_zero() -> None:
    def fuses(activation: nn.Module) -> bool:
        return ONNX_RUNTIME.fuses(last_call(activation, ROWS))

    assert fuses(nn.ReLU())
    assert fuses(nn.ReLU6())
    assert fuses(nn.Hardtanh(-1, 2))
    assert not fuses(nn.Hardtanh(0.5, 2))
    assert not fuses(nn.GELU())


@pytest.mark.parametrize(
    ("model", "x", "integers"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(2, 4), True),
        (nn.Sequential(nn.Linear(4, 3), nn.GELU()), torch.randn(2, 4), False),
        (nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh()), torch.randn(2, 4), False),  # a product, with no Gemm
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(2, 5, 4), False),
        (nn.Linear(4, 3), torch.randn(2, 4), False),
    ],
)
def test_a_flat_layer_gives_integers_where_its_activation_would_be_merged(
    model: nn.Module, x: torch.Tensor, integers: bool
) -> None:
    (node,) = lobo_fx.trace(model, x).graph.find_nodes(op="call_function", target=aten.linear.default)
    assert ONNX_RUNTIME.gives_integers(node) == integers


def test_an_operator_stands_in_one_line() -> None:
    add: Any = torch.ops.aten.add.Tensor
    line = IntegerKernel(frozenset({add}), lambda node, sizes: "", lambda node: None)
    with pytest.raises(AssertionError, match="one line only"):
        KernelTable("twice", (line, line), frozenset(), frozenset())
    with pytest.raises(AssertionError, match="one line only"):
        KernelTable("computes and passes", (line,), frozenset({add}), frozenset())


def test_the_default_runtime_has_a_table_and_others_are_refused() -> None:
    assert kernel_table(RUNTIMES.default) is ONNX_RUNTIME
    with pytest.raises(
        lobo_fx.InvalidInput, match="no integer kernels of the runtime 'onnxruntim' are known; did you mean onn"
    ):
        kernel_table("onnxruntim")


def test_a_kernel_is_described_at_sizes_that_are_not_those_traced() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(288, 5)).eval()
    program = lobo_fx.trace(model, torch.randn(2, 8, 8, 8))

    class Wider(Sizes):
        def shape(self, node: fx.Node) -> tuple[int, ...] | None:
            traced = one_row(node)
            return None if traced is None else tuple(2 * size if size == 8 else size for size in traced)

        def argument(self, node: fx.Node, name: str) -> Any:
            return 4

    conv, linear = (node for node in program.graph.nodes if ONNX_RUNTIME.line(node) is not None)
    line = ONNX_RUNTIME.line(conv)
    assert line is not None
    traced, wider = (line.describe(conv, sizes) for sizes in (TRACED, Wider()))
    assert isinstance(traced, Kernel)
    assert isinstance(wider, Kernel)
    assert traced.shapes == ((1, 8, 8, 8), (8, 4, 3, 3))
    assert wider.shapes == ((1, 16, 16, 16), (16, 4, 3, 3))
    assert (dict(traced.settings)["groups"], dict(wider.settings)["groups"]) == (2, 4)
    line = ONNX_RUNTIME.line(linear)
    assert line is not None
    assert line.describe(linear, Wider()) == line.describe(linear, TRACED)
