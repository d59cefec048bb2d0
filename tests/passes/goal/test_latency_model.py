"""Times at any widths, from a table that is a formula and a profile that is made up."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lobo_fx
from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.members import members
from lobo_fx.graph.operators import is_call
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes.goal.latency_model import LatencyModel
from lobo_fx.passes.quantization.integers.kernels import ONNX_RUNTIME
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

Times = Mapping[str, list[float]]
aten = torch.ops.aten
UNMATCHED = 12.0


def cost(kernel: Kernel) -> Cost | NoCost:
    """Linear in every size."""
    if kernel.operator == "conv":
        (_, inputs, height, width), (outputs, *_, window) = kernel.shapes
        time = 5 + 0.01 * inputs + 0.02 * outputs + 1e-4 * inputs * outputs * height * width * window
        return Cost(time, 1 + 0.4 * time)
    if kernel.operator == "linear":
        (*_, inputs), (_, outputs) = kernel.shapes
        return Cost(2 + 0.01 * inputs * outputs, 1 + 0.004 * inputs * outputs)
    if kernel.operator == "convert":
        elements = math.prod(kernel.shapes[0])
        return Cost(1 + 0.001 * elements, 0.5 + 0.002 * elements)
    if kernel.operator == "attention":
        (_, heads, length, width), _, (*_, own) = kernel.shapes
        return Cost(1 + 0.01 * heads * length * (width + own), 4 + 0.001 * heads * length * (width + own))
    return NoCost("it is not in the formula")


class Formula(CostTable):
    """A table that knows every kernel of the formula, and which it was asked for."""

    def __init__(self) -> None:
        super().__init__("formula", {})
        self.asked: set[Kernel] = set()

    def find(self, kernel: Kernel) -> Cost | NoCost:
        self.asked.add(kernel)
        return cost(kernel)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.second(self.first(x).relu()).tanh().mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.inside(x).view(x.shape[0], 6, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return self.outside(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def axes_of(model: nn.Module, example: torch.Tensor) -> tuple[Inference, list[Axis]]:
    inference = Inference(lobo_fx.trace(model.eval(), example)).run()
    return inference, list(members(inference))


IMAGES, LEAVES = axes_of(Images(), torch.randn(2, 3, 8, 8))
PROFILE: Times = {"conv2d": [9.0], "conv2d_1": [20.0, 4.0], "tanh": [9.0], "mean": [6.0], "linear": [7.0]}


def model(times: Times, inference: Inference = IMAGES) -> LatencyModel:
    found = LatencyModel(inference, ONNX_RUNTIME, times)
    found.price(Formula())
    return found


def whole(leaves: Collection[Axis] = LEAVES) -> dict[Axis, int]:
    return {leaf: leaf.size for leaf in leaves}


def kernels(first: int, second: int) -> dict[str, Cost]:
    """What the formula says of the three layers at these widths."""
    settings = (("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (1, 1)), ("groups", 1))
    described = {
        "conv2d": Kernel("conv", ((1, 3, 8, 8), (first, 3, 3, 3)), settings),
        "conv2d_1": Kernel("conv", ((1, first, 8, 8), (second, first, 1, 1)), settings),
        "linear": Kernel("linear", ((1, second), (second, 10))),
    }
    found = {name: cost(kernel) for name, kernel in described.items()}
    return {name: entry for name, entry in found.items() if isinstance(entry, Cost)}


def test_the_network_is_what_these_tests_take_it_for() -> None:
    assert [leaf.size for leaf in LEAVES] == [32, 48]
    assert PROFILE.keys() <= {n.name for n in IMAGES.program.graph.nodes}


@pytest.mark.parametrize("unmatched", [0.0, UNMATCHED])
def test_at_full_widths_the_sum_is_that_of_the_profile(unmatched: float) -> None:
    times = {**PROFILE, **({"": [unmatched / 3, 2 * unmatched / 3]} if unmatched else {})}
    found = model(times).sum(LEAVES)
    alone = kernels(32, 48)
    assert all(0.5 <= PROFILE[name][0] / alone[name].floating <= 2 for name in alone)
    assert found(whole()) == pytest.approx(sum(map(sum, PROFILE.values())) + unmatched, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(first=st.integers(8, 32), second=st.integers(8, 48))
def test_between_the_sizes_measured_a_formula_linear_in_each_is_exact(first: int, second: int) -> None:
    found = model({}).sum(LEAVES)
    expected = sum(entry.floating for entry in kernels(first, second).values())
    assert found(dict(zip(LEAVES, (first, second), strict=True))) == pytest.approx(expected, rel=1e-9)


def test_kernels_are_scaled_by_what_they_take_within_the_file_and_the_rest_by_its_elements() -> None:
    found = model({**PROFILE, "": [UNMATCHED]}).sum(LEAVES)
    at_whole, narrow = kernels(32, 48), kernels(16, 24)
    expected = sum(PROFILE[name][0] * narrow[name].floating / at_whole[name].floating for name in narrow)
    # tanh reads and gives 48 × 64 elements, mean reads them and gives 48; a call takes 1.5 µs however little it does.
    expected += 1.5 + (9 - 1.5) / 2 + 1.5 + (6 - 1.5) / 2
    # The second node of conv2d_1 (a change of layout, say) grows with the weight, of 32 × 48.
    expected += 1.5 + (4 - 1.5) / 4
    # What belongs to no node is spread by elements; weights of layers count as theirs.
    sizes = {
        (32, 48): (27 * 32, 2 * 64 * 32, 32 * 48, 2 * 64 * 48, 65 * 48, 480),
        (16, 24): (27 * 16, 2 * 64 * 16, 16 * 24, 2 * 64 * 24, 65 * 24, 240),
    }
    expected += UNMATCHED * sum(sizes[16, 24]) / sum(sizes[32, 48])
    assert found(dict(zip(LEAVES, (16, 24), strict=True))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("time", "scale"), [(1.0, 0.5), (1e6, 2.0)])
def test_a_profile_moves_a_kernel_no_further_than_by_half_or_twice(time: float, scale: float) -> None:
    found = model({"linear": [time]}).sum(LEAVES)
    alone = kernels(32, 48)
    expected = alone["conv2d"].floating + alone["conv2d_1"].floating + scale * alone["linear"].floating
    assert found(whole()) == pytest.approx(expected, rel=1e-9)


def converted(shape: tuple[int, ...], to_float: bool) -> float:
    found = cost(Kernel("convert", (shape,)))
    assert isinstance(found, Cost)
    return found.integer if to_float else found.floating


@pytest.mark.parametrize(("first", "second"), [(32, 48), (16, 24)])
def test_conversions_stand_where_integers_meet_float(first: int, second: int) -> None:
    widths = dict(zip(LEAVES, (first, second), strict=True))
    layers = kernels(first, second)
    into, middle, last = (1, 3, 8, 8), (1, first, 8, 8), (1, second, 8, 8)
    cases: dict[tuple[str, ...], float] = {
        (): 0,
        ("conv2d",): converted(into, False) + converted(middle, True),
        ("conv2d_1",): converted(middle, False) + converted(last, True),
        ("conv2d", "conv2d_1"): converted(into, False) + converted(last, True),
        ("linear",): converted((second,), False),  # gives float by itself
        ("conv2d", "conv2d_1", "linear"): converted(into, False) + converted(last, True) + converted((second,), False),
    }
    for integers, conversions in cases.items():
        expected = sum(c.integer if name in integers else c.floating for name, c in layers.items()) + conversions
        assert model({}).sum(LEAVES, integers)(widths) == pytest.approx(expected, rel=1e-9), integers


def test_an_integer_kernel_is_scaled_as_the_float_one_is_within_the_file() -> None:
    integers = ("conv2d", "conv2d_1", "linear")
    plain, scaled = model({}).sum(LEAVES, integers), model({"conv2d": [12.0]}).sum(LEAVES, integers)
    conv = kernels(32, 48)["conv2d"]
    gained = conv.integer * (12 / conv.floating - 1)
    assert scaled(whole()) - plain(whole()) == pytest.approx(gained, rel=1e-9)


def test_attention_is_fused_or_not_by_what_is_faster_at_its_size() -> None:
    inference, leaves = axes_of(Attention(), torch.randn(2, 6, 64))
    found = model({}, inference)
    (attention,) = [n for n in found.grids if is_call(n, aten.scaled_dot_product_attention.default)]
    heads = [leaf for leaf in leaves if leaf.size == 4]
    (term,) = [term for term in found.sum(leaves).terms if term.name == attention.name]
    assert set(heads) < set(term.leaves)
    seen = set()
    for width in (1, 2, 3, 4):
        sizes = whole(leaves) | dict.fromkeys(heads, width)
        several, fused = 1 + 0.01 * width * 6 * 32, 4 + 0.001 * width * 6 * 32
        assert term(sizes) == pytest.approx(min(several, fused), rel=1e-9)
        seen.add(several < fused)
    assert seen == {True, False}


class Long(nn.Module):
    def __init__(self, first: int = 64, second: int = 128) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, first, 1), nn.Conv2d(first, second, 1), nn.Linear(second, 10)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


class OfRegisters(Formula):
    """Whole registers of outputs count in float, and of inputs too as integers."""

    def find(self, kernel: Kernel) -> Cost | NoCost:
        if kernel.operator != "conv":
            return NoCost("it is not in the formula")
        (_, inputs, *_), (outputs, *_) = kernel.shapes
        filled = 16 * math.ceil(outputs / 16)
        return Cost(inputs * filled, 16 * math.ceil(inputs / 16) * filled)


REGISTERS = [(64, 128), (32, 96), (40, 72), (24, 128), (56, 104), (41, 73), (33, 79), (47, 65)]
"""Widths; those that fill no whole number of registers leave part of one empty."""


@pytest.mark.parametrize(
    ("network", "widths"),
    [
        *(((64, 128), widths) for widths in REGISTERS),
        ((72, 100), (72, 100)),
        ((72, 100), (71, 97)),
        *(((1024, 512), widths) for widths in ((40, 40), (56, 200), (1000, 8))),
        ((65, 128), (60, 80)),
    ],
)
@pytest.mark.parametrize("is_integer", [False, True])
def test_registers_filled_in_part_take_as_long_as_whole_ones(
    network: tuple[int, int], widths: tuple[int, int], is_integer: bool
) -> None:
    inference, leaves = axes_of(Long(*network), torch.randn(2, 3, 8, 8))
    found = LatencyModel(inference, ONNX_RUNTIME, {})
    found.price(OfRegisters())
    found.conversions.clear()
    total = found.sum(leaves, ("conv2d", "conv2d_1") if is_integer else ())(dict(zip(leaves, widths, strict=True)))
    first, second = (16 * math.ceil(width / 16) for width in widths)
    expected = 16 * first + first * second if is_integer else 3 * first + widths[0] * second
    assert total == pytest.approx(expected, rel=1e-9)


class Overhead(OfRegisters):
    """Takes a while however narrow it is; only whole registers of outputs count."""

    empty = 1.0
    """The time of the empty part of a register, over what it takes if it is full."""

    def find(self, kernel: Kernel) -> Cost | NoCost:
        if kernel.operator != "conv":
            return NoCost("it is not in the formula")
        (_, inputs, *_), (outputs, *_) = kernel.shapes
        return Cost(72 + inputs * (outputs + self.empty * (-outputs % 16)), 1)


class AlmostEven(Overhead):
    empty = 0.2


class FarFromEven(Overhead):
    empty = 30.0


@pytest.mark.parametrize(
    ("table", "counted"), [(Overhead(), 1.0), (AlmostEven(), 0.0), (FarFromEven(), 2.0)], ids=["whole", "noise", "far"]
)
@pytest.mark.parametrize("widths", [(8, 8), (24, 40), (40, 24), (60, 120)])
def test_an_empty_part_of_a_register_takes_no_more_than_twice_what_a_full_one_does(
    table: CostTable, counted: float, widths: tuple[int, int]
) -> None:
    inference, leaves = axes_of(Long(), torch.randn(2, 3, 8, 8))
    found = LatencyModel(inference, ONNX_RUNTIME, {})
    found.price(table)
    first, second = (width + counted * (-width % 16) for width in widths)
    expected = 72 + 3 * first + 72 + widths[0] * second
    assert found.sum(leaves)(dict(zip(leaves, widths, strict=True))) == pytest.approx(expected, rel=1e-9)


def test_a_kernel_without_a_cost_takes_what_the_profile_says() -> None:
    class NoLinear(Formula):
        def find(self, kernel: Kernel) -> Cost | NoCost:
            return NoCost("not measured") if kernel.operator == "linear" else super().find(kernel)

    found = LatencyModel(IMAGES, ONNX_RUNTIME, {"linear": [7.0]})
    found.price(NoLinear())
    alone = kernels(32, 48)
    convolutions = alone["conv2d"].floating + alone["conv2d_1"].floating
    assert found.sum(LEAVES)(whole()) == pytest.approx(convolutions + 7, rel=1e-9)
    half = found.sum(LEAVES)({LEAVES[0]: 32, LEAVES[1]: 24})
    assert half == pytest.approx(
        sum(kernels(32, 24)[n].floating for n in ("conv2d", "conv2d_1")) + 1.5 + 2.75, rel=1e-9
    )


@pytest.mark.parametrize(("network", "most"), [(Images, 80), (Long, 130)])
def test_what_is_priced_is_what_a_table_is_asked_for(network: type[nn.Module], most: int) -> None:
    found, formula = LatencyModel(axes_of(network(), torch.randn(2, 3, 8, 8))[0], ONNX_RUNTIME, {}), Formula()
    found.price(formula)
    assert formula.asked == set(found.priced)
    assert any(grid.uneven for grid in found.grids.values()) == (network is Long)
    assert len(found.priced) < most


def test_axes_that_are_not_chosen_stay_whole_and_terms_name_their_modules() -> None:
    found = model({}).sum(LEAVES[:1])
    assert found({LEAVES[0]: 16}) == pytest.approx(sum(c.floating for c in kernels(16, 48).values()), rel=1e-9)
    assert {term.name for term in found.terms} == {"first", "second", "head"}


class Groups(nn.Module):
    def __init__(self, into: int = 64, out: int = 128, groups: int = 4) -> None:
        super().__init__()
        self.into, self.grouped = nn.Conv2d(3, into, 1), nn.Conv2d(into, out, 3, padding=1, groups=groups)
        self.out = nn.Conv2d(out, 8, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.grouped(self.into(x).relu()).relu())


class OfGroups(Formula):
    """Linear in groups and in channels of each; knows no convolution whose sizes contradict each other."""

    def find(self, kernel: Kernel) -> Cost | NoCost:
        if kernel.operator != "conv":
            return NoCost("it is not in the formula")
        (_, inputs, *_), (outputs, each, *_) = kernel.shapes
        groups = dict(kernel.settings)["groups"]
        assert isinstance(groups, int)
        if inputs != groups * each or outputs % groups:
            return NoCost("its sizes contradict each other")
        return Cost(1 + groups * (2 + each) * (3 + outputs // groups), 1)


def test_channels_and_their_groups_are_sized_together() -> None:
    inference, leaves = axes_of(Groups(), torch.randn(2, 3, 8, 8))
    assert sorted(leaf.size for leaf in leaves) == [4, 16, 32], "groups, and the channels of each on either side"
    by_size = {leaf.size: leaf for leaf in leaves}
    found = LatencyModel(inference, ONNX_RUNTIME, {})
    found.price(OfGroups())
    for groups, each, others in ((4, 16, 32), (2, 16, 32), (3, 8, 32), (1, 12, 16), (4, 10, 20)):
        widths = {by_size[4]: groups, by_size[16]: each, by_size[32]: others}
        terms = {term.name: term(widths) for term in found.sum(leaves).terms}
        assert terms["grouped"] == pytest.approx(1 + groups * (2 + each) * (3 + others), rel=1e-9)
        assert terms["into"] == pytest.approx(1 + (2 + 3) * (3 + groups * each), rel=1e-9)


def test_a_number_of_groups_fills_no_register() -> None:
    found = LatencyModel(axes_of(Groups(256, 256, groups=64), torch.randn(2, 3, 8, 8))[0], ONNX_RUNTIME, {})
    uneven = {node.name: [axis.size for axis in grid.uneven] for node, grid in found.grids.items()}
    assert uneven == {"conv2d": [256], "conv2d_1": [], "conv2d_2": [256]}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        return (self.second(x) + x).sin()


LAYERS: Times = {"conv2d": [9.0], "conv2d_1": [20.0]}


class OfSums(Formula):
    def find(self, kernel: Kernel) -> Cost | NoCost:
        return Cost(50, 30) if kernel.operator == "add" else super().find(kernel)


@pytest.mark.parametrize(
    ("times", "integers", "expected"),
    [
        ({}, (), 50),
        (LAYERS, (), 0),
        ({**LAYERS, "add": [40.0]}, (), 40),
        (LAYERS, ("add",), 30),
        (LAYERS, ("conv2d",), 0),  # it is the other layer that it runs within
        (LAYERS, ("conv2d_1",), 50),  # integers are converted before the sum, so that it is one of its own
    ],
)
def test_a_sum_within_the_kernel_of_a_layer_takes_no_time_of_its_own(
    times: Times, integers: Collection[str], expected: float
) -> None:
    inference, leaves = axes_of(Residual(), torch.randn(2, 3, 8, 8))
    found = LatencyModel(inference, ONNX_RUNTIME, times)
    found.price(OfSums())
    found.conversions.clear()
    sums = [term for term in found.sum(leaves, integers).terms if term.name == "add"]
    assert sum(term(whole(leaves)) for term in sums) == pytest.approx(expected, rel=1e-9)


class Pooled(nn.Module):
    def __init__(self, pools: int) -> None:
        super().__init__()
        self.pools, self.stem, self.next = pools, nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for _ in range(self.pools):
            x = F.max_pool2d(x, 2)
        return self.next(x)


class OfPools(Formula):
    def find(self, kernel: Kernel) -> Cost | NoCost:
        return Cost(5, 5 + kernel.shapes[0][1]) if kernel.operator == "max_pool" else super().find(kernel)


@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize(
    ("integers", "slowed"),
    [
        ((), False),
        (("conv2d_1",), True),  # the runtime converts what the first pool reads
        (("conv2d", "conv2d_1"), False),
    ],
)
def test_pools_between_a_float_layer_and_an_integer_one_read_integers(
    integers: Collection[str], slowed: bool, pools: int
) -> None:
    inference, leaves = axes_of(Pooled(pools), torch.randn(2, 3, 8, 8))
    found = LatencyModel(inference, ONNX_RUNTIME, {})
    found.price(OfPools())
    (channels,) = leaves
    for width in (16, 32):
        given = [term({channels: width}) for term in found.sum(leaves, integers).terms if term.name != "next"]
        stem = cost(Kernel("conv", ((1, 3, 8, 8), (width, 3, 1, 1))))
        assert isinstance(stem, Cost)
        expected = stem.integer if "conv2d" in integers else stem.floating
        expected += converted((1, 3, 8, 8), False) if "conv2d" in integers else 0
        expected += pools * width + converted((1, width, 8, 8), False) if slowed else 0
        assert sum(given) == pytest.approx(expected, rel=1e-9)


def test_a_concatenation_of_many_tensors_has_no_grid() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv2d(3, 16, 1) for _ in range(25))
            self.next = nn.Conv2d(400, 8, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.next(torch.cat([part(x) for part in self.parts], 1))

    inference, leaves = axes_of(Many(), torch.randn(2, 3, 8, 8))
    assert len(leaves) == 25
    found = model({"cat": [9.0]}, inference)
    assert len(found.priced) < 200
    grown = [term for term in found.sum(leaves).terms if term.name == "cat"]
    assert sum(term(whole(leaves)) for term in grown) == pytest.approx(9)
    half = sum(term(dict.fromkeys(leaves, 8)) for term in grown)
    assert half == pytest.approx(1.5 + 7.5 / 2)
