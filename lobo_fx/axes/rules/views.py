"""Views: the same elements under other dimensions."""

from __future__ import annotations

import torch
from torch import fx

from lobo_fx.axes.axis import Axis, AxisError, Size, product, total
from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.graph.operators import aten

__all__ = ["movedim", "permute", "reverse", "transpose", "view"]


@axis_rule(
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default, aten.squeeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
    zeros="self",
)
def view(call: Call) -> Axes:
    """Matches the shortest runs of input and output dimensions of equal size; both are the same product of axes."""
    source: fx.Node = call.given["self"]
    inputs = [axis for axis in call.axes("self") if axis.find().size != 1]
    sizes = call.sizes()
    hints = [_hint(size) for size in call.node.meta["val"].shape]
    hint_of = dict(zip(map(id, call.axes("self")), map(_hint, source.meta["val"].shape), strict=True))
    outputs: list[Axis] = [call.fresh(size) for size in sizes]
    left, right = list(inputs), [i for i, size in enumerate(sizes) if size != 1]
    while left or right:
        run_in, run_out = [left.pop(0)] if left else [], [right.pop(0)] if right else []
        if not run_in or not run_out:
            raise AxisError(f"a view of {[str(a) for a in inputs]} as {sizes} is not understood")
        while True:
            size_in, size_out = total(a.find().size for a in run_in), total(sizes[i] for i in run_out)
            if _equal(size_in, size_out):
                break
            hint_in = total(hint_of[id(a)] for a in run_in)
            hint_out = total(hints[i] for i in run_out)
            if (hint_in <= hint_out and left) or not right:
                if not left:
                    raise AxisError(f"a view of {[str(a) for a in inputs]} as {sizes} is not understood")
                run_in.append(left.pop(0))
            else:
                run_out.append(right.pop(0))
        if len(run_in) == len(run_out) == 1:
            outputs[run_out[0]] = run_in[0]
        else:
            call.unify(product(run_in), product([outputs[i] for i in run_out]))
    if call.node.target is aten.unflatten.int:
        dim = call.given["dim"] % len(call.axes("self"))
        call.counts("sizes", outputs[dim : dim + len(call.given["sizes"])])
    elif "size" in call.given or "shape" in call.given:
        call.counts("size" if "size" in call.given else "shape", outputs)
    if call.node.target in (aten.view_as.default, aten.reshape_as.default):
        return tuple(call.unify(axis, own) for axis, own in zip(outputs, call.axes("other"), strict=True))
    return tuple(outputs)


def _hint(size: int | torch.SymInt) -> int:
    """The size in the traced example, read in a way that does not make it a constant."""
    return size if isinstance(size, int) else int(size.node.hint)


def _equal(a: Size, b: Size) -> bool:
    return bool(a == b) or (not isinstance(a - b, int) and (a - b).expand() == 0)


@axis_rule(aten.permute.default, zeros="self")
def permute(call: Call) -> Axes:
    """Dimensions change places."""
    x = call.axes("self")
    return tuple(x[dim] for dim in call.given["dims"])


@axis_rule(aten.transpose.int, aten.swapaxes.default, zeros="self")
def transpose(call: Call) -> Axes:
    """Two dimensions change places."""
    x = list(call.axes("self"))
    a, b = list(call.given.values())[1:3]
    x[a], x[b] = x[b], x[a]
    return tuple(x)


@axis_rule(aten.t.default, aten.numpy_T.default, aten.mT.default, zeros="self")
def reverse(call: Call) -> Axes:
    """The (last) two dimensions change places."""
    x = call.axes("self")
    return x[::-1] if call.node.target is not aten.mT.default else (*x[:-2], x[-1], x[-2])


@axis_rule(aten.movedim.int, aten.movedim.intlist, zeros="self")
def movedim(call: Call) -> Axes:
    """Dimensions move; the others keep their order."""
    x = call.axes("self")
    source, target = call.given["source"], call.given["destination"]
    source, target = ([source], [target]) if isinstance(source, int) else (source, target)
    moved = {t % len(x): s % len(x) for s, t in zip(source, target, strict=True)}
    rest = iter(number for number in range(len(x)) if number not in moved.values())
    return tuple(x[moved[d]] if d in moved else x[next(rest)] for d in range(len(x)))
