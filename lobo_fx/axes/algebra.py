"""The algebra of axes: what the positions along a dimension mean, and when two dimensions mean the same.

An axis is a leaf, a product of axes (row-major: a flattened `heads × head_dim`), or a concatenation of axes (a
`cat`, a fused `qkv`). Axes are unified as a type checker unifies types; a leaf can later be refined into a
product or a concatenation, and everyone who holds it sees that.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import sympy
import torch

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
        roles: what rules know of a leaf: "heads", "head_dim", "groups", "residual", "channels", "hidden", and
            "written" or "read" by a linear layer; `lobo_fx.axes.kind` makes one word of them.
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


def unify(first: Axis, second: Axis) -> Axis:
    """Makes two axes the same, in their common refinement.

    Raises:
        AxisError: they have none; what was already unified on the way stays so, and the caller locks both.
    """
    a, b = first.find(), second.find()
    if a is b:
        return a
    if a.size != b.size:
        raise AxisError(f"{a} and {b} have different sizes")
    if a.form is Form.LEAF:
        return _merge(a, b)
    if b.form is Form.LEAF:
        return _merge(b, a)
    if a.form is b.form is Form.PRODUCT:
        _unify_products(a, b)
    elif a.form is b.form is Form.CONCATENATION:
        _unify_pieces(a, b)
    else:
        whole, pieces = (a, b) if a.form is Form.PRODUCT else (b, a)
        for piece, part in zip(pieces.parts, _cut_at(whole, [p.size for p in pieces.parts]), strict=True):
            unify(part, piece)
        return _merge(pieces, whole)
    a, b = a.find(), b.find()
    return a if a is b else _merge(a, b)


def _merge(gone: Axis, kept: Axis) -> Axis:
    """Lets `kept` stand for `gone`; what was known of a leaf holds for the leaves that it turns out to be."""
    if gone is kept:
        return kept
    if any(part.find() is gone for part in _descendants(kept)):
        raise AxisError(f"{gone} would contain itself")
    for reason in gone.locks:
        kept.lock(reason)
    for reason in gone.inexact:
        kept.mark_inexact(reason)
    for role in gone.roles:
        kept.mark(role)
    gone.merged_into = kept
    return kept


def _descendants(axis: Axis) -> Iterator[Axis]:
    for part in axis.find().parts:
        yield part
        yield from _descendants(part)


def _refine(leaf: Axis, form: Form, sizes: Sequence[Size]) -> tuple[Axis, ...]:
    """Turns a leaf into a product or a concatenation of new leaves."""
    locks, inexact, roles = leaf.locks, leaf.inexact, leaf.roles
    parts = tuple(Axis(size, locks=dict(locks), inexact=dict(inexact), roles=set(roles)) for size in sizes)
    leaf.form, leaf.parts, leaf.locks, leaf.inexact, leaf.roles = form, parts, {}, {}, set()
    return parts


def _unify_products(a: Axis, b: Axis) -> None:
    """Matches factors from the outside in, splitting a factor where the other side has a smaller one."""
    left, right = list(a.parts), list(b.parts)
    while left and right:
        x, y = left.pop(0).find(), right.pop(0).find()
        if x.form is Form.PRODUCT:
            left[:0] = x.parts
            right.insert(0, y)
        elif y.form is Form.PRODUCT:
            right[:0] = y.parts
            left.insert(0, x)
        elif x.size == y.size:
            unify(x, y)
        elif (rest := _divide(x.size, y.size)) is not None:
            left[:0] = _factors(x, y.size, rest)
            right.insert(0, y)
        elif (rest := _divide(y.size, x.size)) is not None:
            right[:0] = _factors(y, x.size, rest)
            left.insert(0, x)
        else:
            raise AxisError(f"{a} and {b} have no common refinement")
    _flatten(a)
    _flatten(b)


def _factors(axis: Axis, outer: Size, inner: Size) -> tuple[Axis, ...]:
    if axis.form is not Form.LEAF:
        raise AxisError(f"{axis} is no product of {outer} and {inner}")
    return _refine(axis, Form.PRODUCT, [outer, inner])


def _divide(size: Size, by: Size) -> Size | None:
    """`size / by` where that is a whole number for every value of the free dimensions."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    quotient = sympy.cancel(sympy.sympify(size) / by)
    if not quotient.is_integer:
        return None
    return int(quotient) if quotient.is_number else quotient


def _flatten(axis: Axis) -> None:
    """Replaces factors that were split by their own factors."""
    parts = [part.find() for part in axis.parts]
    while any(part.form is axis.form for part in parts):
        parts = [q.find() for p in parts for q in (p.parts if p.form is axis.form else (p,))]
    axis.parts = tuple(parts)


def _unify_pieces(a: Axis, b: Axis) -> None:
    """Matches pieces from the start, cutting a piece where the other side has a shorter one."""
    left, right = list(a.parts), list(b.parts)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.find().size == y.find().size:
            unify(x, y)
        elif _smaller(x.find().size, y.find().size):
            head, tail = cut(y, x.find().size)
            unify(x, head)
            right.insert(0, tail)
        else:
            head, tail = cut(x, y.find().size)
            unify(head, y)
            left.insert(0, tail)
    _flatten(a)
    _flatten(b)


def _smaller(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    raise AxisError(f"can't tell which of {a} and {b} is longer")


def _cut_at(axis: Axis, sizes: Sequence[Size]) -> list[Axis]:
    """Cuts an axis into consecutive pieces of the given sizes."""
    pieces, rest = [], axis
    for size in itertools.islice(sizes, len(sizes) - 1):
        head, rest = cut(rest, size)
        pieces.append(head)
    return [*pieces, rest]


def cut(axis: Axis, at: Size) -> tuple[Axis, Axis]:
    """The first `at` positions, and the others.

    Raises:
        AxisError: the cut runs through a product.
    """
    root = axis.find()
    if not isinstance(root.size, int) or not isinstance(at, int) or not 0 < at < root.size:
        raise AxisError(f"{root} can't be cut at {at}")
    if root.form is Form.LEAF:
        head, tail = _refine(root, Form.CONCATENATION, [at, root.size - at])
        return head, tail
    if root.form is Form.CONCATENATION:
        before: list[Axis] = []
        for index, part in enumerate(root.parts):
            size = part.find().size
            assert isinstance(size, int)
            if at == 0:
                return concatenation(before), concatenation(root.parts[index:])
            if at < size:
                head, tail = cut(part, at)
                return concatenation([*before, head]), concatenation([tail, *root.parts[index + 1 :]])
            before.append(part)
            at -= size
        raise AssertionError("the cut is inside the axis")
    outer, *inner = root.parts
    width = total(part.find().size for part in inner)
    rows = _divide(at, width)
    if rows is None:
        raise AxisError(f"a cut at {at} runs through {root}")
    head, tail = cut(outer, rows)
    return product([head, *inner]), product([tail, *inner])


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
    root = axis.find()
    if root.form is Form.LEAF:
        return int(removal[root].sum()) if root in removal else root.size
    sizes = [kept_size(part, removal) for part in root.parts]
    return sum(sizes) if root.form is Form.CONCATENATION else total(sizes)


def same(first: Axis, second: Axis) -> bool:
    """Whether two axes were unified, or are made of the same parts."""
    a, b = first.find(), second.find()
    if a is b:
        return True
    if a.form is not b.form or a.form is Form.LEAF or len(a.parts) != len(b.parts):
        return False
    return all(same(x, y) for x, y in zip(a.parts, b.parts, strict=True))


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
