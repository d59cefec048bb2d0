"""What free axes are used as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lobo_fx.axes import KINDS, Axis, Inference, kind
from lobo_fx.axes.axis import Form, concatenation, product
from lobo_fx.axes.members import members
from lobo_fx.axes.survey import survey
from lobo_fx.axes.unification import unify
from lobo_fx.capture.tracing import trace

Tensor = torch.Tensor


class Parts(nn.Module):
    """A function of parts that it owns, as named."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def kinds(model: nn.Module, x: Tensor) -> dict[tuple[int, str], int]:
    """How many free axes there are, by size and kind."""
    inference = Inference(trace(model.eval(), (x,))).run()
    found: dict[tuple[int, str], int] = {}
    for leaf in members(inference):
        key = (leaf.size, kind(leaf))
        found[key] = found.get(key, 0) + 1
    surveyed = sorted((axis.size, axis.kind) for axis in survey(inference).axes)
    assert surveyed == sorted(key for key, count in found.items() for _ in range(count))
    return found


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8)


def tokens(width: int = 6) -> Tensor:
    return torch.randn(2, 5, width)


def residual_block() -> tuple[nn.Module, Tensor]:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        x = x + m.second(m.norm(m.first(x)).relu())
        result: Tensor = m.head(x.mean((2, 3)))
        return result

    parts = {"stem": nn.Conv2d(3, 8, 3), "first": nn.Conv2d(8, 7, 3, padding=1), "norm": nn.BatchNorm2d(7)}
    return Parts(body, **parts, second=nn.Conv2d(7, 8, 3, padding=1), head=nn.Linear(8, 5)), images()


def transformer_block() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True)
    patches = nn.Conv2d(3, 12, 4, stride=4)
    body = lambda m, x: m.head(m.layer(m.patches(x).flatten(2).mT + m.places)[:, 0])  # noqa: E731
    return Parts(body, patches=patches, layer=layer, places=torch.randn(4, 12), head=nn.Linear(12, 5)), images()


def grouped_queries() -> tuple[nn.Module, Tensor]:
    """Both factors of the query heads are heads."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        result: Tensor = m.out(y.transpose(1, 2).flatten(2))
        return result

    parts = {"q": nn.Linear(6, 24), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8), "out": nn.Linear(24, 5)}
    return Parts(body, **parts), tokens()


def tagger() -> tuple[nn.Module, Tensor]:
    body = lambda m, x: m.out(m.rnn(m.embed(x))[0])  # noqa: E731
    parts = {"embed": nn.Embedding(10, 7), "rnn": nn.LSTM(7, 8, batch_first=True), "out": nn.Linear(8, 5)}
    return Parts(body, **parts), torch.randint(0, 10, (2, 5))


def grouped_convolutions() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.ReLU(), nn.Conv2d(18, 5, 1)]
    return nn.Sequential(*layers), images(4)


def depthwise_convolution() -> tuple[nn.Module, Tensor]:
    """Twin of grouped convolutions: groups of one channel are channels."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1)), images()


def perceptron() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 5)), tokens()


def perceptron_of_matrices() -> tuple[nn.Module, Tensor]:
    body = lambda m, x: (x @ m.a).relu() @ m.b.t()  # noqa: E731
    return Parts(body, a=torch.randn(6, 8), b=torch.randn(5, 8)), tokens()


def mixing_perceptron() -> tuple[nn.Module, Tensor]:
    """A depthwise convolution between two linear layers mixes no channels."""

    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.mix(m.a(x).mT).mT)
        return result

    return Parts(body, a=nn.Linear(6, 8), mix=nn.Conv1d(8, 8, 3, padding=1, groups=8), b=nn.Linear(8, 5)), tokens()


def excitation() -> tuple[nn.Module, Tensor]:
    """Linear layers read the channels and write their gate; channels they are all the same."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        gate = m.up(m.down(x.mean((2, 3))).relu()).sigmoid()
        result: Tensor = m.b(x * gate[:, :, None, None])
        return result

    return (
        Parts(body, a=nn.Conv2d(3, 8, 1), down=nn.Linear(8, 4), up=nn.Linear(4, 8), b=nn.Conv2d(8, 5, 1)),
        images(),
    )


def bias_added_apart() -> tuple[nn.Module, Tensor]:
    """Twin of the residual block: what is added was not computed."""
    body = lambda m, x: m.b(m.a(x) + m.bias.view(1, -1, 1, 1))  # noqa: E731
    return Parts(body, a=nn.Conv2d(3, 8, 1), bias=torch.randn(8), b=nn.Conv2d(8, 5, 1)), images()


def embedding_alone() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 5)), torch.randint(0, 10, (2, 5))


EXPECTED: dict[Callable[[], tuple[nn.Module, Tensor]], dict[tuple[int, str], int]] = {
    residual_block: {(8, "residual"): 1, (7, "channels"): 1},
    transformer_block: {(12, "residual"): 1, (3, "heads"): 1, (4, "head_dim"): 1, (20, "hidden"): 1},
    grouped_queries: {(2, "heads"): 1, (3, "heads"): 1, (4, "head_dim"): 2},
    tagger: {(7, "width"): 1, (8, "hidden"): 1},
    grouped_convolutions: {(3, "groups"): 1, (4, "channels"): 1, (6, "channels"): 1},
    depthwise_convolution: {(8, "channels"): 1},
    perceptron: {(8, "hidden"): 1},
    perceptron_of_matrices: {(8, "hidden"): 1},
    mixing_perceptron: {(8, "hidden"): 1},
    excitation: {(8, "channels"): 1, (4, "hidden"): 1},
    bias_added_apart: {(8, "channels"): 1},
    embedding_alone: {(8, "width"): 1},
}


@pytest.mark.parametrize("make", EXPECTED)
def test_kinds(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    torch.manual_seed(0)
    assert kinds(*make()) == EXPECTED[make]


def test_every_kind_is_expected_somewhere() -> None:
    assert {kind for expected in EXPECTED.values() for _, kind in expected} == set(KINDS)


@pytest.mark.parametrize("join", [product, concatenation])
def test_parts_have_the_roles_of_the_whole(join: Callable[[list[Axis]], Axis]) -> None:
    """Whether it was marked before it was taken apart, or after."""
    for early in (True, False):
        whole, made = Axis(8), join([Axis(4), Axis(2 if join is product else 4)])
        if early:
            whole.mark("channels")
        unify(whole, made)
        if not early:
            whole.mark("channels")
        assert [kind(leaf) for leaf in whole.leaves()] == ["channels", "channels"]
        assert whole.find().form is not Form.LEAF
