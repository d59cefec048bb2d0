"""Refits a pruned network without training, by the method that proves best on held-out rows, which no fit saw.

Least squares on few rows, or statistics of data that the network was not trained on, can do harm. So every method up to
the one asked for is tried, and the network that is nearest to the original on held-out rows is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lobo_fx.contracts.context import Context
from lobo_fx.graph.operators import arguments, aten
from lobo_fx.graph.program import Program
from lobo_fx.measures.fidelity import Ratio
from lobo_fx.passes.fitting.side_by_side import Pairs
from lobo_fx.passes.pruning.layer_fitting import METHODS, Fit, Fitted
from lobo_fx.report.records import Sheet

__all__ = ["METHODS", "Attempt", "Compensated", "Split", "attempts", "chosen", "compensate"]

_WORTH = 0.5
"""Decibels that a method must gain over a simpler one: few rows can't tell smaller differences."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A pruned network, fitted by one method.

    Attributes:
        method: one of `METHODS`.
        program: the network.
        decibels: signal-to-noise ratio of its outputs against the original's, on held-out rows.
        layers: what was done to each layer.
    """

    method: str
    program: Program
    decibels: float
    layers: Sequence[Fitted]


@dataclasses.dataclass(frozen=True)
class Compensated:
    """A pruned network, fitted as far as that helps.

    Attributes:
        program: the network.
        remark: how it was fitted and what that gained.
        sheet: what was done to each layer; None if nothing was fitted.
    """

    program: Program
    remark: str
    sheet: Sheet | None = None


def compensate(
    program: Program, original: Program, context: Context, method: str, fit: Callable[..., Fit] = Fit
) -> Compensated:
    """Fits a pruned network to the original's activations, and takes the fit back if it harms.

    Args:
        program: the pruned network; its graph has the original's nodes under the same names.
        original: the network before removal.
        context: gives calibration data, and takes notes about layers that can't be fitted.
        method: the last of `METHODS` to try.
        fit: the class that fits the layers, or a function that is called as `Fit` is.
    """
    split = Split.of(context)
    if not split.held_out_rows:
        return Compensated(program, "nothing was fitted: no row of calibration data can be held out")
    tried: dict[str, float] = {}
    best = Attempt(METHODS[0], program, 0.0, ())
    for attempt in attempts(program, original, split, method, fit):
        tried[attempt.method] = attempt.decibels
        if chosen(tried) == attempt.method:
            best = attempt
    words = "refitting was taken back" if best.method == "none" else f"refitted by {best.method}"
    decibels = ", ".join(f"{name} {value:.1f}" for name, value in tried.items())
    remark = f"{words}: dB on {split.held_out_rows} of {split.rows} rows, which no fit saw: {decibels}"
    return Compensated(best.program, remark, _sheet(best.layers) if best.layers else None)


def chosen(decibels: Mapping[str, float]) -> str:
    """The method to take, given the decibels of each on held-out rows, simplest first; see `_WORTH`."""
    best = METHODS[0]
    for method, value in decibels.items():
        if value > decibels[best] + _WORTH or (math.isnan(decibels[best]) and not math.isnan(value)):
            best = method
    return best


@dataclasses.dataclass(frozen=True)
class Split:
    """Calibration data, divided into rows to fit and rows held out; each use reads it anew, batch after batch.

    Attributes:
        context: gives the calibration data.
        rows: how many there are in all.
        held_out_rows: how many of them are held out.
    """

    context: Context
    rows: int
    held_out_rows: int

    @classmethod
    def of(cls, context: Context) -> Split:
        """Reads all calibration data once."""
        counts = {False: 0, True: 0}
        for inputs, held_out in context.split_batches():
            counts[held_out] += context.signature.count_rows(inputs)
        return cls(context, sum(counts.values()), counts[True])

    def decibels(self, program: Program, original: Program) -> float:
        """Signal-to-noise ratio of a program's outputs against the original's, on held-out rows."""
        ratio = Ratio()
        with torch.no_grad():
            for inputs, held_out in self.context.split_batches("compare"):
                if held_out:
                    ratio.add(original.run(inputs), program.run(inputs))
        return ratio.decibels


def attempts(
    program: Program, original: Program, split: Split, method: str, fit: Callable[..., Fit] = Fit
) -> Iterator[Attempt]:
    """The pruned network as it is, then copies fitted by every method up to the one given."""
    context = split.context
    for name in METHODS[: METHODS.index(method) + 1]:
        if name == "recalibrate" and not _has_statistics(program):
            continue
        copy, layers = program, list[Fitted]()
        if name != "none":
            copy = program.lazy_clone()
            batches = ((inputs.leaves, held_out) for inputs, held_out in context.split_batches())
            with torch.no_grad(), Pairs(original.graph, copy.graph, batches) as pairs:
                fitting = fit(copy, original, pairs, name, context.note)
                fitting.run(context.show_progress)
            layers = fitting.fitted
        yield Attempt(name, copy, split.decibels(copy, original), layers)


def _has_statistics(program: Program) -> bool:
    norms = program.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    return any(arguments(norm)["running_mean"] is not None for norm in norms)


def _sheet(layers: Sequence[Fitted]) -> Sheet:
    rows = tuple((layer.name, round(layer.gain, 2), round(layer.bias, 2), round(layer.weight, 2)) for layer in layers)
    return Sheet("refitting", ("layer", "gain, dB", "way to fitted bias", "way to fitted weight"), rows)
