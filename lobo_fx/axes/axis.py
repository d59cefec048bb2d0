"""The algebra of axes: what the positions along a dimension mean, and when two dimensions mean the same.

An axis is a leaf, a product of axes (row-major: a flattened `heads × head_dim`), or a concatenation of axes (a
`cat`, a fused `qkv`). Axes are unified as a type checker unifies types; a leaf can later be refined into a
product or a concatenation, and everyone who holds it sees that.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

__all__ = ["Axis", "AxisError", "Form", "Size", "concatenation", "product", "same", "total"]

Size: TypeAlias = Any
"""Number of positions: an int, or a sympy expression where a dimension is free (the batch)."""


class AxisError(Exception):
    """Two axes can't mean the same; the message is a short fact."""


class Form(enum.Enum):
    """How an axis is made up."""

    LEAF = "leaf"
    PRODUCT = "product"
    CONCATENATION = "concatenation"


@dataclasses.dataclass(eq=False)
class Axis:
    """Positions along a dimension. Compare with `same`, never with `==`: axes are merged over time.

    Attributes:
        size: number of positions.
        form: leaf, product or concatenation.
        parts: factors of a product (outermost first) or pieces of a concatenation.
        locks: why no position may be removed; a leaf without locks is free.
        inexact: why removing positions is more than zeroing them (statistics over the axis).
        roles: how operators use a leaf: "heads", "head_dim", "groups", "residual", "channels", "hidden", and
            "written" or "read" by a linear layer; `lobo_fx.axes.kind` reduces them to one word.
    """

    size: Size
    form: Form = Form.LEAF
    parts: tuple[Axis, ...] = ()
    locks: dict[str, None] = dataclasses.field(default_factory=dict)
    inexact: dict[str, None] = dataclasses.field(default_factory=dict)
    roles: set[str] = dataclasses.field(default_factory=set)
    merged_into: Axis | None = None

    def find(self) -> Axis:
        """The axis that stands for this one after all merges."""
        axis = self
        while axis.merged_into is not None:
            axis = axis.merged_into
        if axis is not self:
            self.merged_into = axis
        return axis

    def leaves(self) -> Iterator[Axis]:
        """The leaves that make up this axis, in order."""
        axis = self.find()
        if axis.form is Form.LEAF:
            yield axis
        for part in axis.parts:
            yield from part.leaves()

    def lock(self, reason: str) -> None:
        """Forbids removing positions, with the reason."""
        for leaf in self.leaves():
            leaf.locks[reason] = None

    def mark_inexact(self, reason: str) -> None:
        """Notes that removing positions is more than zeroing them."""
        for leaf in self.leaves():
            leaf.inexact[reason] = None

    def mark(self, role: str) -> None:
        """Notes what the axis is used as."""
        for leaf in self.leaves():
            leaf.roles.add(role)

    @property
    def locked(self) -> bool:
        """Whether no position of it may be removed."""
        return all(leaf.locks or leaf.size == 1 for leaf in self.leaves())

    def __str__(self) -> str:
        axis = self.find()
        if axis.form is Form.LEAF:
            return f"{axis.size}{'!' if axis.locks else ''}"
        sign = "*" if axis.form is Form.PRODUCT else "+"
        return f"({sign.join(map(str, axis.parts))})"


def product(axes: Iterable[Axis]) -> Axis:
    """The product of axes, outermost first. Factors of size 1 vanish; one factor is itself."""
    factors: list[Axis] = []
    for axis in axes:
        root = axis.find()
        if root.form is Form.PRODUCT:
            factors.extend(root.parts)
        elif root.size != 1:
            factors.append(root)
    if not factors:
        return Axis(1)
    if len(factors) == 1:
        return factors[0]
    return Axis(total(factor.size for factor in factors), Form.PRODUCT, tuple(factors))


def concatenation(axes: Iterable[Axis]) -> Axis:
    """The concatenation of axes. Empty pieces vanish; one piece is itself."""
    pieces: list[Axis] = []
    for axis in axes:
        root = axis.find()
        if root.form is Form.CONCATENATION:
            pieces.extend(root.parts)
        elif root.size != 0:
            pieces.append(root)
    if len(pieces) == 1:
        return pieces[0]
    return Axis(sum((piece.size for piece in pieces), start=0), Form.CONCATENATION, tuple(pieces))


def total(sizes: Iterable[Size]) -> Size:
    """Product of sizes."""
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def same(first: Axis, second: Axis) -> bool:
    """Whether two axes were unified, or are made of the same parts."""
    a, b = first.find(), second.find()
    if a is b:
        return True
    if a.form is not b.form or a.form is Form.LEAF or len(a.parts) != len(b.parts):
        return False
    return all(same(x, y) for x, y in zip(a.parts, b.parts, strict=True))
