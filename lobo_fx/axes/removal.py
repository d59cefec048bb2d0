"""Computes how removing positions from leaves changes the axes that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lobo_fx.axes.axis import Axis, Form, total

__all__ = ["Removal", "kept", "kept_size", "positions", "project", "size_with"]

Removal = dict[Axis, torch.Tensor]
"""For each leaf from which positions go: a boolean vector, True where the position stays."""


def kept(axis: Axis, removal: Removal) -> torch.Tensor:
    """Which positions of an axis stay, given which positions of its leaves do."""
    root = axis.find()
    assert isinstance(root.size, int)
    if root.form is Form.LEAF:
        known = removal.get(root)
        return torch.ones(root.size, dtype=torch.bool) if known is None else known
    if root.form is Form.CONCATENATION:
        return torch.cat([kept(part, removal) for part in root.parts])
    mask = torch.ones(1, dtype=torch.bool)
    for part in root.parts:
        mask = (mask[:, None] & kept(part, removal)[None, :]).flatten()
    return mask


def kept_size(axis: Axis, removal: Removal) -> Any:
    """How many positions of an axis stay; free dimensions stay as they are."""
    return size_with(axis, {leaf: int(mask.sum()) for leaf, mask in removal.items()})


def size_with(axis: Axis, widths: Mapping[Axis, int]) -> Any:
    """How many positions an axis has when its leaves have these widths; leaves not named keep their size."""
    root = axis.find()
    if root.form is Form.LEAF:
        return widths.get(root, root.size)
    sizes = [size_with(part, widths) for part in root.parts]
    return sum(sizes) if root.form is Form.CONCATENATION else total(sizes)


def positions(axis: Axis, leaf: Axis) -> tuple[list[int], list[int]]:
    """Which positions of an axis belong to a leaf, and to which of the leaf's positions each belongs."""
    if axis.find() is leaf:
        return list(range(leaf.size)), list(range(leaf.size))
    gone = [~kept(axis, {leaf: torch.arange(leaf.size) != at}) for at in range(leaf.size)]
    pairs = sorted((position, at) for at, mask in enumerate(gone) for position in mask.nonzero().flatten().tolist())
    return [position for position, _ in pairs], [at for _, at in pairs]


def project(axis: Axis, leaf: Axis, values: torch.Tensor) -> torch.Tensor:
    """Sums values along an axis into one value for each position of one of its leaves.

    Args:
        axis: the axis that `values` run along.
        leaf: which leaf to sum for.
        values: shape [axis.size].

    Returns:
        Shape [leaf.size]; zeros where the leaf is no part of the axis.
    """
    root = axis.find()
    if root is leaf:
        return values
    result = values.new_zeros(leaf.size)
    if root.form is Form.CONCATENATION:
        start = 0
        for part in root.parts:
            size = part.find().size
            result = result + project(part, leaf, values[start : start + size])
            start += size
    elif root.form is Form.PRODUCT:
        shaped = values.reshape([part.find().size for part in root.parts])
        for index, part in enumerate(root.parts):
            others = [dim for dim in range(len(root.parts)) if dim != index]
            result = result + project(part, leaf, shaped.sum(others))
    return result
