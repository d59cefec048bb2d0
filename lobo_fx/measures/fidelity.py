"""Differences of outputs: signal-to-noise ratio and largest error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = [
    "Ratio",
    "float_outputs",
    "largest_error",
    "same_nonfinite",
    "signal_to_noise",
    "stacked",
    "tensor_leaves",
    "variation",
]


def float_outputs(outputs: Any) -> list[torch.Tensor]:
    """The floating-point tensors among a program's outputs, flat."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def signal_to_noise(reference: Any, outputs: Any) -> float:
    """Signal-to-noise ratio in decibels over all floating-point outputs; infinite where they are equal.

    10·log10(Σ r² / Σ (r - o)²), each output tensor weighted by its own energy. The outputs must be infinite or NaN
    exactly where the reference is; otherwise the ratio is minus infinity.
    """
    ratio = Ratio()
    ratio.add(reference, outputs)
    return ratio.decibels


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise) of two energies; infinite without noise, minus infinite without signal."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal / noise > 0 else -math.inf


class Ratio:
    """`signal_to_noise` over several batches, one at a time."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.is_alike = True

    def add(self, reference: Any, outputs: Any) -> None:
        """Adds the outputs for a batch."""
        for r, o in zip(float_outputs(reference), float_outputs(outputs), strict=True):
            finite = r.isfinite()
            if not same_nonfinite(r, o):
                self.is_alike = False
                continue
            self.signal += float(r[finite].double().pow(2).sum())
            self.noise += float((r[finite].double() - o[finite].double()).pow(2).sum())

    @property
    def decibels(self) -> float:
        if not self.is_alike:
            return -math.inf
        return decibels(self.signal, self.noise)


def largest_error(reference: Any, outputs: Any) -> float:
    """Largest difference over all outputs, as a share of the reference's largest magnitude.

    For integers and booleans, the error is the share of them that differ. A NaN or infinity on only one side is an
    infinite error.
    """
    worst = 0.0
    pairs = zip(tensor_leaves(reference), tensor_leaves(outputs), strict=True)
    for r, o in ((r.detach(), o.detach()) for r, o in pairs):
        if not r.numel():
            continue
        if not r.is_floating_point():
            worst = max(worst, float((r != o).double().mean()))
            continue
        if not same_nonfinite(r, o):
            return math.inf
        finite = r.isfinite()
        if bool(finite.any()):
            scale = float(r[finite].abs().max()) or 1.0
            worst = max(worst, float((r[finite] - o[finite]).abs().max()) / scale)
    return worst


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One output over several batches, concatenated as rows; flattened if the shapes of rows differ."""
    same = parts[0].dim() > 0 and len({part.shape[1:] for part in parts}) == 1
    return torch.cat([part if same else part.flatten() for part in parts]).double()


def variation(outputs: Iterable[torch.Tensor]) -> float:
    """Sum of squares about the mean row; if all rows are equal, sum of squares about zero; if all are zero, 1.

    Infinities and NaN, such as those of a mask, count as zero.
    """
    outputs = [y.nan_to_num(0, 0, 0) for y in outputs]
    about_mean = sum(float((y - y.mean(0)).square().sum()) for y in outputs)
    return about_mean or sum(float(y.square().sum()) for y in outputs) or 1.0


def tensor_leaves(outputs: Any) -> list[torch.Tensor]:
    """The tensors among a program's outputs, flat."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def same_nonfinite(r: torch.Tensor, o: torch.Tensor) -> bool:
    """Whether NaN and infinities are at the same positions."""
    places = ~r.isfinite()
    return bool((places == ~o.isfinite()).all()) and bool((r[places].nan_to_num() == o[places].nan_to_num()).all())
