"""Parts of a tensor, taken or replaced."""

from __future__ import annotations

from lobo_fx.axes.axis import Axis, AxisError, concatenation, product
from lobo_fx.axes.call import Axes, Call, axis_rule, lock_all
from lobo_fx.axes.unification import split_at
from lobo_fx.axes.zeros import MOVED
from lobo_fx.graph.operators import SPLITS, aten

__all__ = ["glu", "select", "select_scatter", "slice_", "slice_scatter", "split", "unbind"]


@axis_rule(*SPLITS, zeros=MOVED)
def split(call: Call) -> list[Axes]:
    """The given dimension is the concatenation of the pieces."""
    return _pieces(call, call.given["dim"] % len(call.axes("self")))


def _pieces(call: Call, dim: int) -> list[Axes]:
    """The pieces of the output along `dim`, by their traced sizes."""
    x = call.axes("self")
    values = call.node.meta["val"]
    sizes = [value.shape[dim] for value in values]
    rest, pieces = x[dim], []
    try:
        for size in sizes[:-1]:
            head, rest = split_at(rest, size)
            pieces.append(head)
        pieces.append(rest)
    except AxisError as error:
        x[dim].lock(str(error))
        pieces = [call.fixed(s if isinstance(s, int) else s.node.expr, str(error)) for s in sizes]
    else:
        call.counts("split_sizes", pieces)
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


@axis_rule(aten.unbind.int, zeros=MOVED)
def unbind(call: Call) -> list[Axes]:
    """The given dimension vanishes; its positions become tensors of their own."""
    x = call.axes("self")
    dim = call.given["dim"] % len(x)
    x[dim].lock("it is taken apart position by position")
    return [(*x[:dim], *x[dim + 1 :]) for _ in call.node.meta["val"]]


_CONSTANTS = frozenset({aten.zeros_like.default, aten.ones_like.default, aten.full_like.default})


@axis_rule(aten.select.int, zeros=MOVED)
def select(call: Call) -> Axes:
    """One position of the given dimension; in a constant tensor, all positions are alike."""
    x = call.axes("self")
    dim = call.given["dim"] % len(x)
    if call.given["self"].target not in _CONSTANTS or call.given["index"] not in (0, -1):
        x[dim].lock("one of its positions is selected")
    return (*x[:dim], *x[dim + 1 :])


@axis_rule(aten.slice.Tensor, zeros=MOVED)
def slice_(call: Call) -> Axes:
    """A range of positions of the given dimension."""
    x, sizes = list(call.axes("self")), call.sizes()
    dim = call.given["dim"] % len(x)
    size, axis = sizes[dim], x[dim]
    if axis.find().size == size and call.given["step"] == 1:
        return tuple(x)
    whole, start, step = axis.find().size, call.given["start"] or 0, call.given["step"]
    if (
        step != 1
        and all(isinstance(n, int) for n in (whole, start, size, step))
        and 0 <= start < step
        and whole == size * step
    ):
        outer = call.fresh(size)  # every step-th position: the first of each run of `step` positions
        call.unify(axis, product([outer, call.fixed(step, "every other position of it is taken")]))
        call.counts("end", axis)
        x[dim] = outer
        return tuple(x)
    if call.given["step"] != 1 or not all(isinstance(number, int) for number in (whole, start, size)):
        axis.lock("a part of it is taken by position")
        x[dim] = call.fixed(size, "a part of another dimension, taken by position")
        return tuple(x)
    start = max(start + whole if start < 0 else start, 0)
    head, piece = Axis(0), axis
    try:
        if start:
            head, piece = split_at(piece, start)
        if piece.find().size != size:
            piece = split_at(piece, size)[0]
        call.counts("start", head)
        call.counts("end", concatenation([head, piece]))
    except AxisError as error:
        axis.lock(str(error))
        piece = call.fixed(size, str(error))
    x[dim] = piece
    return tuple(x)


@axis_rule(aten.slice_scatter.default, zeros=MOVED)
def slice_scatter(call: Call) -> Axes:
    """A range of positions of one dimension is replaced; the other dimensions are unified."""
    x, source = call.axes("self"), call.axes("src")
    dim = call.given["dim"] % len(x)
    whole = x[dim].find().size == source[dim].find().size
    if not whole and not _replaces_run(call, x[dim], source[dim]):
        lock_all([x[dim], source[dim]], "a part of it is replaced by position")
    return tuple(axis if d == dim and not whole else call.unify(axis, source[d]) for d, axis in enumerate(x))


def _replaces_run(call: Call, axis: Axis, source: Axis) -> bool:
    """Unifies the replaced range with `source`, splitting the axis around it; False where it can't be split."""
    size, length, start = axis.find().size, source.find().size, call.given["start"] or 0
    if call.given["step"] != 1 or not all(isinstance(number, int) for number in (size, length, start)):
        return False
    start = start + size if start < 0 else start
    try:
        head, rest = split_at(axis, start) if start else (Axis(0), axis)
        piece = split_at(rest, length)[0] if start + length < size else rest
    except AxisError:
        return False
    call.unify(piece, source)
    call.counts("start", head)
    call.counts("end", concatenation([head, piece]))
    return True


@axis_rule(aten.select_scatter.default, zeros=MOVED)
def select_scatter(call: Call) -> Axes:
    """One position of one dimension is replaced; the other dimensions are unified."""
    x, source = list(call.axes("self")), iter(call.axes("src"))
    dim = call.given["dim"] % len(x)
    x[dim].lock("one of its positions is replaced")
    return tuple(axis if d == dim else call.unify(axis, next(source)) for d, axis in enumerate(x))


@axis_rule(aten.glu.default, zeros=MOVED)
def glu(call: Call) -> Axes:
    """The first half times the sigmoid of the second."""
    x = list(call.axes("self"))
    dim = call.given["dim"] % len(x)
    size = x[dim].find().size
    assert isinstance(size, int)
    head, tail = split_at(x[dim], size // 2)
    x[dim] = call.unify(head, tail)
    return tuple(x)
