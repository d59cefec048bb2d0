"""Random networks, random removals: shapes stay right, and removing equals zeroing wherever that is promised.

`LOBO_FX_NETWORKS=5000 pytest tests/test_axes_networks.py` tries more of them; a seed that fails is in the test's name.
"""

from __future__ import annotations

import collections
import math
import os
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lobo_fx.axes import Inference
from lobo_fx.axes.members import members
from lobo_fx.axes.removal import Removal
from lobo_fx.axes.surgery import remove, zero
from lobo_fx.capture.tracing import trace
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import has_free_dimension

NETWORKS = int(os.environ.get("LOBO_FX_NETWORKS", "60"))
TOLERANCE = 1e-9
"""In double precision: far above rounding, far below anything wrong."""

Tensor = torch.Tensor
Step = Callable[[Tensor], Tensor]

ACTIVATIONS: tuple[Step, ...] = (F.relu, torch.sigmoid, F.gelu, torch.tanh, lambda x: F.softplus(x), lambda x: x)
SIDE = 4


class RandomNet(nn.Module):
    """An image goes through random steps, then as tokens through more, then to 5 classes.

    Attributes:
        kinds: names of the steps taken.
        width: channels at present, while building.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.kinds: list[str] = []
        self.parts = nn.ModuleList()
        self.steps: list[Step] = []
        self.width = 3
        self.take(self.convolution)
        images = [
            *(self.convolution, self.norm, self.residual, self.dense, self.split, self.gate, self.shuffle),
            *(self.excitation, self.rotate, self.shared, self.pool, self.depthwise, self.branches),
        ]
        tokens = [
            *(self.linear, self.token_norm, self.residual_linear, self.attention, self.grouped_query, self.fused),
            *(self.transposed_heads, self.joined_linear, self.linear_attention, self.attention_with_norm),
        ]
        for _ in range(self.random.randint(1, 4)):
            self.take(self.random.choice(images))
        if self.random.random() < 0.6:
            self.steps.append(lambda x: x.flatten(2).transpose(1, 2))
            for _ in range(self.random.randint(1, 3)):
                self.take(self.random.choice(tokens))
            if self.random.random() < 0.3:
                self.take(self.head_of_everything)
            else:
                self.take(self.head_of_mean)
        else:
            self.take(self.head_of_image)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def take(self, build: Callable[[], Step]) -> None:
        self.steps.append(build())
        self.kinds.append(build.__name__)

    def own(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 0.3, 0.5)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
        self.parts.append(module)
        return module

    def some_width(self, multiple: int = 1) -> int:
        return multiple * self.random.randint(2, 12 // multiple + 1)

    def conv(self, inputs: int, outputs: int) -> nn.Module:
        groups = self.random.choice([g for g in (1, 1, 2, 3) if inputs % g == outputs % g == 0])
        size = self.random.choice([1, 3])
        return self.own(
            nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=self.random.random() < 0.7)
        )

    def activation(self) -> Step:
        return self.random.choice(ACTIVATIONS)

    # --- on images -----------------------------------------------------------------------------------------

    def convolution(self) -> Step:
        outputs = self.some_width(self.random.choice([1, 2, 3]))
        conv, activation = self.conv(self.width, outputs), self.activation()
        self.width = outputs
        return lambda x: activation(conv(x))

    def depthwise(self) -> Step:
        times = self.random.choice([1, 2])
        conv = self.own(nn.Conv2d(self.width, times * self.width, 3, padding=1, groups=self.width))
        self.width *= times
        return lambda x: F.relu(conv(x))

    def norm(self) -> Step:
        kind = self.random.choice(["batch", "group", "instance"])
        if kind == "group":
            groups = self.random.choice([g for g in (1, 2, 3, self.width) if self.width % g == 0])
            return self.own(nn.GroupNorm(groups, self.width))
        layer = nn.BatchNorm2d(self.width) if kind == "batch" else nn.InstanceNorm2d(self.width, affine=True)
        return self.own(layer)

    def residual(self) -> Step:
        inner = self.some_width()
        up, down, activation = self.conv(self.width, inner), self.conv(inner, self.width), self.activation()
        return lambda x: x + down(activation(up(x)))

    def shared(self) -> Step:
        """One convolution used twice."""
        conv, activation = self.conv(self.width, self.width), self.activation()
        return lambda x: conv(activation(conv(x)))

    def dense(self) -> Step:
        grown = self.some_width()
        conv, activation = self.conv(self.width, grown), self.activation()
        self.width += grown
        return lambda x: torch.cat((x, activation(conv(x))), 1)

    def branches(self) -> Step:
        """Three branches, joined and cut at other places."""
        widths = [self.random.randint(1, 4) for _ in range(3)]
        convs = [self.conv(self.width, width) for width in widths]
        at, out = self.random.randint(1, sum(widths) - 1), self.some_width()
        first, second = self.conv(at, out), self.conv(sum(widths) - at, out)
        self.width = out

        def step(x: Tensor) -> Tensor:
            y = torch.cat([conv(x) for conv in convs], 1)
            result: Tensor = first(y[:, :at]) + second(y[:, at:]).relu()
            return result

        return step

    def split(self) -> Step:
        if self.width < 2:
            return lambda x: x
        at = self.random.randint(1, self.width - 1)
        out, width = self.some_width(), self.width
        left, right, activation = self.conv(at, out), self.conv(width - at, out), self.activation()
        self.width = out

        def step(x: Tensor) -> Tensor:
            a, b = torch.split(x, [at, width - at], 1)
            result: Tensor = left(a) + activation(right(b))
            return result

        return step

    def gate(self) -> Step:
        if self.width % 2:
            return lambda x: x * 2
        self.width //= 2
        if self.random.random() < 0.5:
            return lambda x: F.glu(x, 1)

        def step(x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            return a * b.sigmoid()

        return step

    def shuffle(self) -> Step:
        width, groups = self.width, self.random.choice([g for g in (1, 2, 3) if self.width % g == 0])

        def step(x: Tensor) -> Tensor:
            side = x.shape[-1]
            y = x.view(-1, groups, width // groups, side, side).transpose(1, 2)
            return y.reshape(-1, width, side, side)

        return step

    def rotate(self) -> Step:
        """The halves change places, and meet what they were."""
        at = max(self.width // 2, 1)
        return lambda x: x + torch.cat((-x[:, at:], x[:, :at]), 1)

    def excitation(self) -> Step:
        inner = self.some_width()
        down, up = self.conv(self.width, inner), self.conv(inner, self.width)
        return lambda x: x * up(down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def pool(self) -> Step:
        if self.random.random() < 0.5:
            return lambda x: F.max_pool2d(x, 3, 1, 1)
        return lambda x: F.avg_pool2d(x, 2) if x.shape[-1] > 1 else x

    # --- on tokens -----------------------------------------------------------------------------------------

    def linear(self) -> Step:
        out, activation = self.some_width(self.random.choice([1, 2, 3])), self.activation()
        layer = self.own(nn.Linear(self.width, out))
        self.width = out
        return lambda x: activation(layer(x))

    def token_norm(self) -> Step:
        return self.own(self.random.choice([nn.LayerNorm, nn.RMSNorm])(self.width))

    def residual_linear(self) -> Step:
        inner = self.some_width()
        up, down = self.own(nn.Linear(self.width, inner)), self.own(nn.Linear(inner, self.width))
        activation = self.activation()
        return lambda x: x + down(activation(up(x)))

    def joined_linear(self) -> Step:
        """Parts of the width go different ways and are joined in another order."""
        at = self.random.randint(0, self.width)
        grown = self.some_width()
        layer = self.own(nn.Linear(self.width, grown))
        width, self.width = self.width, self.width + grown
        if not 0 < at < width:
            return lambda x: torch.cat((layer(x), x), -1)
        return lambda x: torch.cat((x[..., at:], layer(x), x[..., :at].tanh()), -1)

    def _attention(self, heads: int, groups: int, fused: str, norm: bool, soft: bool = True) -> Step:
        d = self.random.randint(2, 4)
        e = d if fused else self.random.randint(2, 4)
        out = self.own(nn.Linear(heads * e, self.width))
        q_norm = self.own(nn.RMSNorm(d)) if norm else nn.Identity()
        if fused:
            qkv = self.own(nn.Linear(self.width, 3 * heads * d))
        else:
            q, k = self.own(nn.Linear(self.width, heads * d)), self.own(nn.Linear(self.width, groups * d))
            v = self.own(nn.Linear(self.width, groups * e))

        def cut(x: Tensor) -> tuple[Tensor, ...]:
            rows, length, _ = x.shape
            if fused == "view":
                return qkv(x).reshape(rows, length, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]
            parts = qkv(x).chunk(3, -1) if fused else (q(x), k(x), v(x))
            counts = (heads, groups, groups)
            return tuple(p.view(rows, length, n, -1).transpose(1, 2) for p, n in zip(parts, counts, strict=True))

        def step(x: Tensor) -> Tensor:
            a, b, c = cut(x)
            a = q_norm(a)
            if soft:
                y = F.scaled_dot_product_attention(a, b, c, enable_gqa=groups != heads)
            else:
                y = a.relu() @ (b.relu().transpose(-2, -1) @ c)
            result: Tensor = x + out(y.transpose(1, 2).flatten(2))
            return result

        return step

    def attention(self) -> Step:
        heads = self.random.randint(2, 4)
        return self._attention(heads, heads, "", norm=False)

    def attention_with_norm(self) -> Step:
        heads = self.random.randint(2, 4)
        return self._attention(heads, heads, "", norm=True)

    def linear_attention(self) -> Step:
        heads = self.random.randint(2, 4)
        return self._attention(heads, heads, "", norm=False, soft=False)

    def grouped_query(self) -> Step:
        groups = self.random.randint(2, 3)
        return self._attention(groups * 2, groups, "", norm=False)

    def fused(self) -> Step:
        heads = self.random.randint(2, 4)
        return self._attention(heads, heads, self.random.choice(["view", "chunk"]), norm=False)

    def transposed_heads(self) -> Step:
        """The width as a matrix, transposed."""
        width, outer = self.width, self.random.choice([g for g in (1, 2, 3, 4) if self.width % g == 0])
        activation = self.activation()
        return lambda x: activation(torch.unflatten(x, -1, (outer, width // outer))).transpose(-1, -2).flatten(-2)

    # --- heads ---------------------------------------------------------------------------------------------

    def head_of_mean(self) -> Step:
        layer = self.own(nn.Linear(self.width, 5))
        return lambda x: layer(x.mean(1))

    def head_of_everything(self) -> Step:
        layer = self.own(nn.Linear(self.features(), 5))
        return lambda x: layer(x.flatten(1))

    def head_of_image(self) -> Step:
        if self.random.random() < 0.5:
            return self.head_of_everything()
        layer = self.own(nn.Linear(self.width, 5))
        return lambda x: layer(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def features(self) -> int:
        """Values that the steps so far give for one image."""
        with torch.no_grad():
            result: Tensor = self.eval()(torch.zeros(2, 3, SIDE, SIDE))
        return result.numel() // 2


def build(seed: int) -> tuple[RandomNet, Tensor]:
    torch.manual_seed(seed)
    net = RandomNet(seed).double().eval()
    return net, torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)


def draw(inference: Inference, seed: int, exact: bool) -> Removal:
    """Any number of positions of some of the free leaves, at least one of which stays in each."""
    generator = torch.Generator().manual_seed(seed)
    removal: Removal = {}
    for leaf in members(inference):
        stay = int(torch.randint(1, leaf.size + 1, (1,), generator=generator))
        chosen = torch.randperm(leaf.size, generator=generator)[:stay]
        if stay < leaf.size and not (exact and leaf.inexact):
            removal[leaf] = torch.zeros(leaf.size, dtype=torch.bool).index_fill_(0, chosen, True)
    return removal


def compare(program: Program, x: Tensor, seed: int, exact: bool) -> int:
    """Removes and, where that is promised, compares with zeroing; returns how many axes got smaller."""
    program = program.clone()
    inference = Inference(program).run()
    assert not inference.unknown
    removal = draw(inference, seed, exact)
    zero(inference, removal)
    zeroed = program.run()
    remove(inference, removal)
    smaller = program.run()
    assert smaller.shape == zeroed.shape == (2, 5)
    if not any(leaf.inexact for leaf in removal):
        scale = float(zeroed.abs().max())
        assert math.isfinite(scale)
        assert float((smaller - zeroed).abs().max()) <= TOLERANCE * scale
        if has_free_dimension(next(iter(program.graph.nodes)).meta["val"]):
            more = program.run(Inputs((torch.cat((x, x[:1])),)))
            assert float((more[:2] - smaller).abs().max()) <= TOLERANCE * scale
    return len(removal)


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_network(seed: int) -> None:
    """A free batch makes tracing three times slower, so one network in eight has it."""
    net, x = build(seed)
    program = trace(net, x, "batch" if seed % 8 == 0 else None)
    for mask in range(4):
        compare(program, x, mask, exact=mask < 3)


def test_networks_take_every_step() -> None:
    taken = collections.Counter(kind for seed in range(150) for kind in build(seed)[0].kinds)
    public = {name for name in vars(RandomNet) if not name.startswith("_")}
    assert public - taken.keys() == {"forward", "take", "own", "some_width", "conv", "activation", "features"}
    assert min(taken.values()) >= 5


def test_networks_have_something_to_remove() -> None:
    counts = []
    for seed in range(20):
        net, x = build(seed)
        counts.append(compare(trace(net, x, None), x, seed, exact=False))
    assert sum(count > 0 for count in counts) >= 18
    assert sum(counts) >= 40
