"""Compares a program's outputs with the original's: as a whole, and in the worst part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.operators import VALUE_PRESERVING, arguments, aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import module_name
from lobo_fx.graph.running import Runner
from lobo_fx.measures.fidelity import signal_to_noise, tensor_leaves

__all__ = ["Judge", "Verdict"]

_MOVES = VALUE_PRESERVING - {aten.max_pool2d.default, aten.dropout.default}
"""Operators that move labels as they move values: they take integers, and choose nothing by value or by chance."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Signal-to-noise ratios in decibels.

    Attributes:
        whole: over all outputs.
        worst: over the worst part.
        part: name of that part: an output, and the module whose values are concatenated into it; empty if there is only
            one part.
    """

    whole: float
    worst: float
    part: str = ""


class Judge:
    """Compares programs with the original on the same rows.

    Every output is a part; of a concatenated output (boxes and scores), so is every piece. Over all outputs together,
    large values would hide errors of small ones.

    Args:
        original: the program to compare with; not changed afterwards.
        batches: the inputs to run on.
    """

    def __init__(self, original: Program, batches: Sequence[Inputs]) -> None:
        self.batches = batches
        self.reference: list[Any] = []
        self.parts: list[list[Mapping[str, torch.Tensor]]] = []  # by batch and output: a mask of elements by part
        for inputs in batches:
            values: dict[fx.Node, Any] = {}
            self.reference.append(tensor_leaves(Runner(original.module, values.__setitem__)(inputs)))
            self.parts.append([_parts(node, spec.name, values) for node, spec in _outputs(original)])

    def __call__(self, program: Program) -> Verdict:
        """Runs a program and compares its outputs."""
        return self.verdict(Runner(program.module))

    def verdict(self, runner: Runner) -> Verdict:
        """Compares the outputs of a runner."""
        found = [tensor_leaves(runner(inputs)) for inputs in self.batches]
        whole = signal_to_noise(self.reference, found)
        parts = self.split(found)
        if len(parts) < 2:
            return Verdict(whole, whole)
        reference = self.split(self.reference)
        by_part = {name: signal_to_noise(reference[name], part) for name, part in parts.items()}
        worst = min(by_part, key=lambda name: by_part[name])
        return Verdict(whole, by_part[worst], worst)

    def split(self, outputs: Sequence[Sequence[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        """Splits the flat outputs of every batch into the elements of each part, by its name."""
        found: dict[str, list[torch.Tensor]] = {}
        for batch, known in zip(outputs, self.parts, strict=True):
            for tensor, parts in zip(batch, known, strict=True):
                for name, places in parts.items():
                    found.setdefault(name, []).append(tensor[places])
        return found


def _outputs(program: Program) -> list[tuple[fx.Node, Any]]:
    """The nodes of the outputs that are tensors, each with its specification."""
    (nodes,) = program.graph.output_node().args
    specifications = program.signature.outputs
    return [(node, spec) for node, spec in zip(nodes, specifications, strict=True) if spec is not None]  # type: ignore[arg-type]


def _parts(node: fx.Node, name: str, values: Mapping[fx.Node, Any]) -> dict[str, torch.Tensor]:
    """Boolean masks over an output that mark the elements of each part, by its name."""
    sources: list[fx.Node] = []

    def labels(of: fx.Node) -> torch.Tensor:
        """The index of the source that each element of a value comes from."""
        if is_call(of, aten.cat.default):
            given = arguments(of)
            return torch.cat([labels(source) for source in given["tensors"]], given["dim"])
        if is_call(of, *_MOVES) and len(of.all_input_nodes) == 1:
            moved = {source: labels(source) for source in of.all_input_nodes}
            args, kwargs = fx.node.map_arg((of.args, of.kwargs), lambda source: moved[source])
            return torch.as_tensor(of.target(*args, **kwargs))  # type: ignore[operator]
        sources.append(of)
        return torch.full_like(values[of], len(sources) - 1, dtype=torch.long)

    found = labels(node)
    if len(sources) == 1:
        return {name: torch.ones_like(found, dtype=torch.bool)}
    modules = [module_name(source) for source in sources]
    named = [  # by module where that is unique, else by node
        module if module and modules.count(module) == 1 else source.name
        for source, module in zip(sources, modules, strict=True)
    ]
    return {f"{name}, {named[index]}": found == index for index in range(len(sources))}
