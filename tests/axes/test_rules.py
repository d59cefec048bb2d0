"""Every family of axis rules against brute force: remove half of every free axis, and compare with zeroing it.

Each case says by hand which axes must be free, so that a rule that locks too much fails like one that locks too
little.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lobo_fx import InvalidInput
from lobo_fx.axes import NOWHERE, Axis, Call, Inference, any_of, axis_rule
from lobo_fx.axes.call import Axes
from lobo_fx.axes.members import members
from lobo_fx.axes.removal import Removal
from lobo_fx.axes.surgery import remove, zero
from lobo_fx.axes.survey import survey
from lobo_fx.capture.tracing import trace
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate

Tensor = torch.Tensor


class Net(nn.Module):
    """A function of inputs, and of parts that it owns."""

    def __init__(self, body: Callable[..., Any], *inputs: Tensor, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body, self.inputs = body, inputs
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.body(self, x) if y is None else self.body(self, x, y)


@dataclasses.dataclass(frozen=True)
class Case:
    """What must come of a network.

    Attributes:
        make: builds it.
        exact: sizes of the free axes whose removal equals zeroing.
        inexact: sizes of the free axes over which statistics run.
        rows: whether the first dimension of inputs and outputs counts rows.
    """

    make: Callable[[], Net]
    exact: tuple[int, ...]
    inexact: tuple[int, ...]
    rows: bool


CASES: dict[str, Case] = {}


def case(
    *exact: int, inexact: Sequence[int] = (), rows: bool = True
) -> Callable[[Callable[[], Net]], Callable[[], Net]]:
    def register(make: Callable[[], Net]) -> Callable[[], Net]:
        name = make.__name__
        assert name not in CASES
        CASES[name] = Case(make, exact, tuple(inexact), rows)
        return make

    return register


def images(channels: int = 3, side: int = 8) -> Tensor:
    return torch.randn(2, channels, side, side)


def tokens(width: int = 6, length: int = 5) -> Tensor:
    return torch.randn(2, length, width)


def rows(width: int = 6) -> Tensor:
    return torch.randn(2, width)


def branches(functions: Iterable[Callable[[Tensor], Tensor]], x: Tensor, layer: Callable[[int, int], nn.Module]) -> Net:
    """Each function on 8 channels of its own, with an output of its own: tracing takes longer than all else here."""
    chosen = list(functions)

    def body(m: Any, x: Tensor) -> Any:
        return tuple(b(function(a(x))) for a, function, b in zip(m.a, chosen, m.b, strict=True))

    a, b = (nn.ModuleList(layer(*widths) for _ in chosen) for widths in ((x.shape[1], 8), (8, 5)))
    return Net(body, x, a=a, b=b)


def settle(model: nn.Module) -> nn.Module:
    """Norms that are no identity, as after training."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


def infer(net: Net) -> Inference:
    return Inference(trace(settle(net), net.inputs)).run()


def halves(leaves: Sequence[Axis]) -> Removal:
    """Masks that keep a random half of each axis."""
    removal = {}
    for leaf in leaves:
        mask = torch.ones(leaf.size, dtype=torch.bool)
        mask[torch.randperm(leaf.size)[: leaf.size // 2]] = False
        removal[leaf] = mask
    return removal


def outputs(program: Program, inputs: Inputs | None = None) -> list[Tensor]:
    return [leaf for leaf in Inputs((program.run(inputs),)).tensors if leaf.is_floating_point()]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest difference of each output, as a share of its largest magnitude."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return [float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in zip(found, expected, strict=True)]


def removed(program: Program, which: Callable[[Axis], bool]) -> tuple[list[Tensor], list[Tensor], Program]:
    """Outputs with a half of each chosen axis zeroed, outputs with it removed, and the smaller program."""
    program = program.clone()
    inference = Inference(program).run()
    found = members(inference)
    removal = halves([leaf for leaf in found if which(leaf)])
    before = {id(member.tensor): member.tensor.numel() for leaf in removal for member in found[leaf]}
    zero(inference, removal)
    zeroed = outputs(program)
    remove(inference, removal)
    for leaf in removal:
        assert leaf.find().size > 1
        for member in found[leaf]:
            assert member.tensor.numel() < before[id(member.tensor)]
    propagate(program.module)
    return zeroed, outputs(program), program


def sizes(leaves: Iterator[Axis]) -> list[int]:
    return sorted(leaf.size for leaf in leaves)


def check(
    make: Callable[[], Net],
    exact: Sequence[int],
    inexact: Sequence[int] = (),
    rows: bool = True,
    some: Callable[[list[float]], float] = max,
) -> Inference:
    """Asserts what must come of a network; `some` says whether any output must change, or every one (`min`)."""
    net = make()
    program = trace(settle(net), net.inputs)
    inference = Inference(program).run()
    assert not inference.unknown
    found = members(inference)
    why = {str(name): [str(axis) for axis in axes] for name, axes in _stored(inference)}
    assert sizes(leaf for leaf in found if not leaf.inexact) == sorted(exact), why
    assert sizes(leaf for leaf in found if leaf.inexact) == sorted(inexact), why
    original = outputs(program)
    if exact:
        zeroed, smaller, pruned = removed(program, lambda leaf: not leaf.inexact)
        assert max(errors(smaller, zeroed)) < 1e-5
        assert some(errors(zeroed, original)) > 1e-4
        if rows:
            longer = pruned.example_inputs.map(lambda x: torch.cat([x, x[:1]]))
            assert max(errors([y[:2] for y in outputs(pruned, longer)], smaller)) < 1e-5
    if inexact:
        zeroed, smaller, _ = removed(program, lambda leaf: bool(leaf.inexact))
        assert some(errors(smaller, zeroed)) > 1e-5
        zeroed, smaller, _ = removed(program, lambda leaf: True)
        assert [x.shape for x in smaller] == [x.shape for x in original]
    return inference


def _stored(inference: Inference) -> list[tuple[object, Axes]]:
    nodes = inference.program.graph.find_nodes(op="get_attr")
    return [(node.target, inference.of(node)) for node in nodes if inference.values[node] is not None]


# --- convolutions ------------------------------------------------------------------------------------------


@case(8)
def conv1d() -> Net:
    layers = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 5, 3))
    return Net(lambda m, x: m.layers(x), torch.randn(2, 3, 9), layers=layers)


@case(8)
def conv2d() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 5, 3, bias=False))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(8)
def conv3d() -> Net:
    layers = nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.GELU(), nn.Conv3d(8, 5, 1))
    return Net(lambda m, x: m.layers(x), torch.randn(2, 3, 4, 4, 4), layers=layers)


@case(8)
def conv_padded_to_the_same_size() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.Tanh(), nn.Conv2d(8, 5, 3, padding="valid"))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(3, 4, 6)
def grouped_conv() -> Net:
    layers = nn.Sequential(
        nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.ReLU(), nn.Conv2d(18, 5, 1)
    )
    return Net(lambda m, x: m.layers(x), images(4), layers=layers)


@case(2, 2, 3, 5)
def grouped_convs_with_different_groups() -> Net:
    """12 channels out of 2 groups (2 × 6) go into 4 groups (4 × 3): 2 × 2 × 3."""
    layers = nn.Sequential(
        nn.Conv2d(4, 2, 1), nn.Conv2d(2, 12, 3, groups=2), nn.Conv2d(12, 20, 3, groups=4), nn.Conv2d(20, 5, 1)
    )
    return Net(lambda m, x: m.layers(x), images(4), layers=layers)


@case(8)
def depthwise_conv() -> Net:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
    )
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(8, 2)
def depthwise_conv_with_multiplier() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Hardswish(), nn.Conv2d(16, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_conv(dims: int) -> None:
    conv: Any = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    transposed: Any = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1]

    def make() -> Net:
        layers = nn.Sequential(conv(3, 8, 1), nn.ReLU(), transposed(8, 6, 2, stride=2), nn.ReLU(), conv(6, 5, 1))
        return Net(lambda m, x: m.layers(x), torch.randn(2, 3, *[4] * dims), layers=layers)

    check(make, [6, 8])


@case(2, 4, 6)
def grouped_transposed_conv() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 12, 2, groups=2), nn.Conv2d(12, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(7, 4)
def residual_with_squeeze_and_excitation() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.conv(x).relu()
        y = y * m.up(m.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        result: Tensor = m.head(x + y)
        return result

    return Net(
        body,
        images(),
        stem=nn.Conv2d(3, 7, 1),
        conv=nn.Conv2d(7, 7, 3, padding=1),
        down=nn.Conv2d(7, 4, 1),
        up=nn.Conv2d(4, 7, 1),
        head=nn.Conv2d(7, 5, 1),
    )


# --- contractions ------------------------------------------------------------------------------------------


@case(8)
def linear() -> Net:
    return Net(lambda m, x: m.b(F.gelu(m.a(x))), rows(), a=nn.Linear(6, 8), b=nn.Linear(8, 5, bias=False))


@case(8)
def addmm() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.d, torch.addmm(m.b, x, m.a).relu(), m.c)

    return Net(body, rows(), a=torch.randn(6, 8), b=torch.randn(8), c=torch.randn(8, 5), d=torch.randn(5))


@case(8)
def mm_and_mv() -> Net:
    return Net(lambda m, x: torch.mv(torch.mm(x, m.a), m.b), rows(), a=torch.randn(6, 8), b=torch.randn(8))


@case(8)
def bmm() -> Net:
    return Net(lambda m, x: torch.bmm(m.a(x), m.b(x).mT), tokens(), a=nn.Linear(6, 8), b=nn.Linear(6, 8))


@case(8)
def baddbmm() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.baddbmm(m.bias, m.a(x), m.b(x).transpose(1, 2), alpha=0.5)

    return Net(body, tokens(), a=nn.Linear(6, 8), b=nn.Linear(6, 8), bias=torch.randn(1, 5, 5))


@case(8)
def matmul_of_many_rows_with_one_matrix() -> Net:
    return Net(lambda m, x: (x @ m.a).relu() @ m.b, torch.randn(2, 2, 4, 6), a=torch.randn(6, 8), b=torch.randn(8, 5))


@case(3, 8)
def matmul_with_broadcasting() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = ((x @ m.a).relu() @ m.b).sum(1)
        return result

    return Net(body, torch.randn(2, 1, 4, 6), a=torch.randn(3, 6, 8), b=torch.randn(3, 8, 5))


@case(8)
def matmul_with_a_vector() -> Net:
    return Net(lambda m, x: (x @ m.a).tanh() @ m.b, tokens(), a=torch.randn(6, 8), b=torch.randn(8))


@case(3, 4)
def einsum() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.einsum("bshd,hdo->bso", torch.einsum("bsi,hid->bshd", x, m.a).relu(), m.b)

    return Net(body, tokens(), a=torch.randn(3, 6, 4), b=torch.randn(3, 4, 5))


@case(4, 7)
def einsum_of_two_values() -> Net:
    """Linear attention: the keys' width is summed between values."""

    def body(m: Any, x: Tensor) -> Tensor:
        context = torch.einsum("bsd,bse->bde", m.k(x).relu(), m.v(x))
        result: Tensor = m.out(torch.einsum("bsd,bde->bse", m.q(x).relu(), context))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 7), out=nn.Linear(7, 5))


@case(2, 8)
def outer_product_summed() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x) + torch.outer(m.u, m.v).sum(0))
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), b=nn.Linear(8, 5), u=torch.ones(2), v=torch.randn(8))


# --- norms -------------------------------------------------------------------------------------------------


@case(inexact=[8])
def layer_norm() -> Net:
    return Net(lambda m, x: m.b(m.norm(m.a(x))), tokens(), a=nn.Linear(6, 8), norm=nn.LayerNorm(8), b=nn.Linear(8, 5))


@case(inexact=[8])
def layer_norm_without_weights() -> Net:
    return Net(lambda m, x: m.b(F.layer_norm(m.a(x), (8,))), tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(inexact=[8])
def rms_norm() -> Net:
    return Net(lambda m, x: m.b(m.norm(m.a(x))), tokens(), a=nn.Linear(6, 8), norm=nn.RMSNorm(8), b=nn.Linear(8, 5))


@case(3, inexact=[4])
def group_norm() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(8)
def group_norm_of_single_channels() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(8)
def instance_norm() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(8)
def l2_normalised_features() -> Net:
    """Zeros add nothing to a norm."""
    return Net(lambda m, x: m.b(F.normalize(m.a(x), dim=-1)), rows(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


# --- attention ---------------------------------------------------------------------------------------------


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@case(3, 4, 7)
def scaled_dot_product_attention() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part(x), 3) for part in (m.q, m.k, m.v))
        result: Tensor = m.out(joined(F.scaled_dot_product_attention(q, k, v)))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 21), out=nn.Linear(21, 5))


@case(3, 4, 7)
def causal_attention_with_a_mask() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part(x), 3) for part in (m.q, m.k, m.v))
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        result: Tensor = m.out(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 21), out=nn.Linear(21, 5))


@case(2, 3, 4, 7)
def grouped_query_attention() -> Net:
    """6 query heads on 2 key heads: 2 groups of 3."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads_of(m.q(x), 6), heads_of(m.k(x), 2), heads_of(m.v(x), 2)
        result: Tensor = m.out(joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 24), k=nn.Linear(6, 8), v=nn.Linear(6, 14), out=nn.Linear(42, 5))


def repeated_heads(x: Tensor, times: int) -> Tensor:
    """As Hugging Face's `repeat_kv`."""
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, times, s, d).reshape(b, h * times, s, d)


@case(2, 3, 4, 7)
def grouped_query_attention_by_expanding() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads_of(m.q(x), 6), heads_of(m.k(x), 2), heads_of(m.v(x), 2)
        y = F.scaled_dot_product_attention(q, repeated_heads(k, 3), repeated_heads(v, 3))
        result: Tensor = m.out(joined(y))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 24), k=nn.Linear(6, 8), v=nn.Linear(6, 14), out=nn.Linear(42, 5))


@case(3, 4, 7)
def softmax_attention_by_hand() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part(x), 3) for part in (m.q, m.k, m.v))
        result: Tensor = m.out(joined(((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 21), out=nn.Linear(21, 5))


@case(3, 4, 7)
def attention_by_hand_with_bmm() -> Net:
    """Rows and heads folded into one dimension, whose size is free."""

    def fold(x: Tensor) -> Tensor:
        return heads_of(x, 3).flatten(0, 1)

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (fold(part(x)) for part in (m.q, m.k, m.v))
        y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
        result: Tensor = m.out(joined(y.view(-1, 3, 5, 7)))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 21), out=nn.Linear(21, 5))


@case(2, 4, 8)
def multihead_attention() -> Net:
    """Keys and values from one projection share their axes."""

    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = m.out(m.attention(x, y, y, need_weights=False)[0])
        return result

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(body, tokens(8), tokens(8, 7), attention=attention, out=nn.Linear(8, 5))


@case(4, 4, inexact=[2])
def multihead_attention_that_gives_its_weights() -> Net:
    """The weights are a mean over heads."""

    def body(m: Any, x: Tensor, y: Tensor) -> Any:
        return m.attention(x, y, y + 1)

    return Net(body, tokens(8), tokens(8), attention=nn.MultiheadAttention(8, 2, batch_first=True))


@case(2, 4)
def multihead_self_attention() -> Net:
    """One projection viewed as 3 × heads × width: queries, keys and values share their axes."""

    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.attention(x, x, x, need_weights=False)[0]
        return result

    return Net(body, tokens(8), attention=nn.MultiheadAttention(8, 2, batch_first=True))


@case(3, 4, 7)
def linear_attention() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part(x), 3) for part in (m.q, m.k, m.v))
        result: Tensor = m.out(joined(q.relu() @ (k.relu().mT @ v)))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 21), out=nn.Linear(21, 5))


@case(3, 7, inexact=[4])
def linear_attention_with_features_that_are_not_zero_at_zero() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part(x), 3) for part in (m.q, m.k, m.v))
        result: Tensor = m.out(joined((F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v)))
        return result

    return Net(body, tokens(), q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 21), out=nn.Linear(21, 5))


@case(2, 4, 4)
def fused_qkv_in_three_chunks() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part, 2) for part in m.qkv(x).chunk(3, -1))
        result: Tensor = m.out(joined(F.scaled_dot_product_attention(q, k, v)))
        return result

    return Net(body, tokens(), qkv=nn.Linear(6, 24), out=nn.Linear(8, 5))


@case(2, 4)
def fused_qkv_viewed_as_three() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        result: Tensor = m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 8))
        return result

    return Net(body, tokens(), qkv=nn.Linear(6, 24), out=nn.Linear(8, 5))


@case(2, 4, 4)
def fused_qkv_with_heads_outside() -> Net:
    """As GPT-NeoX: each head's q, k and v lie together."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(-1, 5, 2, 12).transpose(1, 2).split(4, -1)
        result: Tensor = m.out(joined(F.scaled_dot_product_attention(q, k, v)))
        return result

    return Net(body, tokens(), qkv=nn.Linear(6, 24), out=nn.Linear(8, 5))


@case(2, 3, 7)
def rotary_positions() -> Net:
    """Rotation pairs the first half of a head's width with the second."""

    def rotate_half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part(x), 2) for part in (m.q, m.k, m.v))
        q, k = (part * m.cos + rotate_half(part) * m.sin for part in (q, k))
        result: Tensor = m.out(joined(F.scaled_dot_product_attention(q, k, v)))
        return result

    net = Net(body, tokens(), q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 14), out=nn.Linear(14, 5))
    angles = torch.outer(torch.arange(5.0), 10 ** -torch.arange(3.0)).repeat(1, 2)
    net.register_buffer("cos", angles.cos())
    net.register_buffer("sin", angles.sin())
    return net


# --- embeddings and tied weights ---------------------------------------------------------------------------


def words() -> Tensor:
    return torch.randint(0, 10, (2, 5))


@case(8)
def embedding() -> Net:
    return Net(lambda m, x: m.b(m.a(x)), words(), a=nn.Embedding(10, 8), b=nn.Linear(8, 5))


@case(8)
def embedding_of_words_and_places() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x) + m.places(torch.arange(5)))
        return result

    return Net(body, words(), a=nn.Embedding(10, 8), places=nn.Embedding(6, 8), b=nn.Linear(8, 5))


@case(8, 7)
def tied_embedding() -> Net:
    """The head reads with the embedding's own weight."""

    def body(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return F.linear(h + m.down(m.up(h).relu()), m.a.weight)

    return Net(body, words(), a=nn.Embedding(10, 8), up=nn.Linear(8, 7), down=nn.Linear(7, 8))


@case(8)
def one_layer_used_twice() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.middle(m.middle(m.a(x)).relu()).relu())
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), middle=nn.Linear(8, 8), b=nn.Linear(8, 5))


# --- views -------------------------------------------------------------------------------------------------


@case(8)
def flatten() -> Net:
    return Net(lambda m, x: m.b(m.a(x).relu().flatten(1)), images(side=4), a=nn.Conv2d(3, 8, 1), b=nn.Linear(128, 5))


@case(8)
def flattened_after_permuting() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x).permute(0, 2, 3, 1).reshape(-1, 128))
        return result

    return Net(body, images(side=4), a=nn.Conv2d(3, 8, 1), b=nn.Linear(128, 5))


@case(3, 4)
def unflatten() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x).unflatten(-1, (3, 4)).relu().transpose(1, 2).flatten(1))
        return result

    return Net(body, rows(), a=nn.Linear(6, 12), b=nn.Linear(12, 5))


@case(2, 2, 3)
def views_that_meet_in_their_refinement() -> Net:
    """12 = 4 × 3 = 2 × 6, so 2 × 2 × 3."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = (y.view(-1, 4, 3) * 2).reshape(-1, 12).view(-1, 2, 6).mT.reshape(-1, 12)
        result: Tensor = m.b(y)
        return result

    return Net(body, rows(), a=nn.Linear(6, 12), b=nn.Linear(12, 5))


@case()
def views_without_refinement() -> Net:
    """24 = 4 × 6 = 6 × 4: nothing can go."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = (y.view(-1, 4, 6) * m.scale).reshape(-1, 24).view(-1, 6, 4).relu().mT
        result: Tensor = m.b(y.reshape(-1, 24))
        return result

    return Net(body, rows(), a=nn.Linear(6, 24), b=nn.Linear(24, 5), scale=torch.randn(4, 6))


@case(8)
def squeeze_and_unsqueeze() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).unsqueeze(1).relu().squeeze(1)[:, :, None, None].squeeze((2, 3))
        result: Tensor = m.b(y)
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(7, 8)
def transposes_of_every_name() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).movedim(1, 3).movedim((1, 2), (2, 1)).swapaxes(1, 2).permute(0, -1, 1, 2).mT
        y = m.b(y).flatten(2)
        result: Tensor = y.mT @ m.c.t()
        return result

    return Net(body, images(side=4), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 7, 1), c=torch.randn(5, 7))


@case(3)
def pixel_shuffle() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(3, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(4)
def pixel_unshuffle() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(16, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(2, 4)
def channel_shuffle() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ChannelShuffle(2), nn.Conv2d(8, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(4, 4)
def channel_shuffle_of_fewer_groups() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ChannelShuffle(4), nn.Conv2d(16, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(3, 3)
def channel_shuffle_by_hand() -> Net:
    """Two branches of 6, joined and shuffled: the same positions leave both, and each half of the result."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = torch.cat((m.a(x), m.b(x)), 1)
        y = y.view(-1, 2, 6, 4, 4).transpose(1, 2).reshape(-1, 12, 4, 4)
        first, second = y.chunk(2, 1)
        result: Tensor = m.c(first) + m.d(second)
        return result

    return Net(
        body, images(side=4), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1), c=nn.Conv2d(6, 5, 1), d=nn.Conv2d(6, 5, 1)
    )


@case(4)
def patches_by_unfold() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(F.unfold(m.a(x), 2, stride=2).mT)
        return result

    return Net(body, images(side=4), a=nn.Conv2d(3, 4, 1), b=nn.Linear(16, 5))


@case(4)
def patches_folded_back() -> Net:
    """Windows overlap: each position is a sum over channels of its own."""

    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(F.fold(m.a(x).mT, (5, 5), 3, stride=2).relu())
        return result

    return Net(body, tokens(length=4), a=nn.Linear(6, 36), b=nn.Conv2d(4, 5, 1))


# --- cutting and joining -----------------------------------------------------------------------------------


@case(4, 7)
def cat() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.c(torch.cat((m.a(x), m.b(x)), 1))
        return result

    return Net(body, images(), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 7, 1), c=nn.Conv2d(11, 5, 1))


@case(4, 7)
def cat_with_an_input() -> Net:
    """The input's channels stay, those of the layers go; dense blocks."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = torch.cat((x, m.a(x).relu()), 1)
        x = torch.cat((x, m.b(m.norm(x)).relu()), 1)
        result: Tensor = m.c(x)
        return result

    return Net(
        body, images(), a=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(7), b=nn.Conv2d(7, 7, 1), c=nn.Conv2d(14, 5, 1)
    )


@case(8)
def cat_of_tokens() -> Net:
    """A class token before the others: the length is joined, the width is one."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = torch.cat((m.first.expand(x.shape[0], -1, -1), m.a(x)), 1)
        result: Tensor = m.b(y[:, 0]) + m.c(y[:, 1:].sum(1))
        return result

    return Net(body, tokens(), a=nn.Linear(6, 8), first=torch.randn(1, 1, 8), b=nn.Linear(8, 5), c=nn.Linear(8, 5))


@case(8)
def stack() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.c(torch.stack((m.a(x), m.b(x)), -1).flatten(1))
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), b=nn.Linear(6, 8), c=nn.Linear(16, 5))


@case(4, 7)
def split() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).split([4, 7], -1)
        result: Tensor = m.b(a.relu()) + m.c(b.tanh())
        return result

    return Net(body, rows(), a=nn.Linear(6, 11), b=nn.Linear(4, 5), c=nn.Linear(7, 5))


@case(4)
def chunk() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, -1)
        result: Tensor = m.b(a * b.sigmoid())
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), b=nn.Linear(4, 5))


@case(2, 3, 3)
def chunks_of_unequal_size() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b, c = m.a(x).chunk(3, -1)
        result: Tensor = m.b(a) + m.c(b) + m.d(c)
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), b=nn.Linear(3, 5), c=nn.Linear(3, 5), d=nn.Linear(2, 5))


@case(4)
def unbind() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).unflatten(-1, (2, 4)).unbind(-2)
        result: Tensor = m.b(a * b)
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), b=nn.Linear(4, 5))


@case(3, 5)
def slices() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        result: Tensor = m.b(y[:, :3]) + m.c(y[:, 3:])
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), b=nn.Linear(3, 4), c=nn.Linear(5, 4))


@case(2, 3, 4)
def slices_that_overlap() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        result: Tensor = m.b(y[:, :5]) + m.c(y[:, -7:])
        return result

    return Net(body, rows(), a=nn.Linear(6, 9), b=nn.Linear(5, 4), c=nn.Linear(7, 4))


@case(8)
def slices_by_step_along_space() -> Net:
    return Net(lambda m, x: m.b(m.a(x)[:, :, ::2, 1:]), images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 1))


@case(4)
def slices_by_step_along_channels() -> Net:
    return Net(lambda m, x: m.b(m.a(x)[:, ::2]), images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 5, 1))


@case(8)
def select_of_a_token() -> Net:
    return Net(lambda m, x: m.b(m.a(x)[:, 0]), tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(7)
def select_of_a_channel() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.c(m.b(m.a(x)[:, 1]).relu())
        return result

    return Net(body, images(), a=nn.Conv2d(3, 8, 1), b=nn.Linear(8, 7), c=nn.Linear(7, 5))


@case(8)
def index_of_tokens() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x)[:, torch.tensor([0, 3, 3])])
        return result

    return Net(body, tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(3, 4, 7)
def index_of_a_table() -> Net:
    """Swin's relative position bias: rows are looked up, heads run through."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part(x), 3) for part in (m.q, m.k, m.v))
        bias = m.table[m.places.view(-1)].view(5, 5, 3).permute(2, 0, 1)
        result: Tensor = m.out(joined((q @ k.mT + bias).softmax(-1) @ v))
        return result

    net = Net(
        body,
        tokens(),
        q=nn.Linear(6, 12),
        k=nn.Linear(6, 12),
        v=nn.Linear(6, 21),
        out=nn.Linear(21, 5),
        table=torch.randn(9, 3),
    )
    net.register_buffer("places", torch.arange(5)[:, None] - torch.arange(5)[None, :] + 4)
    return net


@case(8)
def index_select_of_tokens() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x).index_select(1, torch.tensor([4, 0])))
        return result

    return Net(body, tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(2)
def index_select_of_channels() -> Net:
    """What is indexed stays; an index may go, with the weights that read it."""

    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x).index_select(1, torch.tensor([4, 0])))
        return result

    return Net(body, rows(), a=nn.Linear(6, 8), b=nn.Linear(2, 5))


@case(8)
def gather_of_tokens() -> Net:
    def body(m: Any, x: Tensor, at: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x).gather(1, at[:, :, None].expand(-1, -1, 8)))
        return result

    return Net(body, tokens(), torch.randint(0, 5, (2, 3)), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case()
def gather_of_channels() -> Net:
    return Net(
        lambda m, x, at: m.b(m.a(x).gather(1, at)),
        rows(),
        torch.randint(0, 8, (2, 3)),
        a=nn.Linear(6, 8),
        b=nn.Linear(3, 5),
    )


@case(8)
def roll_and_flip_of_space() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x).roll((1, -2), (2, 3)).flip(3))
        return result

    return Net(body, images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 3))


@case()
def roll_of_channels() -> Net:
    return Net(lambda m, x: m.b(m.a(x).roll(1, 1)), images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 3))


@case()
def flip_of_channels() -> Net:
    return Net(lambda m, x: m.b(m.a(x).flip(1)), images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 3))


@case(8)
def cumulative_sum_of_tokens() -> Net:
    return Net(lambda m, x: m.b(m.a(x).cumsum(1)), tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case()
def cumulative_sum_of_channels() -> Net:
    return Net(lambda m, x: m.b(m.a(x).cumsum(-1)), tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(8)
def pad_of_space() -> Net:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.pad(m.a(x), (1, 2, 0, 1))
        result: Tensor = m.b(F.pad(y, (1, 1, 1, 1), mode="reflect"))
        return result

    return Net(body, images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 3))


@case(8)
def pad_of_channels() -> Net:
    """As the shortcuts of CIFAR's ResNets: a concatenation with zeros."""
    return Net(
        lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 1))), images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(10, 5, 3)
    )


@case(8)
def index_add() -> Net:
    edges = torch.tensor([1, 2, 0])
    return Net(
        lambda m, x: m.b(x.new_zeros(x.shape[0], 6, 8).index_add(1, edges, m.a(x)[:, :3])),
        tokens(),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 5),
    )


@case(8)
def scatter_add() -> Net:
    def body(m: Any, x: torch.Tensor) -> Any:
        places = torch.tensor([1, 2, 0])[None, :, None].expand(x.shape[0], -1, 8)
        return m.b(x.new_zeros(x.shape[0], 6, 8).scatter_add(1, places, m.a(x)[:, :3]))

    return Net(body, tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(8)
def transform_of_tokens() -> Net:
    return Net(lambda m, x: m.b(torch.fft.fft(m.a(x), dim=1).real), tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(8)
def distances() -> Net:
    return Net(lambda m, x: torch.cdist(m.a(x), m.a(x + 1)), tokens(), a=nn.Linear(6, 8))


@case(8)
def likenesses() -> Net:
    return Net(lambda m, x: F.cosine_similarity(m.a(x), m.a(x + 1), dim=-1), tokens(), a=nn.Linear(6, 8))


@case(8, 4)
def bilinear() -> Net:
    return Net(lambda m, x: m.c(m.a(x), m.b(x)), tokens(), a=nn.Linear(6, 8), b=nn.Linear(6, 4), c=nn.Bilinear(8, 4, 3))


@case(2, 2, 4)
def assignment_to_a_run() -> Net:
    def body(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x).clone()
        y[..., 2:6] = 0.0
        return m.b(y)

    return Net(body, tokens(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case(8)
def repeat() -> Net:
    return Net(lambda m, x: m.b(m.a(x).repeat(1, 3)), rows(), a=nn.Linear(6, 8), b=nn.Linear(24, 5))


@case(8)
def tile() -> Net:
    """Fewer numbers than dimensions: those of the last ones."""
    return Net(lambda m, x: m.b(m.a(x).tile(3)), tokens(), a=nn.Linear(6, 8), b=nn.Linear(24, 5))


@case(8)
def repeat_interleave() -> Net:
    return Net(lambda m, x: m.b(m.a(x).repeat_interleave(3, 1)), rows(), a=nn.Linear(6, 8), b=nn.Linear(24, 5))


@case(8, 4)
def expand() -> Net:
    """The copies are an axis of their own: the reader's weights for a copy can go."""
    return Net(
        lambda m, x: m.b(m.a(x)[:, :, None].expand(-1, -1, 4).flatten(1)), rows(), a=nn.Linear(6, 8), b=nn.Linear(32, 5)
    )


# --- pooling and interpolation -----------------------------------------------------------------------------

POOLS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "max 1d": (1, lambda x: F.max_pool1d(x, 2)),
    "max 2d": (2, lambda x: F.max_pool2d(x, 3, 2, 1)),
    "max 3d": (3, lambda x: F.max_pool3d(x, 2)),
    "average 1d": (1, lambda x: F.avg_pool1d(x, 2)),
    "average 2d": (2, lambda x: F.avg_pool2d(x, 2)),
    "average 3d": (3, lambda x: F.avg_pool3d(x, 2)),
    "adaptive average 1d": (1, lambda x: F.adaptive_avg_pool1d(x, 2)),
    "adaptive average 2d": (2, lambda x: F.adaptive_avg_pool2d(x, (2, 1))),
    "adaptive average 3d": (3, lambda x: F.adaptive_avg_pool3d(x, 2)),
    "adaptive max 2d": (2, lambda x: F.adaptive_max_pool2d(x, 2)),
    "max 2d with indices": (2, lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "nearest 1d": (1, lambda x: F.interpolate(x, scale_factor=2)),
    "nearest 2d": (2, lambda x: F.interpolate(x, size=(5, 7))),
    "bilinear": (2, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "bilinear, antialiased": (2, lambda x: F.interpolate(x, size=3, mode="bilinear", antialias=True)),
    "bicubic": (2, lambda x: F.interpolate(x, size=6, mode="bicubic", align_corners=True)),
    "linear": (1, lambda x: F.interpolate(x, size=9, mode="linear")),
    "trilinear": (3, lambda x: F.interpolate(x, size=5, mode="trilinear")),
    "softmax over space": (2, lambda x: x.flatten(2).softmax(-1).view_as(x)),
    "mean over space": (2, lambda x: x.mean((2, 3), keepdim=True)),
    "greatest over space": (2, lambda x: x.amax((-1, -2), keepdim=True)),
    "greatest and where": (1, lambda x: x.max(2, keepdim=True)[0]),
    "variance over space": (2, lambda x: x.var((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("dims", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_runs_over_space_leaves_channels_free(dims: int) -> None:
    conv: Any = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    functions = [function for count, function in POOLS.values() if count == dims]
    x = torch.randn(2, 3, *[4] * dims)
    check(lambda: branches(functions, x, lambda *widths: conv(*widths, 1)), [8] * len(functions), some=min)


# --- element by element ------------------------------------------------------------------------------------

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "softplus": F.softplus,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "leaky relu": F.leaky_relu,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "masked fill": lambda x: x.masked_fill(x < 0, -1.0),
    "power": lambda x: x**2,
    "division": lambda x: x / (1 + x.abs()),
    "to and fro": lambda x: x.double().to(torch.float32).type_as(x),
    "zeros of its kind": lambda x: x + torch.ones_like(x),
    "zeroed": lambda x: x + x.clone().zero_(),
    "new zeros": lambda x: x + x.new_ones(x.shape[0], 8),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "minimum": lambda x: torch.minimum(x, -x),
}


def test_element_by_element() -> None:
    check(lambda: branches(POINTWISE.values(), rows(), nn.Linear), [8] * len(POINTWISE), some=min)


@case(8)
def broadcast_parameters() -> Net:
    """A scale for each channel, and one for all."""

    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(m.a(x) * m.scale + m.shift)
        return result

    return Net(
        body, images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 1), scale=torch.randn(8, 1, 1), shift=torch.randn(1)
    )


@case(8)
def gated_linear_unit() -> Net:
    return Net(lambda m, x: m.b(F.glu(m.a(x), 1)), images(), a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(8, 5, 1))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda y: y + torch.rand(8),
    "randn": lambda y: y * torch.randn(y.shape[0], 8),
    "randint": lambda y: y + torch.randint(9, (8,)),
    "randint from a lowest": lambda y: y + torch.randint(2, 9, (y.shape[0], 8)),
    "normal": lambda y: y + torch.normal(1.0, 2.0, (y.shape[0], 8)),
    "rand_like": lambda y: y + torch.rand_like(y),
    "randint_like": lambda y: y + torch.randint_like(y, 9),
    "bernoulli": lambda y: y * torch.bernoulli(y.sigmoid()),
    "poisson": lambda y: y + torch.poisson(y.abs() + 1),
    "normal about means": lambda y: torch.normal(y, 1.0),
    "normal with deviations": lambda y: torch.normal(1.0, y.abs()),
    "normal with both": lambda y: torch.normal(y, y.abs()),
}


def test_what_is_drawn_for_fewer_positions_is_another_draw() -> None:
    check(lambda: branches(DRAWS.values(), rows(), nn.Linear), [], [8] * len(DRAWS), some=min)


POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "randperm": lambda y: y[:, torch.randperm(8)],
    "multinomial": lambda y: torch.multinomial(y.softmax(1), 3).float() @ torch.ones(3, 8),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_drawn_positions_keep_what_they_count(name: str) -> None:
    inference = infer(
        Net(lambda m, x: m.b(POSITIONS[name](m.a(x))), rows(), a=nn.Linear(6, 8), b=nn.Linear(8, 5, bias=False))
    )
    assert not inference.unknown
    parameters = dict(inference.program.module.named_parameters())
    (width, _), reason = inference.stored[id(parameters["a.weight"])], "draws positions|indexed"
    assert re.search(reason, str(width.find().locks))


@case(8)
def prelu_with_a_slope_for_each_channel() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


@case(8)
def prelu_with_one_slope() -> Net:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(), nn.Conv2d(8, 5, 1))
    return Net(lambda m, x: m.layers(x), images(), layers=layers)


# --- reductions over channels ------------------------------------------------------------------------------


@case(8)
def sum_over_channels_of_zeros() -> Net:
    return Net(lambda m, x: m.a(x).relu().sum(1), images(), a=nn.Conv2d(3, 8, 1))


@case(inexact=[8])
def sum_over_channels_of_sigmoids() -> Net:
    return Net(lambda m, x: m.a(x).sigmoid().sum(1), images(), a=nn.Conv2d(3, 8, 1))


@case(inexact=[8])
def sum_over_channels_of_a_value_that_borrows_their_shape() -> Net:
    return Net(
        lambda m, x: m.b(m.a(x)) * m.c(x).expand_as(m.a(x)).sum(1, keepdim=True),
        images(),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 5, 1),
        c=nn.Conv2d(3, 1, 1),
    )


@case(inexact=[8])
def mean_over_channels() -> Net:
    return Net(lambda m, x: m.a(x).mean(1), images(), a=nn.Conv2d(3, 8, 1))


@case(inexact=[8])
def greatest_over_channels() -> Net:
    return Net(lambda m, x: m.a(x).sigmoid().amin(1), images(), a=nn.Conv2d(3, 8, 1))


@case(inexact=[8])
def variance_over_channels() -> Net:
    return Net(lambda m, x: m.a(x).var(1), images(), a=nn.Conv2d(3, 8, 1))


@case()
def softmax_over_channels() -> Net:
    return Net(lambda m, x: m.b(m.a(x).softmax(1)), images(), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 1))


@case()
def place_of_the_greatest_channel() -> Net:
    return Net(lambda m, x: m.a(x).max(1)[0] + m.a(x).argmax(1), images(), a=nn.Conv2d(3, 8, 1))


# --- recurrent layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bias", "bidirectional", "layers"),
    [
        pytest.param(kind, *settings, marks=pytest.mark.slow if settings == slow else ())
        for kind, slow in ((nn.LSTM, (True, False, 1)), (nn.GRU, (False, False, 2)))
        for settings in ((True, False, 1), (False, True, 1), (False, False, 2), (True, True, 2))
    ],
)
def test_recurrent(kind: type[nn.Module], bias: bool, bidirectional: bool, layers: int) -> None:
    def make() -> Net:
        rnn: Any = kind
        return Net(
            lambda m, x: m.out(m.rnn(m.a(x))[0]),
            tokens(),
            a=nn.Linear(6, 7),
            rnn=rnn(7, 8, layers, bias=bias, bidirectional=bidirectional, batch_first=True),
            out=nn.Linear(16 if bidirectional else 8, 5),
        )

    check(make, [7, *[8] * layers])


@case(7, rows=False)
def a_recurrent_state_that_is_given_back_stays() -> Net:
    return Net(lambda m, x: m.rnn(m.a(x))[1], tokens(), a=nn.Linear(6, 7), rnn=nn.GRU(7, 8, batch_first=True))


VARIANTS = {
    "attention_by_hand_with_bmm",
    "cat_of_tokens",
    "channel_shuffle_by_hand",
    "conv1d",
    "conv3d",
    "cumulative_sum_of_tokens",
    "fused_qkv_in_three_chunks",
    "fused_qkv_with_heads_outside",
    "grouped_query_attention_by_expanding",
    "index_select_of_tokens",
    "layer_norm_without_weights",
    "linear_attention",
    "matmul_with_a_vector",
    "multihead_self_attention",
    "scaled_dot_product_attention",
    "tile",
}
"""Cases whose rules other cases use too: they run with the slow tests."""


LOCKED: dict[str, tuple[str, dict[int, str]]] = {
    "embedding": ("a.weight", {0: "rows of an embedding"}),
    "linear": ("b.weight", {0: "output"}),
    "conv2d": ("layers.0.weight", {1: "input", 2: "spatial", 3: "spatial"}),
    "softmax_over_channels": ("a.weight", {0: "softmax"}),
    "roll_of_channels": ("a.weight", {0: "roll"}),
    "flip_of_channels": ("a.weight", {0: "flip"}),
    "cumulative_sum_of_channels": ("a.weight", {0: "cumsum"}),
    "select_of_a_channel": ("a.weight", {0: "selected"}),
    "index_select_of_channels": ("a.weight", {0: "indexed"}),
    "gather_of_channels": ("a.weight", {0: "indexed"}),
    "place_of_the_greatest_channel": ("a.weight", {0: "argmax"}),
    "views_without_refinement": ("a.weight", {0: "no common refinement"}),
    "bmm": ("a.weight", {1: "input"}),
}
"""For each dimension of a parameter, a word of the reason why it is locked."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in CASES]
)
def test_case(name: str) -> None:
    chosen = CASES[name]
    inference = check(chosen.make, chosen.exact, chosen.inexact, chosen.rows)
    parameter, words = LOCKED.get(name, ("", {}))
    for dim, word in words.items():
        assert word in locks(inference, parameter, dim)


# --- what must be locked, and why --------------------------------------------------------------------------


def locks(inference: Inference, name: str, dim: int) -> str:
    (node,) = (node for node in inference.program.graph.find_nodes(op="get_attr") if node.target == name)
    axis = inference.of(node)[dim]
    assert axis.locked
    return "; ".join(reason for leaf in axis.leaves() for reason in leaf.locks)


def test_reasons_are_asked_of_cases() -> None:
    assert not set(LOCKED) - set(CASES) | set(LOCKED) & VARIANTS


def test_a_conflict_names_the_line() -> None:
    found = locks(infer(CASES["views_without_refinement"].make()), "a.weight", 0)
    assert "test_rules.py" in found


def test_roles_of_attention() -> None:
    inference = infer(CASES["scaled_dot_product_attention"].make())
    (weight,) = (node for node in inference.program.graph.find_nodes(op="get_attr") if node.target == "q.weight")
    heads, width = inference.of(weight)[0].leaves()
    assert (heads.size, width.size) == (3, 4)
    assert "heads" in heads.roles
    assert "head_dim" in width.roles


def test_the_attention_scale_keeps_the_width_it_had() -> None:
    """Twin: where the scale is given, it stays as given."""
    for given, expected in ((None, 4**-0.5), (0.3, 0.3)):

        def body(m: Any, x: Tensor, given: float | None = given) -> Tensor:
            q, k, v = (heads_of(part(x), 3) for part in (m.q, m.k, m.v))
            result: Tensor = m.out(joined(F.scaled_dot_product_attention(q, k, v, scale=given)))
            return result

        def make(body: Callable[..., Tensor] = body) -> Net:
            parts = {name: nn.Linear(6, 12) for name in "qkv"}
            return Net(body, tokens(), **parts, out=nn.Linear(12, 5))

        check(make, [3, 4, 4])
        net = make()
        program = trace(net, net.inputs)
        _, _, pruned = removed(program, lambda leaf: True)
        attention = torch.ops.aten.scaled_dot_product_attention.default
        (node,) = pruned.graph.find_nodes(op="call_function", target=attention)
        assert node.kwargs["scale"] == pytest.approx(expected)


# --- operators without a rule, and rules of one's own ------------------------------------------------------


@torch.library.custom_op("lobo_fx_tests::halve", mutates_args=())
def halve(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight / 2


@halve.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class UserNet(Net):
    a: nn.Linear
    b: nn.Linear
    c: nn.Linear
    scale: Tensor

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        h = halve(self.a(x), self.scale)
        return self.c(self.b(h).relu())


def user_network() -> Net:
    return UserNet(torch.add, rows(), a=nn.Linear(6, 8), scale=torch.rand(8), b=nn.Linear(8, 7), c=nn.Linear(7, 5))


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> dict[object, Any]:
    """The table of rules, for one test."""
    import lobo_fx.axes.call

    table = dict(lobo_fx.axes.call.RULES)
    monkeypatch.setattr(lobo_fx.axes.call, "RULES", table)
    return table


def test_an_operator_without_a_rule_locks_what_it_touches() -> None:
    inference = infer(user_network())
    (operator, where), *others = inference.unknown.items()
    assert (operator, others) == ("lobo_fx_tests.halve.default", [])
    assert re.fullmatch(r".*test_rules\.py:\d+: h = halve\(self\.a\(x\), self\.scale\)", where)
    for name, dim in (("a.weight", 0), ("scale", 0), ("b.weight", 1)):
        reason = locks(inference, name, dim)
        assert "lobo_fx_tests.halve.default has no axis rule (" in reason
        assert reason.count("lobo_fx_tests.halve") == 1
        assert "test_rules.py" in reason
        assert "h = halve(self.a(x), self.scale)" in reason
    assert sizes(iter(members(inference))) == [7]


def test_strict_inference_refuses_an_operator_without_a_rule() -> None:
    net = user_network()
    with pytest.raises(InvalidInput, match=r"halve.*has no axis rule; register one with lobo_fx\.axes\.axis_rule"):
        Inference(trace(settle(net), net.inputs), strict=True).run()


def test_strict_inference_accepts_what_has_rules() -> None:
    net = CASES["linear"].make()
    assert members(Inference(trace(settle(net), net.inputs), strict=True).run())


def test_a_rule_of_ones_own_frees_the_operator(rules: dict[object, Any]) -> None:
    @axis_rule(torch.ops.lobo_fx_tests.halve.default, zeros=any_of("x", "weight"))
    def scale(call: Call) -> Axes:
        *rest, channels = call.axes("x")
        return (*rest, call.unify(channels, call.axes("weight")[0]))

    assert rules[torch.ops.lobo_fx_tests.halve.default].rule is scale
    check(user_network, [7, 8])


def test_a_second_rule_for_an_operator_is_refused(rules: dict[object, Any]) -> None:
    def mine(call: Call) -> Axes:
        return call.axes("x")

    axis_rule(torch.ops.lobo_fx_tests.halve.default)(mine)
    with pytest.raises(InvalidInput, match="has an axis rule already: mine"):
        axis_rule(torch.ops.lobo_fx_tests.halve.default)(mine)
    with pytest.raises(InvalidInput, match="has an axis rule already: embedding"):
        axis_rule(torch.ops.aten.embedding.default)(mine)


def test_a_rule_that_finds_no_axes_locks_like_an_unknown_operator() -> None:
    """A repetition of all elements in one row: known, not understood, so not listed as without a rule."""

    def make(*dim: int) -> Net:
        return Net(
            lambda m, x: m.b(m.a(x).repeat_interleave(2, *dim).view(-1, 16)),
            rows(),
            a=nn.Linear(6, 8),
            b=nn.Linear(16, 5),
        )

    inference = infer(make())
    assert not inference.unknown
    assert not members(inference)
    assert "repeat_interleave without a dimension is not understood" in locks(inference, "a.weight", 0)
    assert sizes(iter(members(infer(make(1))))) == [8]  # the same, and its dimension is told


def test_channels_whose_greatest_is_taken_may_go_unless_its_place_is_read() -> None:
    class Greatest(nn.Module):
        def __init__(self, reads_places: bool) -> None:
            super().__init__()
            self.a, self.reads_places = nn.Linear(6, 8), reads_places

        def forward(self, x: torch.Tensor) -> Any:
            found = self.a(x).max(-1)
            return (found.values, found.indices) if self.reads_places else found.values

    for reads_places in (False, True):
        program = trace(Greatest(reads_places).eval(), tokens())
        free = members(Inference(program).run())
        assert bool(free) is not reads_places
        assert all(leaf.inexact for leaf in free)


def test_a_rule_that_fails_locks_and_says_so(rules: dict[object, Any]) -> None:
    @axis_rule(torch.ops.lobo_fx_tests.halve.default)
    def fails(call: Call) -> Any:
        raise ValueError("no such thing")

    network = user_network()
    reasons = survey(infer(network)).locks
    assert any("ValueError: no such thing" in reason for reason in reasons)
    with pytest.raises(ValueError, match="no such thing"):
        Inference(trace(network, network.inputs), strict=True).run()


def test_an_operand_that_a_rule_does_not_look_at_is_locked(rules: dict[object, Any]) -> None:
    @axis_rule(torch.ops.lobo_fx_tests.halve.default)
    def looks_at_one(call: Call) -> Any:
        return call.axes("x")

    inference = infer(user_network())
    scale = inference.stored[id(inference.program.module.get_parameter("scale"))]
    assert all("does not say what it does with it" in "".join(axis.find().locks) for axis in scale)


def test_a_rule_that_says_nothing_of_zeros_promises_nothing(rules: dict[object, Any]) -> None:
    def inexact(zeros: Any) -> bool:
        rules.pop(torch.ops.lobo_fx_tests.halve.default, None)

        @axis_rule(torch.ops.lobo_fx_tests.halve.default, zeros=zeros)
        def rule(call: Call) -> Any:
            *rest, channels = call.axes("x")
            return (*rest, call.unify(channels, call.axes("weight")[0]))

        class Summed(UserNet):
            def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
                return self.c(halve(self.a(x), self.scale).sum(-1, keepdim=True))

        network = Summed(torch.add, rows(), a=nn.Linear(6, 8), scale=torch.rand(8), c=nn.Linear(1, 5))
        return any(leaf.inexact for leaf in members(infer(network)))

    assert inexact(None)
    assert inexact(NOWHERE)
    assert not inexact(any_of("x", "weight"))


def exact_widths(functions: Sequence[Callable[[Tensor, Tensor], Tensor]], read: int) -> list[bool | None]:
    """Of each function's 8 channels, whether removing equals zeroing; None where they are locked."""

    def body(m: Any, x: Tensor) -> Any:
        return tuple(b(function(a(x), x[:, :1])) for a, function, b in zip(m.a, functions, m.b, strict=True))

    a, b = (nn.ModuleList(nn.Linear(*widths) for _ in functions) for widths in ((6, 8), (read, 5)))
    found = members(infer(Net(body, rows(), a=a, b=b)))
    exact = {member.name: not leaf.inexact for leaf in found if leaf.size == 8 for member in found[leaf]}
    return [exact.get(f"a.{index}.weight") for index in range(len(functions))]


MADE_OF_ZEROS: list[tuple[Callable[[Tensor, Tensor], Tensor], bool]] = [
    (lambda h, other: h.sigmoid(), True),
    (lambda h, other: h.square().add(1.0).log(), True),
    (lambda h, other: h.abs().log(), False),
    (lambda h, other: h.clamp(0.0, 1.0), True),
    (lambda h, other: h.pow(2), True),
    (lambda h, other: h.abs().pow(-0.5), False),
    (lambda h, other: other / h, False),
    (lambda h, other: h / other, True),
    (lambda h, other: torch.atan2(h, other), True),
    (lambda h, other: torch.xlogy(h, other.exp()), True),
    (lambda h, other: torch.where(h > 0, h, h.reciprocal()), False),
    (lambda h, other: h.masked_fill(h > 100, float("-inf")), True),
]


def test_an_operator_is_asked_what_it_makes_of_zeros() -> None:
    functions, expected = zip(*MADE_OF_ZEROS, strict=True)
    assert exact_widths(functions, 8) == list(expected)


STAYS_ZERO: list[tuple[Callable[[Tensor], Tensor], bool | None]] = [
    (lambda h: h.clamp(0.0, 1.0), True),
    (lambda h: h.clamp(0.5, 1.0), False),
    (lambda h: torch.maximum(h, h.neg()), True),
    (lambda h: torch.where(h > 0, h, 0.1 * h), True),
    (lambda h: h.masked_fill(h < 1, 1.0), False),
    (lambda h: h.masked_fill(h > 1, 1.0), True),
    (lambda h: torch.rsub(h, 1.0), False),
    (lambda h: torch.lerp(h, h.tanh(), 0.3), True),
    (lambda h: nn.functional.softplus(h) - math.log(2), False),
    (lambda h: torch.zeros_like(h), True),
    (lambda h: h * torch.full_like(h, 3.0), True),
    (lambda h: nn.functional.pad(h, (0, 0, 1, 1), value=1.0), False),
    (lambda h: nn.functional.pad(h, (0, 0, 1, 1)), True),
    (lambda h: h.max(-1, keepdim=True).indices * h, None),
    (lambda h: F.hardshrink(h.sigmoid() * 100, 10), False),
    (lambda h: ((h.sigmoid() * 40) > 10).float(), False),
    (lambda h: torch.fmod(h.cos() * 0.4, 0.5), False),
    (lambda h: (h > torch.tensor(-1.0)).float(), False),
    (lambda h: torch.minimum(h, torch.tensor(-1.0)), False),
    (lambda h: torch.where(torch.tensor(True), h.sigmoid(), h), False),
    (lambda h: (h == torch.zeros(1)).float(), False),
    (lambda h: h.contiguous(memory_format=torch.preserve_format), True),
]


def test_what_stays_zero_may_be_summed() -> None:
    def summed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda h, other: function(h).sum(-1, keepdim=True)

    found = exact_widths([summed(function) for function, _ in STAYS_ZERO], 1)
    assert found == [zero for _, zero in STAYS_ZERO]


def test_a_mask_assigned_to_leaves_channels_free() -> None:
    def assign(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        h[h < 0] = 0.0
        h[h > 1] = 1.0
        return m.b(h)

    inference = infer(Net(assign, rows(), a=nn.Linear(6, 8), b=nn.Linear(8, 5)))
    assert sizes(iter(members(inference))) == [8]


def test_a_dimension_that_is_locked_beside_a_free_one_has_its_reason_in_the_survey() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()), rows(), a=nn.Linear(6, 8), b=nn.Linear(8, 5))
    found = survey(infer(net))
    assert found.half_locks == {"it is an input": 48, "it is an output": 40}
    assert found.locks == {"it is an output": 5}


def test_the_survey_of_a_slope_that_all_channels_share_says_so() -> None:
    locks = survey(infer(prelu_with_one_slope())).locks
    assert "it is one value for all" in locks
    assert "no operator reads it" not in locks
