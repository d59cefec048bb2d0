"""Changes a program into forms that `torch.onnx` can translate."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.graph.layers import Layer, layer_of
from lobo_fx.graph.operators import arguments, aten, is_call, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.randomness import draws
from lobo_fx.graph.rewriting import replace_results

__all__ = [
    "with_drawn_dropout",
    "with_plain_attention",
    "with_plain_products",
    "with_plain_splits",
    "with_rounded_weights",
    "without_gradients",
]


def with_drawn_dropout(program: Program) -> Program:
    """The program with dropout that always drops as a product with random numbers: ONNX Runtime leaves dropout out.

    Before: `dropout(x, p, True)`; after: `x * (bernoulli(1 - p) / (1 - p))`.
    """
    if not any(_is_drawn_dropout(node) for node in program.graph.nodes):
        return program
    program = program.lazy_clone()
    graph = program.graph
    for node in filter(_is_drawn_dropout, list(graph.nodes)):
        x, kept = node.args[0], 1 - arguments(node)["p"]
        with graph.inserting_before(node):
            shares = graph.call_function(aten.full_like.default, (x, kept))
            drawn = graph.call_function(aten.bernoulli.default, (shares,))
            scaled = graph.call_function(aten.div.Tensor, (drawn, kept or 1.0))
            product = graph.call_function(aten.mul.Tensor, (x, scaled))
        product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    program.module.recompile()
    return program


def _is_drawn_dropout(node: fx.Node) -> bool:
    return is_call(node, aten.dropout.default) and draws(node)


def with_plain_products(program: Program) -> Program:
    """The program with linear layers whose weights are stored as inputs × outputs as products with these weights.

    Before: `linear(x, permute(W), b)`; after: `addmm(b, x, W)`, or `x @ W + b`: a file then holds W as it is.
    """
    if not any(_swapped(node) for node in program.graph.nodes):
        return program
    program = program.lazy_clone()
    graph = program.graph
    for layer in filter(None, map(_swapped, list(graph.nodes))):
        stored = layer.weight.args[0]
        with graph.inserting_before(layer.node):
            if layer.bias is not None and layer.input.meta["val"].dim() == 2:
                product = graph.call_function(aten.addmm.default, (layer.bias, layer.input, stored))
            else:
                product = graph.call_function(aten.matmul.default, (layer.input, stored))
                if layer.bias is not None:
                    product = graph.call_function(aten.add.Tensor, (product, layer.bias))
        product.meta.update(layer.node.meta)
        layer.node.replace_all_uses_with(product)
        graph.erase_node(layer.node)
    graph.eliminate_dead_code()
    program.module.recompile()
    return program


def _swapped(node: fx.Node) -> Layer | None:
    """A linear layer that reads its stored weight through a permute."""
    layer = layer_of(node)
    plain = layer is not None and not layer.kind.convolves and layer.kind.group_dim is None
    return (
        layer if layer is not None and plain and layer.swapped and is_call(layer.weight, aten.permute.default) else None
    )


def with_plain_splits(program: Program) -> Program:
    """The program with slices in place of splits into parts of a free size, which the translation can't count.

    Before: `split(x, n)[1]`; after: `x[n : 2 * n]`.
    """
    if not any(map(_is_split_freely, program.graph.nodes)):
        return program
    program = program.lazy_clone()
    graph = program.graph
    for node in filter(_is_split_freely, list(graph.nodes)):
        x, sizes, dim = (arguments(node)[name] for name in ("self", _sizes_of(node), "dim"))
        count = len(node.meta["val"])
        start: Any = 0
        parts: list[fx.Node] = []
        with graph.inserting_before(node):
            for size in sizes if isinstance(sizes, Sequence) else [sizes] * count:
                end = graph.call_function(operator.add, (start, size)) if len(parts) < count - 1 else sys.maxsize
                parts.append(graph.call_function(aten.slice.Tensor, (x, dim, start, end)))
                start = end
        replace_results(node, tuple(parts))
    program.module.recompile()
    return program


def _sizes_of(node: fx.Node) -> str:
    return "split_size" if is_call(node, aten.split.Tensor) else "split_sizes"


def _is_split_freely(node: fx.Node) -> bool:
    if not is_call(node, aten.split.Tensor, aten.split_with_sizes.default):
        return False
    sizes = arguments(node)[_sizes_of(node)]
    return any(isinstance(size, fx.Node) for size in (sizes if isinstance(sizes, Sequence) else [sizes]))


def with_plain_attention(program: Program) -> Program:
    """The program with attention over other than four dimensions taken over four, as `torch.onnx` wants it."""
    if not any(_is_deep_attention(node) or _is_flat_attention(node) for node in program.graph.nodes):
        return program
    program = program.lazy_clone()
    graph = program.graph
    for node in list(graph.nodes):
        given = arguments(node)
        if _is_deep_attention(node):
            least = 5
            change: tuple[Any, ...] = (aten.flatten.using_ints, 0, -4)
            back: tuple[Any, ...] = (aten.unflatten.int, 0, [-1, *node.meta["val"].shape[1:-3]])
        elif _is_flat_attention(node):
            least, change, back = 3, (aten.unsqueeze.default, 1), (aten.squeeze.dim, 1)
        else:
            continue
        with graph.inserting_before(node):
            for name in ("query", "key", "value", "attn_mask"):  # a mask of fewer dimensions is broadcast as before
                if given[name] is not None and given[name].meta["val"].dim() >= least:
                    set_argument(node, name, graph.call_function(change[0], (given[name], *change[1:])))
        with graph.inserting_after(node):
            whole = graph.call_function(back[0], (node, *back[1:]))
        node.replace_all_uses_with(whole, delete_user_cb=lambda user, whole=whole: user is not whole)
    program.module.recompile()
    return program


def _is_deep_attention(node: fx.Node) -> bool:
    """Attention over more than four dimensions, none of them broadcast or free but the first; its mask may be."""
    shapes = [source.meta["val"].shape[:-3] for source in _attended(node)]
    mask = arguments(node)["attn_mask"] if shapes else None
    around = () if mask is None else mask.meta["val"].shape[:-3]
    if any(not isinstance(size, int) or size != 1 for size in around):
        shapes.append(around)
    alike = all(shape == shapes[0] for shape in shapes)
    return bool(shapes) and len(shapes[0]) > 1 and alike and all(isinstance(size, int) for size in shapes[0][1:])


def _is_flat_attention(node: fx.Node) -> bool:
    """Attention over three dimensions."""
    sources = _attended(node)
    return bool(sources) and all(source.meta["val"].dim() == 3 for source in sources)


def _attended(node: fx.Node) -> list[fx.Node]:
    """Queries, keys and values of an attention; none if the node is another operator."""
    if not is_call(node, aten.scaled_dot_product_attention.default):
        return []
    given = arguments(node)
    return [given[name] for name in ("query", "key", "value")]


@contextlib.contextmanager
def without_gradients(program: Program) -> Iterator[None]:
    """Turns gradients off for a while: with them, attention under a computed mask has other strides.

    `torch.onnx` captures the program twice, once with gradients and once without, and a view that is right for one
    would not be right for the other.
    """
    trained = [parameter for parameter in program.module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def with_rounded_weights(program: Program, dtype: torch.dtype) -> tuple[Program, list[str]]:
    """The program with float weights of two or more dimensions rounded to a narrower type; vectors stay.

    A weight whose largest magnitude is subnormal in that type, or out of its range, stays too.

    Returns:
        A copy, and the names of the weights that are out of the type's range.
    """
    program, range_ = program.lazy_clone(), torch.finfo(dtype)
    left = []
    for name, weight in program.module.named_parameters():
        if weight.dtype != torch.float32 or weight.dim() < 2 or not weight.numel():
            continue
        largest = float(weight.detach().abs().max())
        if largest == 0 or range_.tiny <= largest <= range_.max:
            with torch.no_grad():
                weight.copy_(weight.to(dtype))
        else:
            left.append(name)
    return program, left
