"""Figures of each module of a program: width, parameters, bytes, and number formats."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.kept import names_of_tensors
from lobo_fx.graph.layers import LOOKUPS, is_constant, layer_of
from lobo_fx.graph.masks import masks
from lobo_fx.graph.operators import RECURRENT, works_on_codes
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import module_name
from lobo_fx.graph.tensors import fetch, memory_of
from lobo_fx.measures.counts import named_weights
from lobo_fx.measures.module_figures import MIXED, ModuleFigures, is_inside
from lobo_fx.own_operators.decode import DECODE
from lobo_fx.own_operators.lstm import DYNAMIC_LSTM
from lobo_fx.own_operators.products import DYNAMIC_PRODUCT, PRODUCT

__all__ = ["measure_modules"]

_RECURRENT = (*RECURRENT, DYNAMIC_LSTM)
_CODED: dict[object, int] = {DECODE: 3, PRODUCT: 5}
"""By operator, the index of the argument that holds the number format of its codes."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that reads a weight."""

    weight: str
    home: str
    kind: str
    width: int | None
    stored: str
    computed: str


def measure_modules(program: Program, original: Program | None = None) -> dict[str, ModuleFigures]:
    """Figures by dotted name, in the order of calls: of the model itself (an empty name) and of modules with layers.

    Of a module that calls several layers itself, each layer is listed separately, named by its weight. A weight that
    several modules share counts for the first.

    Args:
        program: the program to measure.
        original: the program that it was made from; its modules are listed separately here too.
    """
    tied = _tied(original or program)
    known = set() if original is None else set(measure_modules(original))
    calls = [call for node in program.graph.nodes if (call := _call(program, node, tied)) is not None]
    weights = Counter(home for home, _ in {(call.home, call.weight) for call in calls})
    parts: dict[str, list[_Call]] = {}
    for call in calls:
        is_part = call.weight in known or (weights[call.home] > 1 and not (call.home and call.home in known))
        parts.setdefault(call.weight if is_part else call.home, []).append(call)
    names = dict.fromkeys(name for part in parts for name in _around(part))
    held = _held(program, names, tied)
    found = {}
    for name in {"": None, **names}:
        inside = [call for part, made in parts.items() if is_inside(part, name) for call in made]
        own = parts.get(name, [])
        widths = {call.width for call in own}
        counts = [counts for at, counts in held.items() if is_inside(at, name)]
        parameters, nonzero, size = (sum(column) for column in zip((0, 0, 0), *counts, strict=True))
        found[name] = ModuleFigures(
            own[0].kind if own else "",
            widths.pop() if len(widths) == 1 else None,
            parameters,
            nonzero,
            size,
            _common(call.stored for call in inside),
            _common(call.computed for call in inside),
        )
    return found


def _around(part: str) -> Iterator[str]:
    """A module and the modules around it, the outermost first."""
    pieces = part.split(".")
    return (".".join(pieces[:count]) for count in range(1, len(pieces) + 1)) if part else iter(())


def _owner(name: str, modules: Iterable[str]) -> str:
    """The innermost module that holds a tensor; else the model itself."""
    return max((module for module in modules if is_inside(name, module)), key=len, default="")


def _tied(program: Program) -> dict[str, list[str]]:
    """All names of each stored tensor, by each of its names."""
    groups = names_of_tensors(program.module).values()
    return {name: names for names in groups for name in names}


def _names(name: str, tied: Mapping[str, list[str]]) -> list[str]:
    """All names of a stored tensor; of codes, scales and zero points (`fc.weight_scale`), those of the weight."""
    whole = max((whole for whole in tied if name == whole or name.startswith(f"{whole}_")), key=len, default=name)
    return tied.get(whole, [name])


def _home(weight: str) -> str:
    return weight.rpartition(".")[0]


def _common(values: Iterable[str]) -> str:
    known = {value for value in values if value}
    return known.pop() if len(known) == 1 else MIXED if known else ""


def _held(program: Program, names: Mapping[str, Any], tied: Mapping[str, list[str]]) -> dict[str, tuple[int, int, int]]:
    """By innermost module: number of parameters, of nonzero ones, and bytes of all tensors; each tensor once."""
    found: dict[str, list[int]] = {name: [0, 0, 0] for name in {"": None, **names}}
    for name, weight in named_weights(program.module):
        counts = found[_owner(_names(name, tied)[0], names)]
        counts[0] += weight.numel()
        counts[1] += int(torch.count_nonzero(weight))
    seen = {memory_of(mask) for mask in masks(program).values()}
    for name, tensor in [*program.module.named_parameters(), *program.module.named_buffers()]:
        if memory_of(tensor) not in seen:
            seen.add(memory_of(tensor))
            found[_owner(_names(name, tied)[0], names)][2] += tensor.numel() * tensor.element_size()
    return {name: (counts[0], counts[1], counts[2]) for name, counts in found.items()}


def _call(program: Program, node: fx.Node, tied: Mapping[str, list[str]]) -> _Call | None:
    """A call of a layer, a recurrent layer or a lookup; None for other nodes."""
    if node.op != "call_function":
        return None
    layer = layer_of(node)
    kind = layer.kind.word if layer is not None else ""
    if node.target in LOOKUPS:
        kind = "lookup"
    if node.target in _RECURRENT:
        kind = "recurrent layer"
    if node.target in (PRODUCT, DYNAMIC_PRODUCT):
        kind = "linear layer"
    reads = list(_stored(program, [layer.weight] if layer is not None else node.all_input_nodes)) if kind else []
    if not reads:
        return None
    weight, tensor = reads[0]
    coded = [source for source in (node, *_sources(node)) if source.target in _CODED]
    stored = str(coded[0].args[_CODED[coded[0].target]]) if coded else str(tensor.dtype).removeprefix("torch.")
    names = _names(weight, tied)
    module = module_name(node)  # one of the modules that share the weight
    home = module if any(_home(name) == module for name in names) else _home(names[0])
    return _Call(names[0], home, kind, _width(node, layer), stored, _computed(node, layer))


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that a call reads and that depend only on stored tensors, the nearest first."""
    ahead = [source for source in node.all_input_nodes if is_constant(source)]
    while ahead:
        source = ahead.pop(0)
        yield source
        ahead += source.all_input_nodes


def _stored(program: Program, values: Iterable[fx.Node]) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored matrices and kernels that values are computed from, if they depend on no input."""
    for value in values:
        for source in (value, *_sources(value)) if is_constant(value) else ():
            tensor = fetch(program.module, str(source.target)) if source.op == "get_attr" else None
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.dtype != torch.bool:
                yield str(source.target), tensor


def _width(node: fx.Node, layer: Any) -> int | None:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) else value
    dim = -1 - layer.kind.spatial_dims if layer is not None else -1
    size = value.shape[dim] if isinstance(value, torch.Tensor) else None
    return size if isinstance(size, int) else None


def _computed(node: fx.Node, layer: Any) -> str:
    integer = node.target in (DYNAMIC_PRODUCT, DYNAMIC_LSTM) or (node.target is PRODUCT and node.args[-1] == "int8")
    if layer is not None:
        integer = all(works_on_codes(value) and value.target is not DECODE for value in (layer.input, layer.weight))
    return "int8" if integer else "float32"
