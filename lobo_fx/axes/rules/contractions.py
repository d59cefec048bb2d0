"""Matrix products of every kind: sums of products over an axis that operands share."""

from __future__ import annotations

from collections.abc import Callable

from lobo_fx.axes.axis import Axis, AxisError
from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.axes.kinds import is_stored
from lobo_fx.axes.zeros import MOVED, all_of, through
from lobo_fx.graph.operators import aten

__all__ = ["addmm", "baddbmm", "bmm", "contraction", "einsum", "matmul"]


def contraction(signature: str, *names: str) -> Callable[[Call], Axes]:
    """A rule from a signature such as "m k, k n -> m n": equal letters are one axis, `...` is broadcast."""
    left, right = signature.split("->")
    inputs = [term.split() for term in left.split(",")]
    output = right.split()

    def rule(call: Call) -> Axes:
        letters: dict[str, Axis] = {}
        rest: list[Axes] = []
        for name, letter_names in zip(names, inputs, strict=True):
            if not call.has(name):
                continue
            axes = call.axes(name)
            count = len(letter_names) - ("..." in letter_names)
            if "..." in letter_names:
                rest.append(axes[: len(axes) - count])
            for letter, axis in zip(letter_names[len(letter_names) - count :], axes[len(axes) - count :], strict=True):
                letters[letter] = call.unify(letters[letter], axis) if letter in letters else axis
        batch = call.broadcast(rest) if rest else ()
        operands = [call.given[name] for name, term in zip(names, inputs, strict=True) if len(term) > 1]
        for letter, axis in letters.items():
            if letter not in output:
                call.sums(axis, *operands)
        if set(letters) - set(output):
            call.multiplies(*batch, *letters.values())
        return (*batch, *(letters[letter] for letter in output if letter != "..."))

    rule.__doc__ = signature
    return rule


axis_rule(aten.linear.default, zeros=all_of(through("input", "weight"), "bias"))(
    contraction("... k, n k, n -> ... n", "input", "weight", "bias")
)
axis_rule(aten.mm.default, zeros=MOVED)(contraction("m k, k n -> m n", "self", "mat2"))


@axis_rule(aten.bmm.default, zeros=MOVED)
def bmm(call: Call) -> Axes:
    """B m k, b k n -> b m n; in a product of two computed values, as in attention, b is heads."""
    if not is_stored(call.given["self"]) and not is_stored(call.given["mat2"]):
        call.axes("self")[0].mark("heads")
        call.axes("self")[2].mark("head_dim")
    return contraction("b m k, b k n -> b m n", "self", "mat2")(call)


axis_rule(aten.dot.default, zeros=MOVED)(contraction("k, k ->", "self", "tensor"))
axis_rule(aten.mv.default, zeros=MOVED)(contraction("m k, k -> m", "self", "vec"))
axis_rule(aten.outer.default, zeros=MOVED)(contraction("m, n -> m n", "self", "vec2"))


@axis_rule(aten.addmm.default, zeros=all_of(through("mat1", "mat2"), "self"))
def addmm(call: Call) -> Axes:
    """Self + mat1 · mat2, self broadcast."""
    result = contraction("m k, k n -> m n", "mat1", "mat2")(call)
    return call.broadcast([result, call.axes("self")])


@axis_rule(aten.baddbmm.default, zeros=all_of(through("batch1", "batch2"), "self"))
def baddbmm(call: Call) -> Axes:
    """Self + batch1 · batch2, self broadcast."""
    result = contraction("b m k, b k n -> b m n", "batch1", "batch2")(call)
    return call.broadcast([result, call.axes("self")])


@axis_rule(aten.matmul.default, zeros=MOVED)
def matmul(call: Call) -> Axes:
    """The last dimension of `self` is summed with the last but one of `other`; the rest is broadcast."""
    a, b = call.axes("self"), call.axes("other")
    summed = call.unify(a[-1], b[-2] if len(b) > 1 else b[0])
    call.sums(summed, call.given["self"], call.given["other"])
    if not is_stored(call.given["self"]) and not is_stored(call.given["other"]):
        a[-1].mark("head_dim")
        for axis in a[:-2]:
            axis.mark("heads")
    batch = call.broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    output = (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))
    call.multiplies(*output, summed)
    return output


@axis_rule(aten.einsum.default, zeros=MOVED)
def einsum(call: Call) -> Axes:
    """Equal letters are one axis; letters that the output lacks are summed; `...` is broadcast."""
    equation = call.given["equation"].replace(" ", "").replace("...", ".")
    left, arrow, right = equation.partition("->")
    letters: dict[str, Axis] = {}
    rest: list[Axes] = []
    for term, tensor in zip(left.split(","), call.given["tensors"], strict=True):
        axes = call.of(tensor)
        before, dots, after = term.partition(".")
        if dots:
            rest.append(axes[len(before) : len(axes) - len(after)])
        named = axes[: len(before)] + axes[len(axes) - len(after) :] if dots else axes
        for letter, axis in zip(before + after, named, strict=True):
            letters[letter] = call.unify(letters[letter], axis) if letter in letters else axis
    if not arrow:
        joined = left.replace(",", "").replace(".", "")
        right = "." * bool(rest) + "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    computed = [
        term for term, tensor in zip(left.split(","), call.given["tensors"], strict=True) if not is_stored(tensor)
    ]
    for letter, axis in letters.items():
        shared = len(computed) == 2 and all(letter in term for term in computed)
        if letter not in right:
            call.sums(axis, *call.given["tensors"])
        if shared and len(computed) == len(call.given["tensors"]):  # attention: queries with keys, or with values
            axis.mark("heads" if letter in right else "head_dim")
    batch = call.broadcast(rest) if rest else ()
    if batch and "." not in right:
        raise AxisError("einsum sums over its ellipsis")
    if set(letters) - set(right):
        call.multiplies(*batch, *letters.values())
    return tuple(axis for letter in right for axis in (batch if letter == "." else (letters[letter],)))
