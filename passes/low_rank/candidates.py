"""Finds the layers that two layers of a lower rank can replace, and notes why others can't be replaced."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from lobo_fx.axes.kept import names_of_tensors
from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import Layer, layers
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.program import Program
from lobo_fx.passes.fitting.layer_grams import Role, collect_grams, in_parts
from lobo_fx.passes.fitting.linear_problem import matrix_of
from lobo_fx.passes.left_alone import note_left_alone
from lobo_fx.passes.low_rank.ranks import Shape
from lobo_fx.passes.low_rank.spectrum import Spectrum, spectrum

__all__ = ["Candidate", "find_candidates", "spectra"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The weight of a linear layer, or of a pointwise convolution (a window of size 1) with one group.

    Attributes:
        names: names that the weight is registered under; several if it is tied.
        weight: the parameter.
        layers: the layers that read the weight, in graph order.
    """

    names: tuple[str, ...]
    weight: nn.Parameter
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as (outputs, inputs)."""
        return matrix_of(self.layers[0], self.weight.detach())[0]

    @property
    def shape(self) -> Shape:
        first = self.layers[0]
        return Shape(self.weight.shape[first.output_dim], self.weight.shape[first.input_dim])


def find_candidates(program: Program, context: Context) -> list[Candidate]:
    """Returns candidates in graph order; notes why other parameters of two or more dimensions are left alone."""
    names = names_of_tensors(program.module)
    readers: dict[int, list[Layer]] = {}
    for layer in layers(program.graph):
        if layer.read is None:
            context.note("is left alone: its weight is computed", layer.node)
        else:
            readers.setdefault(id(program.parameter(layer.read)), []).append(layer)
    found, seen = [], list[torch.Tensor]()
    for key, group in readers.items():
        assert group[0].read is not None
        weight = program.parameter(group[0].read)
        seen.append(weight)
        reason = _why_not(program, weight, group)
        if reason is not None:
            context.note(f"is left alone: {reason}", parameter=names[key][0])
        elif isinstance(weight, nn.Parameter):
            found.append(Candidate(tuple(names[key]), weight, tuple(group)))
    note_left_alone(program, seen, context)
    return found


def _why_not(program: Program, weight: torch.Tensor, group: list[Layer]) -> str | None:
    """The reason why a weight can't be split into two factors; None if it can."""
    first = group[0]
    if not isinstance(weight, nn.Parameter):
        return "it is no parameter"
    if first.kind.transposed or first.kind.group_dim is not None:
        return f"it belongs to a {first.kind.word}"
    if first.groups > 1:
        return f"its convolution has {first.groups} groups"
    if math.prod(weight.shape[2:]) > 1:
        return "the window of its convolution has more than one place"
    alike = all((layer.kind, layer.swapped) == (first.kind, first.swapped) for layer in group)
    return None if alike and _read_by_none_but(program, weight, group) else "it is read otherwise too"


def _read_by_none_but(program: Program, weight: torch.Tensor, group: list[Layer]) -> bool:
    """Whether nothing but the layers reads a weight, as it is, through its mask or through swapped dimensions."""
    inside: set[fx.Node] = {layer.node for layer in group}
    for layer in group:
        value = layer.weight
        while value.op != "get_attr":
            inside.add(value)
            value = value.args[0]  # type: ignore[assignment]
    reads = [read for read in program.graph.find_nodes(op="get_attr") if program.parameter(read) is weight]
    users = {user for node in (*reads, *inside.difference(layer.node for layer in group)) for user in node.users}
    return users <= inside and not any(layer.input in inside or weight_node(layer.bias) in reads for layer in group)


def spectra(
    program: Program, candidates: Sequence[Candidate], context: Context
) -> Iterator[tuple[Candidate, Spectrum]]:
    """Yields each candidate's spectrum, one at a time; inputs weigh as in the calibration data, if there is any."""
    if context.calibration_data is None:
        yield from ((one, spectrum(one.matrix)) for one in candidates)
        return
    for part in in_parts(candidates, _roles):
        grams = collect_grams(program, [role for one in part for role in _roles(one)], context, centred=True)
        for one in part:
            known = [grams[role] for role in _roles(one) if role in grams]
            if not known:
                context.note("is weighed by plain singular values: no row of its inputs was seen", parameter=one.name)
            yield one, spectrum(one.matrix, functools.reduce(operator.add, known).shrunk() if known else None)


def _roles(candidate: Candidate) -> list[Role]:
    return [Role(layer.node, layer.read) for layer in candidate.layers if layer.read is not None]
