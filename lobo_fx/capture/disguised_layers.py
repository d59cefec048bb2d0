"""Rewrites products with stored weights, in whatever form, to the operators of the table of layers.

Passes then have to know only one linear layer and one product with a matrix per group (`lobo_fx.graph.layers` lists
them). Products of two values that depend on inputs (attention) stay as they are. Parameters keep their names and
shapes: a weight that is stored as inputs × outputs is read through a permute.

Cases, where `W` and `b` are stored or computed from stored tensors alone:

1. `addmm(b, x, W)`, `mm(x, W)`, `x @ W` → `linear(x, Wᵀ, b)`; alpha and beta of `addmm` become separate products;
2. `mm(W, x)`, `mv(W, x)`, `W @ x` → `linear(xᵀ, W)ᵀ`; two transposes in a row cancel;
3. `einsum` of an input with a weight → a linear layer that sums over the letters that both have and the output lacks,
   or a product per group if the output also has a letter that both have;
4. `baddbmm(b, x, W)`, `x @ W` over three dimensions → `bmm(x, W)`, one matrix per group;
5. `linear(x, W) + b` → `linear(x, W, b)`;
6. `_convolution(x, W, …)` → `conv2d(x, W, …)` or another by its number of dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from lobo_fx.graph.layers import is_constant
from lobo_fx.graph.operators import arguments, aten, is_call
from lobo_fx.graph.program import ProgramModule
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.randomness import drop_dead
from lobo_fx.graph.rewriting import call, erase_dead

__all__ = ["reveal_layers"]

Rewrite = Callable[[fx.Graph, fx.Node], "fx.Node | None"]


def reveal_layers(module: ProgramModule) -> bool:
    """Rewrites disguised layers in place.

    Args:
        module: shapes propagated.

    Returns:
        Whether anything changed; shapes must then be propagated again.
    """
    graph, changed = module.graph, False
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" and not node._erased else None
        if rewrite is None:
            continue
        last = node.prev
        with graph.inserting_before(node):
            new = rewrite(graph, node)
        if new is None:
            continue
        while (last := last.next) is not node:
            inherit(last, node)
        node.replace_all_uses_with(new)
        erase_dead(graph, node)
        changed = True
    if changed:
        drop_dead(graph)
        module.recompile()
    return changed


def _rank(value: object) -> int:
    """Number of dimensions of a tensor; -1 for anything else."""
    return int(value.meta["val"].dim()) if isinstance(value, fx.Node) and hasattr(value.meta.get("val"), "dim") else -1


def _order(node: fx.Node) -> list[int] | None:
    """The order of a permute's input dimensions in its output; None for other operators."""
    rank, given = _rank(node), arguments(node)
    order = list(range(rank))
    if is_call(node, aten.permute.default):
        return [dim % rank for dim in given["dims"]]
    if is_call(node, aten.transpose.int):
        first, second = given["dim0"] % rank, given["dim1"] % rank
        order[first], order[second] = order[second], order[first]
        return order
    return order[::-1] if is_call(node, aten.t.default, aten.numpy_T.default) else None


def _permuted(graph: fx.Graph, value: fx.Node, order: Sequence[int]) -> fx.Node:
    """`value` with its dimensions in another order; consecutive permutes are merged, or cancel."""
    before = _order(value) if value.op == "call_function" else None
    if before is not None:
        source = value.args[0]
        assert isinstance(source, fx.Node)
        return _permuted(graph, source, [before[dim] for dim in order])
    return value if list(order) == sorted(order) else call(graph, aten.permute.default, value, list(order))


def _without_double_permute(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Removes a permute of a permute if they cancel."""
    source, order = node.args[0], _order(node)
    before = _order(source) if isinstance(source, fx.Node) and source.op == "call_function" else None
    if order is None or before is None or [before[dim] for dim in order] != sorted(order):
        return None
    return source.args[0]  # type: ignore[union-attr,return-value]


def _addmm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    if not _multiplies(given["mat1"], given["mat2"]):
        return None
    weight = _permuted(graph, given["mat2"], [1, 0])
    if (given["alpha"], given["beta"]) == (1, 1):
        return _with_bias(graph, given["mat1"], weight, given["self"])
    product = call(graph, aten.linear.default, given["mat1"], weight)
    terms = [
        call(graph, aten.mul.Tensor, product, given["alpha"]),
        call(graph, aten.mul.Tensor, given["self"], given["beta"]),
    ]
    return call(graph, aten.add.Tensor, *terms) if given["beta"] else terms[0]


def _mm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    return _product(graph, given["self"], given["mat2"] if "mat2" in given else given["other"])


def _mv(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    return (
        call(graph, aten.linear.default, given["vec"], given["self"])
        if _multiplies(given["vec"], given["self"])
        else None
    )


def _product(graph: fx.Graph, left: fx.Node, right: fx.Node) -> fx.Node | None:
    """`left @ right` where one of them is a weight."""
    if _rank(right) == 2 and _multiplies(left, right):
        return call(graph, aten.linear.default, left, _permuted(graph, right, [1, 0]))
    if _rank(left) == 2 and _multiplies(right, left):
        if _rank(right) == 1:
            return call(graph, aten.linear.default, right, left)
        swap = [*range(_rank(right) - 2), _rank(right) - 1, _rank(right) - 2]
        rows = call(graph, aten.linear.default, _permuted(graph, right, swap), left)
        return _permuted(graph, rows, swap)
    if _rank(left) == _rank(right) == 3 and _multiplies(left, right) and _same(left, 0, right, 0):
        return call(graph, aten.bmm.default, left, right)
    return None


def _baddbmm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    if (given["alpha"], given["beta"]) != (1, 1) or not _multiplies(given["batch1"], given["batch2"]):
        return None
    return call(graph, aten.add.Tensor, call(graph, aten.bmm.default, given["batch1"], given["batch2"]), given["self"])


def _multiplies(value: fx.Node, weight: fx.Node) -> bool:
    """Whether the product is of an input with a weight: one depends on inputs, the other only on stored tensors."""
    return is_constant(weight) and not is_constant(value)


def _same(left: fx.Node, of_left: int, right: fx.Node, of_right: int) -> bool:
    """Whether both tensors have the same constant size along a dimension of each; a size of 1 may be broadcast."""
    sizes = left.meta["val"].shape[of_left], right.meta["val"].shape[of_right]
    return all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1]


def _with_bias(graph: fx.Graph, x: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
    """A linear layer with `bias`, if that can be its bias; else a linear layer and an addition."""
    if _is_bias(bias, weight):
        return call(graph, aten.linear.default, x, weight, bias)
    return call(graph, aten.add.Tensor, call(graph, aten.linear.default, x, weight), bias)


def _is_bias(value: fx.Node, weight: fx.Node) -> bool:
    """Whether a linear layer can take `value` as its bias: a stored vector over its outputs, of the weight's dtype."""
    if _rank(value) != 1 or not is_constant(value):
        return False
    stored, of = value.meta["val"], weight.meta["val"]
    return bool(stored.shape[0] == of.shape[0] and stored.dtype == of.dtype)


def _bias(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Case 5: a vector is added to a linear layer without a bias whose result nothing else reads."""
    given = arguments(node)
    for layer, bias in ((given["self"], given["other"]), (given["other"], given["self"])):
        if given["alpha"] != 1 or not is_call(layer, aten.linear.default) or len(layer.users) > 1:
            continue
        product = arguments(layer)
        if product["bias"] is None and _rank(product["weight"]) == 2 and _is_bias(bias, product["weight"]):
            fused = call(graph, aten.linear.default, product["input"], product["weight"], bias)
            inherit(fused, layer)
            return fused
    return None


def _einsum(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Case 3: the letters tell which dimensions are summed, groups, or outputs."""
    given = arguments(node)
    terms, output = _letters(str(given["equation"]), [_rank(tensor) for tensor in given["tensors"]])
    if len(terms) != 2 or any(len(set(term)) < len(term) for term in (*terms, output)):
        return None
    pairs = list(zip(given["tensors"], terms, strict=True))
    for (x, in_x), (weight, in_weight) in (pairs, pairs[::-1]):
        if _multiplies(x, weight):
            return _contracted(graph, x, in_x, weight, in_weight, output)
    return None


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the output; an ellipsis becomes extra letters, aligned at its end."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [chr(code) for code in range(0x100, 0x120)]  # not used in equations
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    ellipses = ["".join(spare[len(spare) - width :]) if width else "" for width in widths]
    widest = max((e for e, term in zip(ellipses, terms, strict=True) if "..." in term), key=len, default="")
    if not arrow:
        named = left.replace(",", "").replace("...", "")
        output = "..." * ("..." in left) + "".join(sorted(c for c in set(named) if named.count(c) == 1))
    terms = [term.replace("...", ellipsis) for term, ellipsis in zip(terms, ellipses, strict=True)]
    return terms, output.replace("...", widest)


def _contracted(graph: fx.Graph, x: fx.Node, in_x: str, weight: fx.Node, in_weight: str, output: str) -> fx.Node | None:
    """The product of an input and a weight whose dimensions are named by letters."""
    summed = [c for c in in_weight if c in in_x and c not in output]
    groups = [c for c in in_weight if c in in_x and c in output]
    rows = [c for c in in_x if c not in in_weight]
    made = [c for c in in_weight if c not in in_x]
    if not summed or not made or not {*rows, *made} <= set(output):
        return None
    if not all(_same(x, in_x.index(c), weight, in_weight.index(c)) for c in (*summed, *groups)):
        return None
    if groups:
        if [len(part) for part in (groups, rows, summed, made)] != [1, 1, 1, 1]:
            return None
        left = _permuted(graph, x, [in_x.index(c) for c in (*groups, *rows, *summed)])
        right = _permuted(graph, weight, [in_weight.index(c) for c in (*groups, *summed, *made)])
        found, letters = call(graph, aten.bmm.default, left, right), [*groups, *rows, *made]
    else:
        left = _joined(graph, _permuted(graph, x, [in_x.index(c) for c in (*rows, *summed)]), len(rows), len(summed))
        right = _permuted(graph, weight, [in_weight.index(c) for c in (*made, *summed)])
        sizes = [right.meta["val"].shape[dim] for dim in range(len(made))]
        right = _joined(graph, _joined(graph, right, len(made), len(summed)), 0, len(made))
        found, letters = call(graph, aten.linear.default, left, right), [*rows, *made]
        if len(made) > 1:
            found = call(graph, aten.unflatten.int, found, len(rows), sizes)
    return _permuted(graph, found, [letters.index(c) for c in output])


def _joined(graph: fx.Graph, value: fx.Node, first: int, count: int) -> fx.Node:
    """`value` with `count` dimensions flattened into one, from `first` on."""
    return value if count == 1 else call(graph, aten.flatten.using_ints, value, first, first + count - 1)


def _convolution(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Case 6: the general form of traced submodules becomes the convolution for its number of dimensions."""
    given = arguments(node)
    rank = _rank(given["input"]) - 2
    if rank not in (1, 2, 3) or rank != _rank(given["weight"]) - 2:
        return None
    start = [given["input"], given["weight"], given["bias"], given["stride"], given["padding"]]
    if given["transposed"]:
        target = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[rank - 1]
        return call(graph, target, *start, given["output_padding"], given["groups"], given["dilation"])
    target = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[rank - 1]
    return call(graph, target, *start, given["dilation"], given["groups"])


_REWRITES: dict[object, Rewrite] = {
    aten._convolution.default: _convolution,
    aten._convolution.deprecated: _convolution,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.matmul.default: _mm,
    aten.mv.default: _mv,
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
    aten.add.Tensor: _bias,
    aten.permute.default: _without_double_permute,
    aten.transpose.int: _without_double_permute,
    aten.t.default: _without_double_permute,
    aten.numpy_T.default: _without_double_permute,
}
