"""Networks of kinds that the model zoos lack: a recurrent tagger, a U-Net, super-resolution by pixel shuffle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lobo_fx.graph.inputs import Inputs


class Tagger(nn.Module):
    """A tag for each word, by a bidirectional LSTM of two layers."""

    def __init__(self, vocabulary: int = 500, width: int = 48, hidden: int = 64, tags: int = 9) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, tags)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        tags: torch.Tensor = self.head(self.lstm(self.embedding(words))[0])
        return tags


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, each level joined with its equal on the way down."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 40, 56), classes: int = 5) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(_twice, (3, *widths[:-1]), widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, high, 2, stride=2) for deep, high in pairs)
        self.joined = nn.ModuleList(_twice(2 * high, high) for _, high in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        levels = [self.down[0](image)]
        for down in list(self.down)[1:]:
            levels.append(down(nn.functional.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for up, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat((levels.pop(), up(x)), 1))
        mask: torch.Tensor = self.head(x)
        return mask


class SuperResolution(nn.Module):
    """Residual blocks at low resolution, two pixel shuffles, and the enlarged image added."""

    def __init__(self, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.PReLU(), nn.Conv2d(2 * width, width, 1))
            for _ in range(blocks)
        )
        grow = [(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.LeakyReLU()) for _ in range(2)]
        self.grow = nn.Sequential(*(layer for layers in grow for layer in layers))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.first(image)
        for block in self.blocks:
            x = x + block(x)
        enlarged = nn.functional.interpolate(image, scale_factor=4, mode="bicubic")
        result: torch.Tensor = self.last(self.grow(x)) + enlarged
        return result


OWN: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "lstm-tagger": (Tagger, torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(0))),
    "u-net": (UNet, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))),
    "super-resolution": (SuperResolution, torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))),
}


def build_own(name: str) -> tuple[nn.Module, Inputs]:
    """Builds the model of that name with its inputs, from torch's global seed."""
    make, example = OWN[name]
    return make(), Inputs((example,))
