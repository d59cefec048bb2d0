"""Costs as sums over widths, against what the axes say of a removal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lobo_fx
from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.cost import file_size_after, macs_after
from lobo_fx.axes.members import members
from lobo_fx.passes.goal.terms import Sum, Term, macs, stored_bytes

IMAGES, SEQUENCES = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.inside(x).view(x.shape[0], x.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.outside(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Joined(nn.Module):
    """Two branches side by side, and a weight that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 10, 3, padding=1), nn.Conv2d(16, 5, 1)
        self.again = nn.Conv2d(5, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.out(torch.cat([self.a(x), self.b(x)], 1)).relu()
        return self.again(self.again(x)).mean((2, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 16, 3),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 16, 3, groups=4),
            nn.ConvTranspose2d(16, 6, 2, stride=2),
            nn.Flatten(),
            nn.Linear(6 * 64, 7),
        ),
        IMAGES,
    ),
    "attention": (Attention, SEQUENCES),
    "joined": (Joined, IMAGES),
}


@functools.cache
def axes_of(name: str) -> tuple[Inference, tuple[Axis, ...]]:
    make, example = NETWORKS[name]
    inference = Inference(lobo_fx.trace(make().eval(), example)).run()
    return inference, tuple(members(inference))


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_sums_are_what_the_axes_say_of_any_removal(name: str, data: st.DataObject) -> None:
    inference, leaves = axes_of(name)
    widths = {leaf: data.draw(st.integers(1, leaf.size)) for leaf in leaves}
    removal = {leaf: torch.arange(leaf.size) < width for leaf, width in widths.items()}
    counted, stored = macs(inference, leaves), stored_bytes(inference, leaves)
    assert counted(widths) == macs_after(inference, removal)
    assert stored(widths) == file_size_after(inference, removal)
    for sum_ in (counted, stored):
        leaf = data.draw(st.sampled_from(leaves))
        options = [1, leaf.size]
        along = sum_.along(leaf, options, widths)
        whole = [sum_({**widths, leaf: option}) for option in options]
        assert along[1] - along[0] == pytest.approx(whole[1] - whole[0], rel=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_leaves_that_are_not_chosen_keep_their_sizes(name: str) -> None:
    inference, leaves = axes_of(name)
    chosen = leaves[:1]
    removal = {chosen[0]: torch.arange(chosen[0].size) < 1}
    assert macs(inference, chosen)({chosen[0]: 1}) == macs_after(inference, removal)
    assert stored_bytes(inference, chosen)({chosen[0]: 1}) == file_size_after(inference, removal)


def test_codes_take_a_byte_where_a_weight_has_two_dimensions() -> None:
    inference, leaves = axes_of("convolutions")
    whole = {leaf: leaf.size for leaf in leaves}
    tensors = [inference.program.parameter(read) for read in inference.program.graph.find_nodes(op="get_attr")]
    expected = sum(t.numel() * (1 if t.dim() > 1 else t.element_size()) for t in {id(t): t for t in tensors}.values())
    assert stored_bytes(inference, leaves, bits=8)(whole) == expected


def test_sums_add_and_scale_and_ask_each_value_once() -> None:
    leaf, other = Axis(4), Axis(6)
    asked: list[int] = []

    def value(widths: Any) -> float:
        asked.append(widths[leaf])
        return float(widths[leaf])

    first = Sum([leaf, other], [Term((leaf,), value, "a")])
    second = Sum([leaf, other], [Term((leaf, other), lambda w: float(w[leaf] * w[other])), Term((), lambda w: 7.0)])
    total = first.scaled(2) + second
    assert total({leaf: 3, other: 5}) == 2 * 3 + 15 + 7
    assert total.along(other, [1, 5], {leaf: 3, other: 5}) == [3, 15]
    assert [term.name for term in total.terms] == ["a", "", ""]
    assert total({leaf: 3, other: 6}) == 2 * 3 + 18 + 7
    assert asked == [3]
