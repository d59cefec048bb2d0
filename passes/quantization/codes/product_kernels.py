"""Chooses how a product with a weight in codes is computed, by its cost and the noise that rounding activations adds.

Either the weight is decoded when the file is loaded, and multiplied as floats, or ONNX Runtime multiplies with the
codes, with activations as they are (`float32`) or rounded to int8 in blocks (`int8`). Which is fastest depends on the
CPU, the bits, the block and the rows: one row costs what reading the weight costs, many rows what multiplying costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.running import Runner
from lobo_fx.graph.shapes import expression
from lobo_fx.measures.fidelity import decibels
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.own_operators.formats import Format
from lobo_fx.own_operators.integers import round_blocks
from lobo_fx.own_operators.products import ACCURACY_LEVELS
from lobo_fx.passes.quantization.codes.rounding import Rounded
from lobo_fx.passes.quantization.codes.weights import Weight
from lobo_fx.passes.quantization.integers.prices import measure_missing, open_table
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost
from lobo_fx.report.records import Sheet

__all__ = ["KEPT", "Candidate", "added_noise", "choose_computes"]

KEPT = 0.5
"""Decibels that rounding activations may add to the noise of a layer's codes, unless `int8` was asked for."""
_MOST_ROWS = 256
"""More rows are priced as this many: multiplying then costs far more than reading the weight."""
_MOST_WEIGHTS = 1 << 22
"""Of a larger weight, as many rows as hold this many weights are priced: time grows with their number."""
_FEW_ROWS, _CACHED = 8, 1 << 23
"""Up to `_FEW_ROWS` rows take the time of reading the weight; of more than `_CACHED` weights, from memory."""
_JUDGED_ROWS = 512
"""Rows of a layer's input, per batch, on which noise is measured."""

Shares = dict[str, dict[int, float]]
"""Time as a share of the float product's, by what activations are computed in and by number of rows."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A product that could multiply with codes; its weight is still float.

    Attributes:
        x: the node of its input.
        weight: its weight.
        rounded: the weight in codes.
        number: the codes' format.
        block_size: neighbours that share a scale, of the codes and of activations that are rounded.
    """

    x: fx.Node
    weight: Weight
    rounded: Rounded
    number: Format
    block_size: int

    def kernels(self, compute: str, streamed: bool) -> dict[int, Kernel]:
        """The kernels to look up in the cost table, by number of rows: that of the example inputs, and the fewest.

        Args:
            compute: what activations are computed in.
            streamed: whether the network's weights come from memory at every call.
        """
        outputs, inputs = self.weight.shape
        priced = (min(outputs, max(1, _MOST_WEIGHTS // inputs)), inputs)
        settings = (("bits", self.number.bits), ("block", self.block_size), ("level", ACCURACY_LEVELS[compute]))
        from_memory = (*settings, ("streamed", 1)) if streamed else settings
        return {
            rows: Kernel("product", ((rows, inputs), priced), from_memory if rows <= _FEW_ROWS else settings)
            for rows in self._row_counts
        }

    @property
    def _row_counts(self) -> list[int]:
        """Numbers of rows, with free sizes as in the example and as 1."""
        sizes = self.x.meta["val"].shape[:-1]
        hints = [size if isinstance(size, int) else size.node.hint for size in sizes]
        formulas = [expression(size) for size in sizes]
        fewest = [int(formula.subs(dict.fromkeys(formula.free_symbols, 1))) for formula in formulas]
        counts = [hints] if all(isinstance(hint, int) for hint in hints) else []
        return list(dict.fromkeys(max(1, min(math.prod(known), _MOST_ROWS)) for known in (*counts, fewest)))

    def noise(self, rows: torch.Tensor) -> tuple[float, float]:
        """Energy, at the outputs, of the error that codes make, and of what rounded activations add to it."""
        decoded = self.rounded.values(self.number, self.block_size)
        of_codes = rows @ (decoded - self.weight.matrix).T
        of_rounding = (round_blocks(rows, self.block_size) - rows) @ decoded.T
        return float(of_codes.double().square().sum()), float(of_rounding.double().square().sum())


def choose_computes(
    program: Program, candidates: Mapping[fx.Node, Candidate], compute: str, costs: str | None, context: Context
) -> dict[fx.Node, str]:
    """What activations are computed in by each product that multiplies with codes; the others are decoded at load.

    Args:
        program: the program, its weights still float.
        candidates: candidates by product.
        compute: what was asked for: `auto`, `float32` or `int8`; `int8` is taken for every candidate.
        costs: path of a cost table; None takes this machine's.
        context: gives calibration data; takes notes and a sheet.
    """
    if not candidates:
        return {}
    table, possible = open_table(costs), list(ACCURACY_LEVELS) if compute == "auto" else [compute]
    distinct = {candidate.weight.name: candidate.weight.tensor.numel() for candidate in candidates.values()}
    streamed = sum(distinct.values()) > _CACHED
    kernels = {
        product: {way: candidate.kernels(way, streamed) for way in possible}
        for product, candidate in candidates.items()
    }
    measure_missing(table, [k for ways in kernels.values() for of in ways.values() for k in of.values()], context)
    shares = {product: _shares(candidates[product], ways, table, context) for product, ways in kernels.items()}
    ranked = {product: _no_slower(own) for product, own in shares.items()}
    noise: dict[fx.Node, float] = {}
    if compute == "int8":
        chosen = dict.fromkeys(candidates, compute)
    else:
        rounding = {product: candidates[product] for product, ways in ranked.items() if "int8" in ways}
        batches = context.held_out_batches() if rounding and context.calibration_data is not None else []
        noise = added_noise(program, batches or [program.example_inputs], rounding)
        kept = {
            product: [way for way in ways if way != "int8" or noise[product] <= KEPT]
            for product, ways in ranked.items()
        }
        chosen = {product: ways[0] for product, ways in kept.items() if ways}
    for product, way in chosen.items():
        for rows, share in shares[product].get(way, {}).items():
            if share > 1:
                reason = f"multiplied as {way} codes takes {share:.2f} times as long as decoded, at {rows} rows"
                context.note(reason, parameter=candidates[product].weight.name)
    context.sheets.append(_sheet(candidates, shares, noise, chosen))
    return chosen


def _shares(
    candidate: Candidate, kernels: Mapping[str, Mapping[int, Kernel]], table: CostTable, context: Context
) -> Shares:
    """The shares of time of all ways whose costs are known; the others are noted."""
    found: Shares = {}
    for way, of in kernels.items():
        costs = {rows: table.find(kernel) for rows, kernel in of.items()}
        unknown = next((cost.reason for cost in costs.values() if isinstance(cost, NoCost)), None)
        if unknown is not None:
            context.note(f"what multiplying in {way} costs is not known: {unknown}", parameter=candidate.weight.name)
        else:
            found[way] = {rows: _share(cost) for rows, cost in costs.items() if isinstance(cost, Cost)}
    return found


def _share(cost: Cost) -> float:
    return cost.integer / cost.floating if cost.floating else math.inf


def _no_slower(shares: Shares) -> list[str]:
    """The ways that take no longer than floats at any count of rows, the fastest over all of them first."""
    known = [way for way, times in shares.items() if max(times.values()) <= 1]
    return sorted(known, key=lambda way: _mean(shares[way].values()))


def _mean(shares: Collection[float]) -> float:
    """Geometric mean, since shares are ratios."""
    return math.prod(shares) ** (1 / len(shares))


def added_noise(
    program: Program, batches: Iterable[Inputs], candidates: Mapping[fx.Node, Candidate]
) -> dict[fx.Node, float]:
    """The decibels that rounding the activations of each product would add to the noise of its codes.

    Both noises go the same way from the layer to the outputs, so the ratio at the layer is the one that counts.

    Args:
        program: the program, its weights still float.
        batches: inputs of the program.
        candidates: candidates by product.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    for product, candidate in candidates.items():
        readers.setdefault(candidate.x, []).append(product)
    energies = dict.fromkeys(candidates, (0.0, 0.0))

    def see(node: fx.Node, value: Any) -> None:
        for product in readers.get(node, ()):
            rows = value.flatten(0, -2)
            of_codes, of_rounding = candidates[product].noise(rows[:: max(1, len(rows) // _JUDGED_ROWS)])
            energies[product] = (energies[product][0] + of_codes, energies[product][1] + of_rounding)

    if candidates:
        runner = Runner(program.module, see)
        for inputs in batches:
            runner(inputs)
    return {
        product: decibels(of_codes + of_rounding, of_codes) if of_rounding else 0.0
        for product, (of_codes, of_rounding) in energies.items()
    }


def _sheet(
    candidates: Mapping[fx.Node, Candidate],
    shares: Mapping[fx.Node, Shares],
    noise: Mapping[fx.Node, float],
    chosen: Mapping[fx.Node, str],
) -> Sheet:
    """One line for each product: what was chosen, and the costs and noise behind the choice."""
    rows = []
    for product, candidate in candidates.items():
        own, way = shares[product], chosen.get(product, "decoded")
        listed = [
            ", ".join(f"{share:.2f} at {at}" for at, share in own.get(name, {}).items()) for name in ACCURACY_LEVELS
        ]
        added = round(noise[product], 2) if product in noise else ""
        share = round(_mean(own[way].values()), 2) if way in own else 1.0
        rows.append((candidate.weight.name, share, *listed, added, way))
    columns = ("weight", "time / float's", *(f"{name} / float, at rows" for name in ACCURACY_LEVELS))
    return Sheet("products with codes", (*columns, "noise of int8, dB", "computed in"), tuple(rows))
