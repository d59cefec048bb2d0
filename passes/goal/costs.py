"""Costs of files of any widths, predicted and measured, as shares of the original's latency, size and memory.

Predictions add up models of the parts; a file that was measured corrects them near its own cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lobo_fx.axes import Axis, Inference, kind
from lobo_fx.axes.members import members
from lobo_fx.axes.surgery import remove
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.layers import layers
from lobo_fx.graph.notes import Note
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate
from lobo_fx.graph.sized_inputs import named_arrays, with_rows
from lobo_fx.measures.fidelity import decibels
from lobo_fx.measures.latency import benchmark
from lobo_fx.measures.memory import peak_memory
from lobo_fx.passes.goal.correction import Correction
from lobo_fx.passes.goal.latency_model import LatencyModel
from lobo_fx.passes.goal.plan import shapes_of, with_firsts
from lobo_fx.passes.goal.ranks import RankAxis, find_ranks
from lobo_fx.passes.goal.settings import Settings
from lobo_fx.passes.goal.solver import Options
from lobo_fx.passes.goal.terms import Sum, constant, stored_bytes
from lobo_fx.passes.pruning.plan import PruningPlan
from lobo_fx.passes.pruning.widths import Widths, best_positions
from lobo_fx.passes.quantization.integers.kernels import kernel_table, one_row
from lobo_fx.passes.quantization.integers.prices import measure_missing, open_table
from lobo_fx.passes.quantization.mixed_precision import ever_fewer
from lobo_fx.passes.quantization.quantize_static import QuantizeStatic, folded, fused_where_faster
from lobo_fx.passes.quantization.quantize_weights import QuantizeWeights
from lobo_fx.plugins.kernels import ProfilesNodes
from lobo_fx.plugins.registry import EXPORTERS, RUNTIMES

__all__ = ["FileCosts", "Precision", "narrowed"]

_LEVELS = 24
"""Most options of an axis."""
_NARROWEST = 16
"""An axis keeps at least one in `_NARROWEST` positions."""
_COUNTED = ("heads", "groups")
"""Kinds of axes whose sizes are not rounded, since any number suits a kernel alike."""
_FINEST, _FEW = 8, 8
"""Options of an axis are multiples of 8 positions, or of more where that still gives 8 options."""
_SMALL = 8
"""Axes of fewer positions may have any width: registers are not filled anyway."""
_ROUNDS = 15
"""Fewest rounds in which a file is measured."""
_MILLISECONDS = 500.0
"""How long the original runs in all rounds where its calls are short."""
_LARGE = 0.02
"""A layer that takes this share of the time may become two of a lower rank."""
_FORMATS = ("int8", "int4")
"""Formats of `QuantizeWeights` whose codes ONNX Runtime multiplies with."""
_FEW_ROWS = 8
_INT8 = 8.0
_ROW = 1024
"""Columns of a typical row, by which the share of scales is estimated."""
_LEAST_NOISE = 1e-30
_METADATA = 2048
"""Most bytes that `Result.export` adds to a file, to tell what was done to the model."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """The program with some operators as integers, or with weights in few bits.

    Attributes:
        name: `int8`, `float`, `int8 of N operators`, or `weights in` a format.
        integers: names of the operators that run as integers, weights of the others are stored as int8; None for none.
        costs: costs as shares of the original's, by name of the quantity.
        options: widths that axes may have, and ranks.
        weights: a format of `QuantizeWeights`; None where there is none.
        rounding: noise that rounding adds at whole widths, as far as it is known.
    """

    name: str
    integers: tuple[str, ...] | None
    costs: Mapping[str, Sum]
    options: Options
    weights: str | None = None
    rounding: float = 0.0


class FileCosts:
    """Costs of the files that a program may become.

    Args:
        start: the program as it came; its file is the original's where no pass ran before.
        inference: axes of the program with batch norms folded.
        free: the axes whose widths may change.
        context: calibration data, without progress of its own.
        settings: the goal, how operators are quantized, and for what machine.
        folder: folder for files.

    Attributes:
        notes: what was found about the cost table.
    """

    def __init__(
        self,
        start: Program,
        inference: Inference,
        free: Sequence[Axis],
        context: Context,
        settings: Settings,
        folder: Path,
    ) -> None:
        self.start, self.inference = start, inference
        self.program, self.context, self.settings, self.folder = inference.program, context, settings, folder
        self.notes: list[Note] = []
        self.corrections: dict[tuple[str, str], Correction] = {}  # by precision and quantity
        self.exporter = EXPORTERS.ours(EXPORTERS.default)(compare=False)  # files that are only measured
        self.runtime = RUNTIMES.ours(RUNTIMES.default)()
        self._measure_original()
        self.table = open_table(settings.costs)
        self.model = LatencyModel(inference, kernel_table(RUNTIMES.default), self.times)
        self._price(self.model)
        self.ranks = self._ranks()
        self.leaves = (*free, *(rank.leaf for rank in self.ranks))
        self.whole: Widths = {leaf: leaf.size for leaf in self.leaves}
        self.floating = self.model.sum(self.leaves, ranks=self.ranks)
        self.microseconds = self._microseconds_of_original()
        if not self.floating(self.whole):
            raise InvalidInput("the model computes nothing that takes time: there is nothing to make faster")
        self.precisions = self._precisions()

    def expected(self, precision: Precision, name: str, widths: Widths) -> float:
        """A quantity of a file as a share of the original's: the model's prediction, corrected by measurements."""
        return self.corrections[precision.name, name](precision.costs[name](widths))

    def towards(self, precision: Precision, name: str, limit: float) -> Sum:
        """The predicted quantity as a share of a limit, corrected to be right at the limit."""
        return precision.costs[name].scaled(1 / self.corrections[precision.name, name].inverse(limit))

    def learn(self, precision: Precision, widths: Widths, measured: Mapping[str, float]) -> None:
        """Corrects predictions by what a file of these widths was measured to take."""
        for name, value in measured.items():
            self.corrections[precision.name, name].learn(precision.costs[name](widths), value)

    def _measure_original(self) -> None:
        """Writes the original's file, and measures the latency, size and memory that costs are shares of."""
        self.arrays = named_arrays(self.program, with_rows(self.program, 1))
        self.file = self.exporter.export(self.context.original or self.start, self.folder / "original.onnx", {}).path
        self.times = self._profile(self.program)
        measured = benchmark(
            {"original": self.file}, self.runtime, arrays=self.arrays, rounds=_ROUNDS, memory=False, progress=False
        )
        milliseconds = measured.latencies["original"].cpu
        self.rounds = max(_ROUNDS, round(_MILLISECONDS / max(1.0, milliseconds)))
        self.original = {
            "latency": milliseconds,
            "size": float(_METADATA + sum(path.stat().st_size for path in self.folder.glob("original*"))),
        }
        if "memory" in self.settings.goal.limits:
            self.original["memory"] = float(self._memory(self.file))

    def _price(self, model: LatencyModel) -> None:
        """Gives a model the costs of its kernels; those that a table of another machine lacks are noted."""
        told = dataclasses.replace(self.context, notes=self.notes)
        measure_missing(self.table, model.priced, told)
        model.price(self.table)
        if self.settings.costs is not None:
            model.adopt()

    def _microseconds_of_original(self) -> float:
        """What the original takes in float, by prediction: measured files correct it, but not on another machine."""
        original = self.context.original
        if self.settings.costs is None or original is None or shapes_of(original) == shapes_of(self.start):
            return self.floating(self.whole)
        program = folded(original.lazy_clone(), dataclasses.replace(self.context, notes=[]))
        propagate(program.module)
        model = LatencyModel(Inference(program).run(), self.model.kernels, self._profile(program))
        self._price(model)
        return model.sum(())({})

    def _memory(self, file: Path) -> int:
        kind = type(self.runtime)
        base, peak = peak_memory(file, f"{kind.__module__}:{kind.__qualname__}", 1, self.arrays)
        return max(1, peak - base)

    def _profile(self, program: Program) -> Mapping[str, Sequence[float]]:
        """Microseconds of each operator within a program's file, where the runtime tells them."""
        if not isinstance(self.runtime, ProfilesNodes):
            return {}
        file = self.exporter.export(program, self.folder / "folded.onnx", {}).path
        return self.runtime.node_times(file, self.arrays, _givers(program))

    def _ranks(self) -> list[RankAxis]:
        """Rank axes of the layers that take most of the time, if their kernels are known at other sizes."""
        if not self.settings.low_rank:
            return []
        found = find_ranks(self.inference, self.context, self.model.large(_LARGE))
        may = [rank for rank in found if not self.settings.excludes(rank.candidate.names)]
        return [
            rank
            for rank in may
            if all(self.model.varies(layer.node, (rank.outputs, rank.inputs)) for layer in rank.candidate.layers)
        ]

    def _precisions(self) -> list[Precision]:
        """The precisions to try: integers where they are faster; float; weights in few bits if the goal needs it."""
        asked, found = self.settings.precision, list[Precision]()
        if asked in ("auto", "int8"):
            self.choices = self.settings.quantizing.simplify(self.program.lazy_clone(), self.context)[1]
            integers = tuple(self.choices.place().integer)
            if integers or asked == "int8":
                found.append(self.precision("int8", integers))
        if asked in ("auto", "float"):
            found.append(self.precision("float", None))
        few = self.settings.goal.limits.keys() & {"size", "memory"} or self._reads_few_rows()
        for format in _FORMATS:
            if asked == f"weights_{format}" or (asked == "auto" and few):
                found.append(self.precision(f"weights in {format}", None, format))
        return found

    def _reads_few_rows(self) -> bool:
        """Whether the slow operators are linear layers of so few rows that most time goes to reading weights."""
        large = self.model.large(_LARGE)
        slow = [layer for layer in layers(self.program.graph) if layer.node.name in large]
        rows = [one_row(layer.input) if layer.kind.word == "linear layer" else None for layer in slow]
        return bool(rows) and all(shape is not None and math.prod(shape[:-1]) <= _FEW_ROWS for shape in rows)

    def fewer_integers(self, noises: Mapping[str, float]) -> list[Precision]:
        """Ever fewer operators as integers: those stay float first whose noise is worst for the time that they save.

        Args:
            noises: by name of an operator, the noise of the outputs with it alone as integers.
        """
        whole = self.choices.place()
        sensitivities = {name: decibels(1.0, max(noise, _LEAST_NOISE)) for name, noise in noises.items()}
        found = []
        by_count = {len(placement.integer): placement for placement in ever_fewer(self.choices, whole, sensitivities)}
        for count in sorted(by_count.keys() - {0, len(whole.integer)}, reverse=True):
            integers = tuple(by_count[count].integer)
            made = self.precision(f"int8 of {count} operators", integers)
            noise = sum(noises.get(name, 0.0) for name in integers)
            found.append(dataclasses.replace(made, rounding=noise))
            self.corrections |= {(made.name, name): self.corrections["int8", name].copy() for name in made.costs}
        return found

    def precision(self, name: str, integers: tuple[str, ...] | None, weights: str | None = None) -> Precision:
        """Makes a precision, of which no file has been measured yet; arguments as in `Precision`."""
        latency = self.floating if integers is None else self.model.sum(self.leaves, integers, self.ranks)
        bits = None if integers is None else _INT8
        if weights is not None:
            bits = QuantizeWeights(weights).row_bits(_ROW) / _ROW
        graph = self.original["size"] - stored_bytes(self.inference, self.leaves)(self.whole)
        size = stored_bytes(self.inference, self.leaves, bits, self.ranks) + constant(self.leaves, max(0.0, graph))
        costs = {
            "latency": latency.scaled(1 / self.microseconds),
            "size": size.scaled(1 / self.original["size"]),
        }
        if "memory" in self.original:  # memory of activations hardly changes, that of weights is the file's
            rest = max(0.0, self.original["memory"] - self.original["size"]) / self.original["memory"]
            costs["memory"] = size.scaled(1 / self.original["memory"]) + constant(self.leaves, rest)
        given = self.settings.round_to
        unit = given or (16 if integers is not None else _FINEST)
        options = {leaf: _options(leaf, unit if given else _unit(leaf, unit)) for leaf in self.leaves}
        options |= {rank.leaf: _rank_options(rank, unit) for rank in self.ranks}
        self.corrections |= {(name, quantity): Correction.of(quantity) for quantity in costs}
        return Precision(name, integers, costs, options, weights)

    def structure(self, precision: Precision, program: Program) -> Program:
        """A narrowed program in a precision, only to be measured: its values mean nothing."""
        if precision.integers is None and precision.weights is None:
            return program
        few = self.context.signature.take_rows(next(self.context.fitting_batches()), [0])
        rows = dataclasses.replace(self.context, calibration_data=[few], notes=[], sheets=[])
        if precision.weights is not None:
            return self.stored(precision.weights, program, rows)
        quick = QuantizeStatic("min_max", correct_bias=False, costs=self.settings.costs, target=self.settings.target)
        program, choices = quick.simplify(program, rows)
        assert precision.integers is not None
        return quick.quantize(program, choices.exactly(with_firsts(precision.integers)), rows)

    def stored(self, weights: str, program: Program, context: Context) -> Program:
        """A program with weights in few bits, rounded without data."""
        program = fused_where_faster(program, self.table, context)
        return QuantizeWeights(weights, method="round", costs=self.settings.costs).run(program, context)

    def measure(self, program: Program) -> dict[str, float]:
        """What a program's file takes, as shares of the original's."""
        path = self.folder / "candidate.onnx"
        artifact = self.exporter.export(program, path, {})
        found = {"size": (artifact.bytes + _METADATA) / self.original["size"]}
        if self.settings.costs is None:
            files = {"original": self.file, "candidate": path}
            measured = benchmark(
                files, self.runtime, arrays=self.arrays, rounds=self.rounds, memory=False, progress=False
            )
            found["latency"] = measured.ratio("candidate")
        if "memory" in self.original:
            found["memory"] = self._memory(path) / self.original["memory"]
        return found


def narrowed(inference: Inference, scores: Mapping[Axis, torch.Tensor], widths: Widths) -> tuple[Program, PruningPlan]:
    """A copy of a program with the best positions of each axis, not refitted, and the plan of the removal."""
    copy = inference.program.lazy_clone()
    found = Inference(copy).run()
    twins = dict(zip(members(inference), members(found), strict=True))
    removal = best_positions(
        {twins[leaf]: scores[leaf] for leaf in widths}, {twins[leaf]: width for leaf, width in widths.items()}
    )
    plan = PruningPlan.of(found, removal, {})
    if removal:
        remove(found, removal)
        propagate(copy.module)
    return copy, plan


def _givers(program: Program) -> dict[str, str]:
    """The node of each value in the file, by the value's name: the node's own, or that of an output."""
    outputs = pytree.tree_leaves(program.graph.output_node().args[0])
    named = {
        spec.name: node.name
        for spec, node in zip(program.signature.outputs, outputs, strict=True)
        if spec is not None and isinstance(node, fx.Node)
    }
    return {node.name: node.name for node in program.graph.nodes} | named


def _rank_options(rank: RankAxis, unit: int) -> list[int]:
    """Ranks that make two layers smaller than one, and the full one."""
    return [*(option for option in _options(rank.leaf, unit) if option <= rank.candidate.shape.highest), rank.leaf.size]


def _unit(leaf: Axis, unit: int) -> int:
    """The unit, halved as long as an axis would have few options; short axes may have any width."""
    if leaf.size < _SMALL:
        return 1
    while unit > _FINEST and leaf.size < _FEW * unit:
        unit //= 2
    return unit


def _options(leaf: Axis, unit: int) -> list[int]:
    """Widths that an axis may have, the widest last: multiples of the unit, or of a part of it where they are few."""
    size = leaf.size
    step = 1 if kind(leaf) in _COUNTED else unit
    while size < 2 * step:
        step //= 2
    widths = list(range(step, size, step)) or [size]
    least = max(1, size // _NARROWEST)
    widths = [width for width in widths if width >= least]
    every = max(1, math.ceil(len(widths) / _LEVELS))
    return sorted({*widths[::-1][::every], size})
