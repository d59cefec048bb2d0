"""Mixed precision: as many layers as integers as a budget allows, the least sensitive first."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.measurements import Tensors
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import module_name
from lobo_fx.passes.quantization.integers.calibration import calibrate, prepare
from lobo_fx.passes.quantization.integers.placement import Choices, Placement
from lobo_fx.passes.quantization.integers.rounding import restore_floating
from lobo_fx.passes.quantization.integers.simulation import Simulation
from lobo_fx.passes.quantization.quantize_static import QuantizeStatic
from lobo_fx.recipe import build
from lobo_fx.report.records import SENSITIVITY, Sheet

__all__ = ["DECIBELS", "MixedPrecision", "ever_fewer"]

DECIBELS = 30.0
"""The budget if none is given."""

_PRICES = range(-20, 13)
"""Prices of noise, as powers of two: at 0, the noise of all layers costs as much time as the network in float."""


@dataclasses.dataclass(frozen=True)
class MixedPrecision(Pass):
    """Quantizes the largest set of layers that stays within a budget, and leaves the others float.

    Every layer (and sum, product or concatenation that can run as integers) is quantized alone, and the
    signal-to-noise ratio at the outputs measured: its sensitivity. With `kernels="all"`, layers are taken in that
    order, least sensitive first, as far as the budget goes. With `kernels="cheapest"`, every layer pays for its noise
    in microseconds, at the lowest price that keeps the budget, and the cheapest regions are cut anew; layers left
    float are stored as int8 unless that alone breaks the budget. The sensitivities are a table of the report.
    The signal-to-noise ratio is that of the result, on held-out calibration rows, in the worst output (or the worst
    part that is concatenated into one): the fewer rows there are, the further other data may fall short of it.

    Attributes:
        decibels: signal-to-noise ratio of the outputs that must stay; 30 where no budget is given.
        drop: loss of `evaluate`'s score that is allowed; give this or `decibels`.
        quantizer: how layers are quantized: a `QuantizeStatic`, or its settings by name.

    Source: Wu et al., "Integer Quantization for Deep Learning Inference", 2020, section 6.
    """

    decibels: float | None = None
    drop: float | None = None
    quantizer: QuantizeStatic = dataclasses.field(default_factory=lambda: QuantizeStatic(rounding="compensated"))

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def __post_init__(self) -> None:
        given: object = self.quantizer
        if isinstance(given, Mapping):
            object.__setattr__(self, "quantizer", build(QuantizeStatic, dict(given)))
        if self.decibels is not None and self.drop is not None:
            raise InvalidInput("give MixedPrecision one budget: decibels= or drop=")
        for name in ("decibels", "drop"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or not 0 <= value < math.inf):
                raise InvalidInput(f"{name} is {value!r}; it must be a number of at least 0")
        if not isinstance(self.quantizer, QuantizeStatic):
            raise InvalidInput(f"quantizer is a {type(self.quantizer).__name__}; expected a QuantizeStatic")
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data, and the score where that is the budget."""
        return ("calibration_data", *(("evaluate",) if self.drop is not None else ()))

    def check(self, program: Program) -> None:
        """Refuses what the quantizer refuses."""
        self.quantizer.check(program)

    def run(self, program: Program, context: Context) -> Program:
        program, choices = self.quantizer.simplify(program, context)
        score = None if self.drop is None else context.score(program)
        budget = DECIBELS if self.decibels is None else self.decibels
        least = budget if score is None else score - (self.drop or 0.0)
        whole, original = choices.place(), program.lazy_clone()
        whole.note(program.graph, context)
        prepared = prepare(program.lazy_clone(), whole, context)
        calibrate(prepared, context)
        simulation = Simulation(prepared, whole, context, original)
        sensitivities = self._sensitivities(program, whole, simulation, context)
        placements = ever_fewer(choices, whole, sensitivities)
        factors = self.quantizer.rounded(program, whole, context)

        def quantized(index: int, stored: bool, notes: Context) -> Program:
            copy = program.lazy_clone()
            if not stored:
                restore_floating(copy, original, placements[index], context)
            return self.quantizer.quantize(copy, placements[index], notes, factors, stored)

        @functools.cache
        def within(index: int, stored: bool) -> bool:
            made = quantized(index, stored, dataclasses.replace(context, notes=[], show_progress=False))
            found = simulation.of(made) if score is None else context.score(made)
            return found is not None and found >= least

        for stored in (True, False):  # int8 as storage alone may cost too much
            chosen = _first(functools.partial(within, stored=stored), len(placements))
            if within(chosen, stored=stored):
                break
        layers = sensitivities.keys() & placements[chosen].integer.keys()
        dropped = dict.fromkeys(whole.integer.keys() - layers, "the budget has no room for its noise")
        dataclasses.replace(whole, floating=dropped).note(program.graph, context)
        context.sheets.append(_sheet(prepared.graph, sensitivities, layers))
        context.note(f"mixed_precision quantized {len(layers)} of {len(sensitivities)} layers")
        if not stored:
            context.note("mixed_precision left the weights of the others float: as int8 they would cost too much")
        return quantized(chosen, stored, dataclasses.replace(context, show_progress=False))

    def _sensitivities(
        self, program: Program, whole: Placement, simulation: Simulation, context: Context
    ) -> dict[str, float]:
        """Decibels with each operator alone as integers, by its name."""

        def measure() -> Tensors:
            found = simulation.sensitivities(context.show_progress)
            return {name: torch.tensor(decibels, dtype=torch.double) for name, decibels in found.items()}

        found = context.measured("sensitivities", program, measure, [self.quantizer, sorted(whole.integer)])
        return {name: float(found[name]) for name in simulation.layers}


def ever_fewer(choices: Choices, whole: Placement, sensitivities: Mapping[str, float]) -> list[Placement]:
    """Placements of ever fewer operators as integers, from all that are placed to none.

    Args:
        choices: the operators that could run as integers.
        whole: the placement without a budget.
        sensitivities: decibels with each operator alone as integers, by the operator's name.
    """
    if choices.costs is None:
        ranked = sorted(sensitivities, key=lambda layer: -sensitivities[layer])
        return [choices.place(among=ranked[:count]) for count in range(len(ranked), -1, -1)]
    noise = {layer: 10 ** (-decibels / 10) for layer, decibels in sensitivities.items()}
    in_float = choices.place(among=whole.integer).in_float or 0.0
    unit = in_float / max(
        sum(noise.values()), sys.float_info.min
    )  # the network's time in float for the noise of all layers
    found: dict[frozenset[str], Placement] = {}
    for price in (unit * 2.0**power for power in _PRICES):
        placement = choices.place({layer: price * noise[layer] for layer in noise}, whole.integer)
        found.setdefault(frozenset(placement.integer), placement)
    found.setdefault(frozenset(), choices.place(among=()))
    return list(found.values())


def _first(within: Callable[[int], bool], count: int) -> int:
    """The first of ever smaller placements for which `within` holds, by bisection; it is assumed for the last."""
    return bisect.bisect_left(range(count), True, hi=count - 1, key=within)


def _sheet(graph: fx.Graph, sensitivities: Mapping[str, float], quantized: Collection[str]) -> Sheet:
    names = {node.name: module_name(node) or node.name for node in graph.nodes}
    ranked = sorted(sensitivities.items(), key=lambda entry: -entry[1])
    rows = tuple((names[layer], round(snr, 2), "int8" if layer in quantized else "float") for layer, snr in ranked)
    return Sheet(SENSITIVITY, ("layer", "SNR alone, dB", "precision"), rows)
