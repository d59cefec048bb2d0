"""Surgery: removes positions from leaves, and updates every tensor and every size constant."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from lobo_fx.axes.axis import Axis
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.kept import names_of_tensors, record
from lobo_fx.axes.removal import Removal, kept, kept_size
from lobo_fx.graph.operators import SPLITS, arguments, aten, set_argument
from lobo_fx.graph.provenance import inherit

__all__ = ["remove", "zero", "zeroed"]


def zero(inference: Inference, removal: Removal) -> None:
    """Zeroes what surgery would remove: the reference that removal is compared with."""
    for tensor, axes in _touched(inference, removal):
        for dim, axis in enumerate(axes):
            gone = (~kept(axis, removal)).nonzero().flatten()
            if len(gone):
                tensor.data.index_fill_(dim, gone, 0)


@contextlib.contextmanager
def zeroed(inference: Inference, removal: Removal) -> Iterator[None]:
    """Zeroes what surgery would remove within this context; afterwards, the program is as it was."""
    before = [(tensor, tensor.data) for tensor, _ in _touched(inference, removal)]
    try:
        for tensor, data in before:
            tensor.data = data.clone()
        zero(inference, removal)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def remove(inference: Inference, removal: Removal) -> None:
    """Removes positions from the program that was inferred, in place.

    Args:
        inference: axes of the program.
        removal: for each leaf, True where a position stays; leaves not named stay whole.
    """
    module = inference.program.module
    names = names_of_tensors(module)
    for tensor, axes in _touched(inference, removal):
        data = tensor.data
        for dim, axis in enumerate(axes):
            mask = kept(axis, removal)
            if not bool(mask.all()):
                data = data.index_select(dim, mask.nonzero().flatten())
                record(module, names.get(id(tensor), ()), dim, mask)
        tensor.data = data.contiguous()
    for node, values in inference.findings.frozen.items():
        for name, value in values.items():
            set_argument(node, name, value)
    for node, sizes in inference.findings.sizes.items():
        for name, counted in sizes.items():
            _resize(node, name, counted, removal)
    module.recompile()
    for node in {*inference.findings.frozen, *inference.findings.sizes}:
        if node.graph.owning_module not in (None, module):  # the graph of a branch
            node.graph.owning_module.recompile()


def _touched(inference: Inference, removal: Removal) -> list[tuple[torch.Tensor, tuple[Axis, ...]]]:
    """Stored tensors that lose positions, with their axes; tied tensors once."""
    found: dict[int, tuple[torch.Tensor, tuple[Axis, ...]]] = {}
    for node in inference.program.graph.find_nodes(op="get_attr"):
        tensor = inference.program.parameter(node)
        axes = inference.stored.get(id(tensor))
        if axes and any(leaf in removal for axis in axes for leaf in axis.leaves()):
            found[id(tensor)] = (tensor, axes)
    return list(found.values())


def _resize(node: fx.Node, name: str, axes: Axis | Sequence[Axis], removal: Removal) -> None:
    """Writes the new size of an axis, or a list of sizes, into an argument, where it changed."""
    given = arguments(node)
    everything = [axes] if isinstance(axes, Axis) else list(axes)
    if not any(leaf in removal for axis in everything for leaf in axis.leaves()):
        return
    if name == "split_sizes":
        _resplit(node, [kept_size(axis, removal) for axis in everything])
    elif isinstance(axes, Axis):
        set_argument(node, name, kept_size(axes, removal))
    else:
        values = [
            _resized(node, value, axis, removal) if any(leaf in removal for leaf in axis.leaves()) else value
            for value, axis in zip(given[name], everything, strict=True)
        ]
        set_argument(node, name, values)


def _resized(node: fx.Node, value: Any, axis: Axis, removal: Removal) -> Any:
    """The new value of a size in a list: -1 stays, a number is replaced, a computed size is scaled or lessened."""
    if isinstance(value, int):
        return value if value == -1 else kept_size(axis, removal)
    before, after = sympy.sympify(axis.find().size), sympy.sympify(kept_size(axis, removal))
    ratio, gone = sympy.cancel(after / before), sympy.expand(before - after)
    with node.graph.inserting_before(node):
        if ratio.is_Rational:
            scaled = node.graph.call_function(operator.mul, (value, int(ratio.p)))
            result = node.graph.call_function(operator.floordiv, (scaled, int(ratio.q)))
        else:  # a concatenation with a free size
            scaled = result = node.graph.call_function(operator.sub, (value, int(gone)))
    for new in (scaled, result):
        inherit(new, node)
    return result


def _resplit(node: fx.Node, sizes: list[int]) -> None:
    """Gives a split the new sizes of its pieces, which need no longer be equal."""
    assert node.target in SPLITS
    given = arguments(node)
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (given["self"], sizes, given["dim"]), {}
