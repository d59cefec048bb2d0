"""Gathers the second moments of stored weights' inputs over calibration data, by layer and role.

A layer has one weight; a recurrent layer has two in each direction, for its inputs and for its own states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.measurements import Tensors
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.layers import Layer, layer_of
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import RECURRENT, is_call, named_values
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.recurrent import Recurrent
from lobo_fx.graph.running import AS_IT_IS, Runner
from lobo_fx.passes.fitting.gram import Gram, RowsOrSums
from lobo_fx.passes.fitting.linear_problem import count_rows, draw, input_rows
from lobo_fx.terminal.quiet import quiet

__all__ = ["Role", "bytes_of", "collect_energies", "collect_grams", "in_parts", "roles_of"]

_BYTES = 1 << 27
"""Most bytes of one role's moments: the sums of 4096 columns; wider roles keep a random choice of rows instead."""
_TOGETHER = 1 << 29
"""Most bytes of all moments together. If they need more, calibration data is read once for each part."""
_FEW = _ENERGY_ROWS = 4096
"""Most rows of a batch that energies are taken from; for Gram matrices the limit grows with the columns."""
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Role:
    """A stored weight, and one call that multiplies with it.

    Attributes:
        call: the layer (one with swapped dimensions too) or recurrent layer.
        read: the `get_attr` of the weight.
    """

    call: fx.Node
    read: fx.Node


@dataclasses.dataclass(frozen=True)
class _Source:
    """The inputs that a weight is multiplied with.

    Attributes:
        call: the call at which they are observed.
        key: equal for roles with the same inputs.
        groups: how many matrices the weight is made of.
        columns: columns of each matrix.
        count: gives the number of rows, from the call's output.
        rows: gives rows (groups, rows, columns), from the call's arguments, its output and indices of rows.
    """

    call: fx.Node
    key: object
    groups: int
    columns: int
    count: Callable[[Any], int]
    rows: Callable[[Mapping[str, Any], Any, torch.Tensor], torch.Tensor]


def roles_of(read: fx.Node) -> list[Role]:
    """All calls that read a weight."""
    return [Role(user, read) for user in read.users]


def _source(role: Role) -> _Source | None:
    """The inputs of a role's weight; None if they can't be observed."""
    if is_call(role.call, *RECURRENT):
        return _of_recurrent(role)
    layer = layer_of(role.call)
    if layer is None or layer.read is not role.read or not layer.is_batched or layer.kind.transposed:
        return None
    return _of_layer(layer, role)


def _of_layer(layer: Layer, role: Role) -> _Source:
    grouped = layer.kind.group_dim is not None
    sizes = role.read.meta["val"].shape
    window = sizes[2:] if layer.kind.convolves else ()
    columns = sizes[1] if grouped else sizes[layer.input_dim] * sizes[2:].numel()

    def rows(given: Mapping[str, Any], value: Any, chosen: torch.Tensor) -> torch.Tensor:
        return input_rows(layer, given[layer.kind.input], window, chosen)

    # Linear layers that read the same value have the same rows; a convolution's rows are its own.
    key = (layer.node,) if layer.kind.convolves or grouped else ("rows of", layer.input)
    return _Source(layer.node, key, layer.groups, columns, lambda value: count_rows(layer, value), rows)


def _of_recurrent(role: Role) -> _Source | None:
    """The inputs of all steps, or the states that the steps start from."""
    given = Recurrent.of(role.call)
    places = [
        (direction, place)
        for direction, cell in enumerate(given.cells)
        for place, parameter in enumerate(cell[:2])
        if weight_node(parameter) is role.read
    ]
    if len(places) != 1 or given.num_layers != 1:
        return None
    ((direction, place),) = places
    columns = role.read.meta["val"].shape[1]
    steps_first = 0 if not given.batch_first else 1

    def count(value: Any) -> int:
        every: torch.Tensor = value[0]
        return every.shape[0] * every.shape[1]

    def inputs(values: Mapping[str, Any], value: Any, chosen: torch.Tensor) -> torch.Tensor:
        return _flat(values["input"])[chosen].unsqueeze(0)

    def states(values: Mapping[str, Any], value: Any, chosen: torch.Tensor) -> torch.Tensor:
        """The state that each step begins with: the first state, then all outputs but the last, of one direction."""
        every = value[0].movedim(steps_first, 0)[..., direction * columns :][..., :columns]
        first = values["hx"] if isinstance(values["hx"], torch.Tensor) else values["hx"][0]
        parts = [every[1:], first[direction][None]] if direction else [first[direction][None], every[:-1]]
        return _flat(torch.cat(parts))[chosen].unsqueeze(0)

    if place == 0:
        return _Source(role.call, ("rows of", given.input), 1, columns, count, inputs)
    return _Source(role.call, (role.call, direction), 1, columns, count, states)


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1])


def bytes_of(role: Role) -> int:
    """How much memory the moments of a role may take."""
    source = _source(role)
    return 0 if source is None else min(8 * source.groups * source.columns**2, _BYTES)


def in_parts(items: Iterable[Item], roles: Callable[[Item], Iterable[Role]]) -> list[list[Item]]:
    """Divides items, in order, into parts whose roles' moments fit into memory together.

    Calibration data is read once for each part.
    """
    parts: list[list[Item]] = []
    total = _TOGETHER
    for item in items:
        size = sum(map(bytes_of, roles(item)))
        if not parts or total + size > _TOGETHER:
            parts.append([])
            total = 0
        parts[-1].append(item)
        total += size
    return parts


def collect_grams(
    program: Program, roles: Iterable[Role], context: Context, centred: bool = False, times: int | None = None
) -> dict[Role, Gram]:
    """The Gram matrix of each weight's inputs; roles without rows, or whose inputs are all zero, are left out.

    All are held in memory at once, each within a bound: wide layers keep a random choice of rows instead of sums.

    Args:
        program: the program to run.
        roles: weights, and the calls that read them.
        context: its calibration data.
        centred: whether the mean of the rows is taken off them.
        times: limits the rows of each batch to this multiple of the columns, or to 4096 if that is more; None for no
            limit but `draw`'s own.

    Raises:
        InvalidInput: a value is NaN or infinite.
    """
    sources = _sources(roles)
    keys = list(dict.fromkeys(source.key for source in sources.values()))

    def measure() -> Tensors:
        found: dict[object, RowsOrSums] = {}
        generator = torch.Generator().manual_seed(0)

        def add(source: _Source, given: Mapping[str, Any], value: Any) -> None:
            wide = 8 * source.groups * source.columns**2 > _BYTES
            most = max(1, _BYTES // (8 * source.groups * source.columns)) if wide else None
            sums = found.setdefault(source.key, RowsOrSums(most))
            if wide:
                chosen, priority = sums.draw(source.count(value), generator)
                sums.add(source.rows(given, value, chosen), priority)
            else:
                most = None if times is None else max(_FEW, times * source.columns)
                sums.add(source.rows(given, value, draw(source.count(value), 1, generator, most)))

        _walk(program, sources, context.fitting_batches(), add)
        tensors: Tensors = {}
        for key in list(found):
            gram = found.pop(key).gram_of(centred)
            tensors[f"{keys.index(key)}.values"] = gram.values
            tensors[f"{keys.index(key)}.count"] = torch.tensor([gram.count, gram.is_sum])
        return tensors

    described = [[role.call.name, role.read.name] for role in sources], centred, times
    tensors = context.measured("moments", program, measure, described)
    alive: dict[object, Gram] = {}
    for place, key in enumerate(keys):
        values = tensors.get(f"{place}.values")
        if values is not None:
            count, is_sum = tensors[f"{place}.count"].tolist()
            gram = Gram(values, bool(is_sum), count, torch.zeros(len(values), dtype=torch.double))
            if not bool(values.isfinite().all()):
                call = next(role.call for role, source in sources.items() if source.key == key)
                raise InvalidInput(f"calibration data gives NaN or infinity at the input of {describe(call)}")
            if bool(gram.energy.any()):
                alive[key] = gram
    return {role: alive[source.key] for role, source in sources.items() if source.key in alive}


def collect_energies(program: Program, roles: Iterable[Role], batches: Iterable[Inputs]) -> dict[Role, torch.Tensor]:
    """Mean square of each column of each weight's inputs, (groups, columns)."""
    found: dict[object, tuple[torch.Tensor, int]] = {}
    generator = torch.Generator().manual_seed(0)

    def add(source: _Source, given: Mapping[str, Any], value: Any) -> None:
        chosen = draw(source.count(value), 1, generator, _ENERGY_ROWS)
        squares = source.rows(given, value, chosen).double().square().sum(1)
        total, count = found.get(source.key, (torch.zeros(()), 0))
        found[source.key] = total + squares, count + len(chosen)

    sources = _sources(roles)
    _walk(program, sources, batches, add)
    means = {key: total / count for key, (total, count) in found.items()}
    return {role: means[source.key] for role, source in sources.items() if source.key in means}


def _sources(roles: Iterable[Role]) -> dict[Role, _Source]:
    return {role: source for role in roles if (source := _source(role)) is not None}


def _walk(
    program: Program,
    sources: dict[Role, _Source],
    batches: Iterable[Inputs],
    add: Callable[[_Source, Mapping[str, Any], Any], None],
) -> None:
    """Runs batches through a program, one in memory at a time; passes inputs to `add`, shared ones only once."""
    first = {source.key: source for source in reversed(sources.values())}
    seen: dict[fx.Node, Collection[_Source]] = {}
    for source in first.values():
        seen[source.call] = (*seen.get(source.call, ()), source)

    def instead(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node not in seen:
            return AS_IT_IS
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        given = named_values(node, args, kwargs)
        for source in seen[node]:
            if source.count(value):
                add(source, given, value)
        return value

    if sources:
        runner = Runner(program.module, instead=instead)
        with quiet():
            for inputs in batches:
                runner(inputs)
