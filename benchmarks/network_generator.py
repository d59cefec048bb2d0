"""Random networks, each made anew from its number: every kind of layer that passes treat, in random order.

`RandomNet` takes images to five classes; `WideNet` starts from words and sequences too, has recurrent layers, attention
in every spelling, weights that are computed or tied, and one output or several.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["LENGTH", "SIDE", "VOCABULARY", "RandomNet", "WideNet"]

Tensor = torch.Tensor
Step = Callable[[Any], Any]
Part = TypeVar("Part", bound=nn.Module)
Padding = Literal["zeros", "reflect", "replicate", "circular"]

ACTIVATIONS: tuple[Step, ...] = (F.relu, torch.sigmoid, F.gelu, torch.tanh, lambda x: F.softplus(x), lambda x: x)
SIDE, LENGTH, VOCABULARY = 4, 6, 23
"""Of images, of sequences, of words."""


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
        self._build()

    def _build(self) -> None:
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

    def own(self, module: Part) -> Part:
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
        if kind == "batch":
            return self.own(nn.BatchNorm2d(self.width))
        norm = self.own(nn.InstanceNorm2d(self.width, affine=True))
        return lambda x: norm(x) if x.shape[2] > 1 else x  # one number has no deviation

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
        norm: nn.Module = self.random.choice([nn.LayerNorm, nn.RMSNorm])(self.width)
        return self.own(norm)

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


class WideNet(RandomNet):
    """A random network of any kind that passes treat, with weights large enough that its outputs tell right from wrong.

    Attributes:
        start: what it takes: `image`, `features` (a sequence of vectors) or `words`.
        length: of the sequence at present; None once a step has fixed it for good.
        fixed: whether a step holds for that length of sequence alone.
        embedding: of the words, for a head that is tied to it.
    """

    def _build(self) -> None:
        choose, some = self.random.choice, self.random.randint
        self.start, self.length, self.fixed = choose(["image", "image", "features", "words"]), LENGTH, False
        self.embedding: nn.Embedding | None = None
        if self.start == "image":
            self.take(self.convolution)
            images = [
                *(self.convolution, self.norm, self.residual, self.dense, self.split, self.gate, self.shuffle),
                *(self.excitation, self.rotate, self.shared, self.pool, self.depthwise, self.branches),
                *(self.transposed_convolution, self.strided, self.resized, self.pixel_shuffle, self.channels_last_norm),
                *(self.two_norms, self.computed_kernel, self.padded, self.scaled, self.slopes, self.either, self.tied),
            ]
            for _ in range(some(1, 5)):
                self.take(choose(images))
            if self.random.random() < 0.5:
                self.take(self.head_of_image)
                return
            self.steps.append(lambda x: x.flatten(2).transpose(1, 2))
            self.length, self.fixed = self.features() // self.width, True
        else:
            self.take(self.lookup if self.start == "words" else self.linear)
        tokens = [
            *(self.linear, self.token_norm, self.residual_linear, self.attention, self.grouped_query, self.fused),
            *(self.transposed_heads, self.joined_linear, self.linear_attention, self.attention_with_norm),
            *(self.lstm, self.gru, self.last_state, self.transformer_layer, self.multi_head, self.plain_attention),
            *(self.gated, self.window, self.positions, self.class_token, self.low_rank, self.spelled, self.token_batch),
            *(self.masked, self.experts, self.elman),
        ]
        for _ in range(some(1, 5)):
            self.take(choose(tokens))
        heads = [self.head_of_mean, self.head_of_everything, self.head_per_token, self.head_of_several]
        self.take(choose([*heads, self.head_tied] if self.embedding is not None else heads))

    def own(self, module: Part) -> Part:
        """Weights of a size that keeps signals alive."""
        for parameter in super().own(module).parameters():
            if parameter.dim() > 1:
                fan = parameter[0].numel()
                nn.init.normal_(parameter, 0.0, 1.2 / math.sqrt(max(fan, 1)))
        return module

    def stored(self, *shape: int) -> Tensor:
        """A parameter of no module's."""
        parameter = nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))
        self.parts.append(nn.ParameterList([parameter]))
        return parameter

    def inputs(self, rows: int, length: int = LENGTH) -> Tensor:
        """What the network takes, random, of so many rows."""
        if self.start == "words":
            return torch.randint(0, VOCABULARY, (rows, length))
        return torch.randn(rows, 3, SIDE, SIDE) if self.start == "image" else torch.randn(rows, length, 3)

    def features(self) -> int:
        with torch.no_grad():
            result: Tensor = self.eval()(self.inputs(2))
        return result.numel() // 2

    def flip(self) -> bool:
        return self.random.random() < 0.5

    # --- on images -----------------------------------------------------------------------------------------

    def transposed_convolution(self) -> Step:
        out = self.some_width(2)
        groups = self.random.choice([g for g in (1, 1, 2) if self.width % g == out % g == 0])
        size, stride = self.random.choice([(2, 2), (3, 1), (3, 2)])
        conv = self.own(nn.ConvTranspose2d(self.width, out, size, stride, padding=size // 3, groups=groups))
        self.width = out
        return lambda x: F.avg_pool2d(conv(x), stride).relu()

    def strided(self) -> Step:
        """A convolution that is dilated or strided, or pads with what it finds."""
        modes: list[Padding] = ["zeros", "reflect", "circular", "replicate"]
        out, mode = self.some_width(), self.random.choice(modes)
        settings: dict[str, Any] = self.random.choice([{"dilation": 2, "padding": 2}, {"stride": 2, "padding": 1}])
        conv = self.own(nn.Conv2d(self.width, out, 3, bias=self.flip(), padding_mode="zeros", **settings))
        around = self.own(nn.Conv2d(out, out, 3, padding=1, padding_mode=mode))
        self.width = out
        return lambda x: around(F.interpolate(F.hardswish(conv(x)), size=(SIDE, SIDE)))

    def resized(self) -> Step:
        mode = self.random.choice(["nearest", "bilinear"])
        conv = self.own(nn.Conv2d(self.width, self.width, 3, stride=2, padding=1))
        return lambda x: conv(F.interpolate(x, scale_factor=2, mode=mode))

    def pixel_shuffle(self) -> Step:
        out = self.random.randint(1, 4)
        conv = self.own(nn.Conv2d(self.width, 4 * out, 1))
        self.width = out
        return lambda x: F.max_pool2d(F.pixel_shuffle(conv(x), 2), 2)

    def channels_last_norm(self) -> Step:
        norm, layer = self.own(nn.LayerNorm(self.width)), self.own(nn.Linear(self.width, self.width))
        return lambda x: x + layer(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def two_norms(self) -> Step:
        """One convolution, read by two batch norms."""
        conv = self.conv(self.width, self.width)
        first, second = self.own(nn.BatchNorm2d(self.width)), self.own(nn.BatchNorm2d(self.width))

        def step(x: Tensor) -> Tensor:
            y = conv(x)
            result: Tensor = F.relu6(first(y)) + second(y)
            return result

        return step

    def computed_kernel(self) -> Step:
        """Convolution weights standardized in every call, then a batch norm."""
        out = self.some_width()
        weight, norm = self.stored(out, self.width, 3, 3), self.own(nn.BatchNorm2d(out))
        self.width = out

        def step(x: Tensor) -> Tensor:
            centred = weight - weight.mean((1, 2, 3), keepdim=True)
            return F.silu(norm(F.conv2d(x, centred / (centred.std() + 1e-3), padding=1)))

        return step

    def padded(self) -> Step:
        before, after = self.random.randint(0, 2), self.random.randint(1, 2)
        self.width += before + after
        return lambda x: F.pad(x, (0, 0, 0, 0, before, after))

    def scaled(self) -> Step:
        factor, conv = self.stored(self.width, 1, 1), self.conv(self.width, self.width)
        return lambda x: x + factor * conv(x)

    def slopes(self) -> Step:
        conv = self.conv(self.width, self.width)
        slope = self.own(nn.PReLU(self.random.choice([1, self.width])))
        return lambda x: slope(conv(x))

    def either(self) -> Step:
        """The mean decides between two convolutions."""
        first, second = self.conv(self.width, self.width), self.conv(self.width, self.width)
        return lambda x: torch.cond(x.mean() > 0.1, lambda y: first(y), lambda y: second(y).relu(), (x,))

    def tied(self) -> Step:
        """The weight of one convolution, transposed, is another's."""
        inner = self.some_width()
        conv = self.own(nn.Conv2d(self.width, inner, 1))
        return lambda x: x + F.conv_transpose2d(F.leaky_relu(conv(x)), conv.weight)

    # --- on tokens -----------------------------------------------------------------------------------------

    def lookup(self) -> Step:
        self.width = self.some_width(2)
        self.embedding = nn.Embedding(VOCABULARY, self.width)
        return self.own(self.embedding)

    def lstm(self) -> Step:
        hidden, layers, both = self.some_width(), self.random.choice([1, 1, 2]), self.flip()
        cell = self.own(nn.LSTM(self.width, hidden, layers, bidirectional=both, bias=self.flip(), batch_first=True))
        self.width = hidden * (1 + both)
        return lambda x: cell(x)[0]

    def gru(self) -> Step:
        hidden, both = self.some_width(), self.flip()
        cell = self.own(nn.GRU(self.width, hidden, bidirectional=both, batch_first=True))
        self.width = hidden * (1 + both)
        return lambda x: cell(x)[0].relu()

    def elman(self) -> Step:
        """A plain recurrent layer, time first."""
        hidden = self.some_width()
        cell = self.own(nn.RNN(self.width, hidden, nonlinearity=self.random.choice(["tanh", "relu"])))
        self.width = hidden
        return lambda x: cell(x.transpose(0, 1))[0].transpose(0, 1)

    def last_state(self) -> Step:
        """The last state is added to every token."""
        cell = self.own(nn.LSTM(self.width, self.width, batch_first=True))
        return lambda x: x + cell(x)[1][0][-1].unsqueeze(1)

    def _heads(self) -> int:
        return self.random.choice([heads for heads in (1, 2, 3, 4) if self.width % heads == 0])

    def transformer_layer(self) -> Step:
        settings: dict[str, Any] = {"norm_first": self.flip(), "activation": self.random.choice(["relu", "gelu"])}
        return self.own(
            nn.TransformerEncoderLayer(self.width, self._heads(), self.some_width(2), batch_first=True, **settings)
        )

    def multi_head(self) -> Step:
        layer, weights = self.own(nn.MultiheadAttention(self.width, self._heads(), batch_first=True)), self.flip()
        return lambda x: x + layer(x, x, x, need_weights=weights)[0]

    def plain_attention(self) -> Step:
        """Attention as products and a softmax, causal, rotated or with repeated heads."""
        groups, times, d = self.random.randint(1, 2), self.random.choice([1, 2]), 2 * self.random.randint(1, 2)
        heads, causal, rotary, product = groups * times, self.flip(), self.flip(), self.flip()
        q, out = self.own(nn.Linear(self.width, heads * d)), self.own(nn.Linear(heads * d, self.width))
        k, v = self.own(nn.Linear(self.width, groups * d)), self.own(nn.Linear(self.width, groups * d))

        def rotate(x: Tensor) -> Tensor:
            angle = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] / (1 + torch.arange(d // 2))
            cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
            return x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin

        def step(x: Tensor) -> Tensor:
            rows, length, _ = x.shape
            a, b, c = (f(x).view(rows, length, -1, d).transpose(1, 2) for f in (q, k, v))
            if rotary:
                a, b = rotate(a), rotate(b)
            b, c = b.repeat_interleave(times, 1), c.repeat_interleave(times, 1)
            scores = torch.einsum("bhqd,bhkd->bhqk", a, b) if product else a @ b.transpose(-1, -2)
            scores = scores / math.sqrt(d)
            if causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -1e9)
            mixed = (scores.softmax(-1) @ c).transpose(1, 2).reshape(rows, length, heads * d)
            result: Tensor = x + out(mixed)
            return result

        return step

    def gated(self) -> Step:
        inner, bias = self.some_width(), self.flip()
        up, gate = (self.own(nn.Linear(self.width, inner, bias=bias)) for _ in range(2))
        down, norm = self.own(nn.Linear(inner, self.width, bias=bias)), self.own(nn.RMSNorm(self.width))

        def step(x: Tensor) -> Tensor:
            y = norm(x)
            result: Tensor = x + down(F.silu(gate(y)) * up(y))
            return result

        return step

    def window(self) -> Step:
        """A convolution over neighbouring tokens."""
        out, groups = self.some_width(2), self.random.choice([1, 2])
        conv = self.own(nn.Conv1d(self.width, out, 3, padding=1, groups=groups if self.width % groups == 0 else 1))
        self.width = out
        return lambda x: F.gelu(conv(x.transpose(1, 2))).transpose(1, 2)

    def positions(self) -> Step:
        self.fixed = True
        table = self.stored(1, self.length, self.width)
        return lambda x: x + table

    def class_token(self) -> Step:
        token = self.stored(1, 1, self.width)
        self.length += 1
        return lambda x: torch.cat((token.expand(x.shape[0], -1, -1), x), 1)

    def low_rank(self) -> Step:
        """A linear layer whose weight is a sum of parts."""
        layer, rank = self.own(nn.Linear(self.width, self.width)), self.random.randint(1, 2)
        a, b = self.stored(self.width, rank), self.stored(rank, self.width)
        return lambda x: F.linear(x, layer.weight + 0.5 * a @ b, layer.bias)

    def spelled(self) -> Step:
        """Products with a stored weight that no layer holds."""
        out = self.some_width()
        weight, bias = self.stored(self.width, out), self.stored(out)
        ways: list[Step] = [
            lambda x: x @ weight + bias,
            lambda x: torch.einsum("blw,wo->blo", x, weight) * 0.5,
            lambda x: (weight.T @ x.transpose(1, 2)).transpose(1, 2),
            lambda x: torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(x.shape[0], -1, out),
        ]
        self.width = out
        return self.random.choice(ways)

    def token_batch(self) -> Step:
        """A batch norm over tokens, after a linear layer."""
        layer, norm = self.own(nn.Linear(self.width, self.width)), self.own(nn.BatchNorm1d(self.width))
        return lambda x: norm(layer(x).transpose(1, 2)).transpose(1, 2)

    def masked(self) -> Step:
        layer = self.own(nn.Linear(self.width, self.width))
        return lambda x: torch.where(x > 0, layer(x), x).clamp(-3, 3)

    def experts(self) -> Step:
        """Two layers, mixed by a third."""
        first, second = (self.own(nn.Linear(self.width, self.width)) for _ in range(2))
        router = self.own(nn.Linear(self.width, 2))

        def step(x: Tensor) -> Tensor:
            share = router(x).softmax(-1)
            result: Tensor = share[..., :1] * first(x) + share[..., 1:] * second(x).tanh()
            return result

        return step

    # --- heads ---------------------------------------------------------------------------------------------

    def head_of_everything(self) -> Step:
        self.fixed = True
        return super().head_of_everything()

    def head_per_token(self) -> Step:
        return self.own(nn.Linear(self.width, 5))

    def head_tied(self) -> Step:
        """Words are scored by the table that they were looked up in."""
        assert self.embedding is not None
        layer, table = self.own(nn.Linear(self.width, self.embedding.embedding_dim)), self.embedding.weight
        return lambda x: F.linear(layer(x), table)

    def head_of_several(self) -> Step:
        """Outputs of several kinds, one of them inside another."""
        boxes, scores, layer = (self.own(nn.Linear(self.width, size)) for size in (4, 3, 5))

        def step(x: Tensor) -> dict[str, Any]:
            found = torch.cat((100 * boxes(x).sigmoid(), scores(x).softmax(-1)), -1)
            return {"logits": layer(x.mean(1)), "found": found, "states": (x, x.amax(1))}

        return step
