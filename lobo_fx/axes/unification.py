"""Unification of two axes that must mean the same, by finding the common refinement of their decompositions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import sympy

from lobo_fx.axes.axis import Axis, AxisError, Form, Size, concatenation, product, total

__all__ = ["split_at", "unify"]


def unify(first: Axis, second: Axis) -> Axis:
    """Makes two axes the same, as their common refinement.

    Raises:
        AxisError: they have none; parts that were already unified stay so, and the caller locks both axes.
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
    """Replaces `gone` by `kept`; locks and roles of a leaf pass to all leaves of the axis that replaces it."""
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
    """Replaces parts that were themselves split by their own parts."""
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
            head, tail = split_at(y, x.find().size)
            unify(x, head)
            right.insert(0, tail)
        else:
            head, tail = split_at(x, y.find().size)
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
        head, rest = split_at(rest, size)
        pieces.append(head)
    return [*pieces, rest]


def split_at(axis: Axis, at: Size) -> tuple[Axis, Axis]:
    """The first `at` positions, and the others.

    Raises:
        AxisError: the cut does not fall between positions of the outermost factor of a product.
    """
    root = axis.find()
    if not isinstance(root.size, int) or not isinstance(at, int) or not 0 < at < root.size:
        raise AxisError(f"{root} can't be split at {at}")
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
                head, tail = split_at(part, at)
                return concatenation([*before, head]), concatenation([tail, *root.parts[index + 1 :]])
            before.append(part)
            at -= size
        raise AssertionError("the place is inside the axis")
    outer, *inner = root.parts
    width = total(part.find().size for part in inner)
    rows = _divide(at, width)
    if rows is None:
        raise AxisError(f"a split at {at} runs through {root}")
    head, tail = split_at(outer, rows)
    return product([head, *inner]), product([tail, *inner])
