"""Programs of any widths and precision: cut, refitted and compared; or built as a whole, written and measured."""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Mapping, Sequence

import torch

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.cost import macs_after
from lobo_fx.contracts.context import Context
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.notes import Note
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate
from lobo_fx.measures.counts import tensor_bytes
from lobo_fx.measures.judge import Judge, Verdict
from lobo_fx.passes.fitting.side_by_side import Pairs
from lobo_fx.passes.goal.costs import FileCosts, Precision, narrowed
from lobo_fx.passes.goal.loss_model import Noise, added
from lobo_fx.passes.goal.plan import GoalPlan, shapes_of
from lobo_fx.passes.goal.ranks import chosen_ranks
from lobo_fx.passes.goal.settings import Settings
from lobo_fx.passes.low_rank import candidates as low_rank
from lobo_fx.passes.low_rank.lowering import lower, split_layers
from lobo_fx.passes.low_rank.refit import LowRankFit
from lobo_fx.passes.pruning.plan import PruningPlan
from lobo_fx.passes.pruning.widths import Widths
from lobo_fx.process import release_memory
from lobo_fx.terminal.progress import spinner

__all__ = ["Built", "Programs", "Score"]

_FIT_ROWS, _FEWEST_ROWS, _FIT_WORK = 512, 16, 2e11
"""Rows that candidates are refitted to: fewer where one takes many multiply-accumulates, of which all take so many."""
_KEPT_BYTES = 1 << 28
"""Most bytes of the built programs that are kept, but for the latest; others are made again if needed."""
_LARGE_BYTES = 1 << 26
"""Bytes of a program whose dropped copies are not left for Python to find, which takes some tenths of a second."""
_CALLS = 3
"""Calls of a noisy `evaluate`, whose mean counts."""


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """What is known of a whole program of some widths: what its file was measured to take, how its outputs differ.

    The program itself is `Programs.program_of`'s.
    """

    precision: Precision
    widths: Widths
    plan: GoalPlan
    refitted: bool  # to all data
    measured: Mapping[str, float]
    noise: float
    verdict: Verdict
    score: float | None
    notes: Sequence[Note]


class Score:
    """`evaluate`'s score of programs; where it differs between calls, the mean of several.

    Args:
        context: gives `evaluate`.
        original: the original program, scored twice at the start.
    """

    def __init__(self, context: Context, original: Program) -> None:
        self.context, self.calls = context, 1
        if context.evaluate is None:
            return
        first, second = self(original), self(original)
        assert first is not None
        assert second is not None
        self.original = (first + second) / 2
        if first != second:
            self.calls = _CALLS
            said = f"evaluate is noisy: {first:.4g}, then {second:.4g} of one model; means of {_CALLS} count"
            context.note(f"WARNING: {said}")
            warnings.warn(said, stacklevel=2)

    def __call__(self, program: Program) -> float | None:
        if self.context.evaluate is None:
            return None
        return statistics.fmean(self.context.score(program) or 0.0 for _ in range(self.calls))


class Programs:
    """Makes a program of the widths that a search asks for.

    Args:
        start: the program to compress.
        inference: axes of the program with batch norms folded.
        costs: costs of its files.
        scores: importance of the positions of every free axis.
        noise: measures noise of outputs against those of the folded program.
        judge: compares outputs with those of the original.
        score: scores programs by `evaluate`.
        context: calibration data, without progress of its own.
        settings: settings of the search.
        show_progress: whether long work draws progress.

    Attributes:
        few: context of candidates, with the part of the calibration data that they are refitted to.
        tried: pruned and refitted copies: precision that they were meant for, widths, noise.
        built: whole programs.
    """

    def __init__(
        self,
        start: Program,
        inference: Inference,
        costs: FileCosts,
        scores: Mapping[Axis, torch.Tensor],
        noise: Noise,
        judge: Judge,
        score: Score,
        context: Context,
        settings: Settings,
        show_progress: bool,
    ) -> None:
        self.start, self.inference, self.costs, self.scores = start, inference, costs, scores
        self.noise, self.judge, self.score, self.context, self.settings = noise, judge, score, context, settings
        self.program, self.show_progress = inference.program, show_progress
        self.tried: list[tuple[Precision, Widths, float]] = []
        self.built: list[Built] = []
        self._noises: dict[tuple[int, ...], float] = {}
        self._kept: dict[Built, Program] = {}
        macs = macs_after(inference, {}) or 1
        self.few = _first_rows(context, int(min(_FIT_ROWS, max(_FEWEST_ROWS, _FIT_WORK / macs))))

    def cut(self, widths: Widths) -> tuple[Program, PruningPlan]:
        """A narrowed copy, and the plan of the removal."""
        return narrowed(self.inference, self.scores, {leaf: widths[leaf] for leaf in self.scores})

    def _lowered(self, program: Program, widths: Widths) -> list[low_rank.Candidate]:
        """The weights of a narrowed program that are to have a lower rank."""
        names = chosen_ranks(self.costs.ranks, widths)
        return [one for one in low_rank.find_candidates(program, self.context) if one.name in names] if names else []

    def compare(self, precision: Precision, widths: Widths) -> float:
        """Prunes and refits a copy, once for all precisions; returns its noise as a loss that can be summed."""
        key = tuple(widths[leaf] for leaf in self.costs.leaves)
        if key not in self._noises:
            self._noises[key] = self.noise(self._candidate(widths))
            self.release_memory()
        self.tried.append((precision, widths, self._noises[key]))
        return added(self._noises[key])

    def _candidate(self, widths: Widths) -> Program:
        """A copy of these widths, refitted to few rows, whether that helps or not."""
        program, _ = self.cut(widths)
        if widths != self.costs.whole:
            ranks = chosen_ranks(self.costs.ranks, widths)
            wholes = lower(program, self._lowered(program, widths), ranks)
            batches = ((inputs.leaves, held_out) for inputs, held_out in self.few.split_batches())
            with torch.no_grad(), Pairs(self.program.graph, program.graph, batches) as pairs:
                given = self.program, pairs, "reconstruct", self.context.note
                LowRankFit(program, *given, ranks=ranks, wholes=wholes).run(False)
        return program

    def built_of(self, precision: Precision, widths: Widths) -> Built | None:
        """The whole program of these widths, if it was made before."""
        same = (built for built in self.built if built.precision.name == precision.name and built.widths == widths)
        return next(same, None)

    def rounding(self, built: Built) -> float | None:
        """The noise that rounding adds to pruning and refitting; None if these alone were not compared."""
        if built.widths == self.costs.whole:
            return built.noise
        pruned = [noise for _, widths, noise in self.tried if widths == built.widths]
        return max(0.0, built.noise - min(pruned)) if pruned else None

    def build(self, precision: Precision, widths: Widths) -> Built:
        """The whole program of these widths: refitted, quantized, written and measured; corrects costs.

        Of a large model it is refitted to few rows, by one method; see `refitted`.
        """
        self.built.append(self._built(precision, widths, self.few is self.context))
        return self.built[-1]

    def refitted(self, built: Built) -> Built:
        """The same program made by its plan, refitted to all data; itself if it was."""
        return built if self.few is self.context else self._built(built.precision, built.widths, True)

    def replace(self, built: Built, other: Built) -> None:
        """Keeps another program of the same widths in its place."""
        self.built[self.built.index(built)] = other

    def program_of(self, built: Built) -> Program:
        """The program, made again if those made since took its place in memory."""
        return self._kept.get(built) or self._made(built.plan, built.widths, built.refitted)[0]

    def _built(self, precision: Precision, widths: Widths, refitted: bool) -> Built:
        plan = self.plan(precision, widths, self.cut(widths)[1])
        program, notes = self._made(plan, widths, refitted)
        with spinner("goal: measure a candidate", self.show_progress):
            measured = self.costs.measure(program)
            self.costs.learn(precision, widths, measured)
            measured.setdefault("latency", self.costs.expected(precision, "latency", widths))
            noise, verdict, score = self.noise(program), self.judge(program), self.score(program)
        expected = {f"{name} of the original's": value for name, value in measured.items()}
        expected["decibels"] = verdict.whole
        plan = dataclasses.replace(plan, expected=expected)
        built = Built(precision, widths, plan, refitted, measured, noise, verdict, score, notes)
        self._keep(built, program)
        return built

    def _made(self, plan: GoalPlan, widths: Widths, refitted: bool) -> tuple[Program, list[Note]]:
        """The program of a plan, refitted to all data or to few rows of it, and what its passes noted."""
        own = dataclasses.replace(self.context if refitted else self.few, notes=[], sheets=[])
        with spinner("goal: build a candidate", self.show_progress):
            if refitted:
                program = plan.apply(self.start.lazy_clone(), own, self.settings.quantizing)
            else:
                program = plan.quantize(self._candidate(widths), own, self.settings.quantizing)
            propagate(program.module)
        return program, own.notes

    def _keep(self, built: Built, program: Program) -> None:
        """Keeps a program and, of those made before, the latest that fit into memory with it."""
        self._kept[built] = program
        while len(self._kept) > 1 and sum(map(tensor_bytes, self._kept.values())) > _KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        self.release_memory()

    def release_memory(self) -> None:
        """Frees dropped copies of a large program."""
        if tensor_bytes(self.start) > _LARGE_BYTES:
            release_memory()

    def plan(self, precision: Precision, widths: Widths, pruning: PruningPlan) -> GoalPlan:
        """The plan that makes the same program of any checkpoint."""
        ranks = chosen_ranks(self.costs.ranks, widths)
        return GoalPlan(
            pruning,
            precision.integers,
            self.costs.runtime.version,
            ranks=ranks,
            weights=precision.weights,
            shapes=shapes_of(self.program),
            quantizer=dataclasses.replace(self.settings.quantizing, costs=None, target="auto"),
        )

    def place(self, widths: Widths) -> tuple[str, ...]:
        """Names of the operators that are faster as integers at these widths."""
        program, _ = self.cut(widths)
        return tuple(self.settings.quantizing.simplify(program, self.context)[1].place().integer)

    def measure_structure(self, precision: Precision, widths: Widths) -> dict[str, float]:
        """What a file of these widths takes; its values mean nothing."""
        program, _ = self.cut(widths)
        chosen = self._lowered(program, widths)
        if chosen:
            split_layers(program, chosen, chosen_ranks(self.costs.ranks, widths))
            propagate(program.module)
        measured = self.costs.measure(self.costs.structure(precision, program))
        self.release_memory()
        return measured


def _first_rows(context: Context, rows: int) -> Context:
    """A context with the first batches of the calibration data, as many as hold these rows; itself without more."""
    first: list[Inputs] = []
    seen = 0
    for inputs in context.calibration_batches():
        if seen >= rows:
            return dataclasses.replace(context, calibration_data=first)
        first.append(inputs)
        seen += context.signature.count_rows(inputs)
    return context
