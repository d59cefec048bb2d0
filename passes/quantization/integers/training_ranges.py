"""Ranges of activations while weights train: followed, held, or learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e import FakeQuantize, FixedQParamsFakeQuantize

__all__ = ["LearnedRange", "give_back_ranges", "learn_ranges", "stop_following"]


class LearnedRange(nn.Module):
    """Rounds values to 8 bits between two ends that have gradients; rounding itself has the gradient 1.

    Args:
        fake: the fake quantizer that it replaces, which has seen data.

    Source: Esser et al., "Learned Step Size Quantization", 2020, with a zero point as in Bhalgat et al., "LSQ+", 2020.
    """

    def __init__(self, fake: Any) -> None:
        super().__init__()
        observer = fake.activation_post_process
        self.fake = (fake,)  # in a tuple, its buffers are not part of what is trained
        low = observer.min_val.detach().clone().reshape(())
        # after a ReLU it stays 0, or the ReLU could not be a part of the integer kernel before it
        self.low = nn.Parameter(low, requires_grad=bool(low < 0))
        self.high = nn.Parameter(observer.max_val.detach().clone().reshape(()))
        self.first, self.last, self.smallest = float(fake.quant_min), float(fake.quant_max), float(observer.eps)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = ((high - low) / (self.last - self.first)).clamp(min=self.smallest)
        zero = self.first - _rounded(low / scale)
        codes = _rounded(values / scale) + zero
        return (codes.clamp(self.first, self.last) - zero) * scale


def _rounded(value: torch.Tensor) -> torch.Tensor:
    return value + (value.round() - value).detach()


def _followed(module: fx.GraphModule) -> dict[str, Any]:
    """The fake quantizers of activations, by name: each observes one range for a tensor.

    Not those of values that an earlier pass has quantized, whose ranges stay.
    """
    found = {}
    for node in module.graph.find_nodes(op="call_module"):
        part = module.get_submodule(str(node.target))
        fixed = isinstance(part, FixedQParamsFakeQuantize)
        if isinstance(part, FakeQuantize) and not part.is_per_channel and not fixed:
            found[str(node.target)] = part
    return found


def stop_following(module: fx.GraphModule) -> None:
    """Ranges of activations stay as they are from now on; those of weights go on following the weights."""
    for fake in _followed(module).values():
        fake.disable_observer()


def learn_ranges(module: fx.GraphModule) -> dict[str, LearnedRange]:
    """Replaces ranges that follow the data by learned ranges; returns these by name.

    Args:
        module: prepared for training, its observers have seen data.
    """
    made: dict[int, LearnedRange] = {}
    found = {}
    for name, fake in _followed(module).items():
        found[name] = made.setdefault(id(fake), LearnedRange(fake))  # tensors that share a range go on doing so
        setattr(module, name, found[name])
    return found


def give_back_ranges(module: fx.GraphModule, learned: dict[str, LearnedRange]) -> None:
    """Puts the fake quantizers back, with the ranges that were learned."""
    for name, part in learned.items():
        (fake,) = part.fake
        fake.activation_post_process.min_val.copy_(part.low.detach().clamp(max=0))
        fake.activation_post_process.max_val.copy_(part.high.detach().clamp(min=0))
        setattr(module, name, fake)
