"""The search behind `FitGoal`: models of cost and loss, a solver, a repair, and whole files measured in turn."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence

from lobo_fx.axes import Axis, Inference, kind
from lobo_fx.axes.cost import macs_after
from lobo_fx.axes.members import Member, members
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.files import temporary_folder
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate
from lobo_fx.measures.judge import Judge
from lobo_fx.passes.goal.correction import NEAR, tolerated
from lobo_fx.passes.goal.costs import FileCosts, Precision
from lobo_fx.passes.goal.front import tell
from lobo_fx.passes.goal.loss_model import LossModel, Noise, added
from lobo_fx.passes.goal.programs import Built, Programs, Score
from lobo_fx.passes.goal.ranks import rank_eliminations
from lobo_fx.passes.goal.repair import Repair
from lobo_fx.passes.goal.scopes import cut_by_scopes
from lobo_fx.passes.goal.settings import Settings
from lobo_fx.passes.goal.solver import Losses, cheapest, solve, sum_of
from lobo_fx.passes.goal.terms import Budget
from lobo_fx.passes.pruning.search import Candidates
from lobo_fx.passes.pruning.widths import Widths, runs_through
from lobo_fx.passes.quantization.integers.calibration import calibrate, prepare
from lobo_fx.passes.quantization.integers.simulation import observers_by_layer, simulated
from lobo_fx.passes.quantization.quantize_static import folded
from lobo_fx.terminal.progress import spinner, track

__all__ = ["GoalSearch"]

_LOWER = 0.02
"""How far the next try aims below a limit that was missed, since measurements are noisy."""
_WORK = 2e12
"""Most multiply-accumulates for the runs of the loss model, which compares on more rows if a row costs less."""
_FEWEST_ALONE, _FEWEST = 4, 8
"""Fewest rows on which the loss of an axis alone is measured, and on which programs are compared."""
_CORRECTIONS = 4
_HIGHER = (0.08, 0.04, 0.02)
"""How far the next tries aim above a limit that leaves room: models are wrong by as much from file to file."""
_SHARES = (0.7, 0.5, 0.35, 0.25, 0.15)
"""Shares of the original's cost, in the first limited quantity, at which further candidates are made for the front."""
_PLACEMENTS = 2
"""How often integers are placed again, since widths change with the placement."""
_EARLY = 0.25
"""Share of the time in which every precision is tried; after it, more are tried where rounding is most of the loss."""
_FINER = 2
"""Placements of fewer integers that are tried if all integers together lose too much."""
_LEAST = 1e-6
"""Least share that a latency counts as: the CPU clock may tell no time at all for a tiny file."""
_LOSS_STEPS = 5
"""Bisections of the latency, if only the loss is limited."""


class GoalSearch:
    """Searches once.

    Args:
        start: the program to compress.
        context: data, score, seed and notes.
        settings: the goal and how to look for it.
    """

    def __init__(self, start: Program, context: Context, settings: Settings) -> None:
        self.context, self.settings, self.goal = context, settings, settings.goal
        # Measurements of candidates are not kept: another search meets other candidates.
        self.quiet = dataclasses.replace(context, show_progress=False, notes=[], sheets=[], measurements=None)
        self.start, self.program = start, folded(start.lazy_clone(), context)
        propagate(self.program.module)
        self.inference = Inference(self.program).run()
        self.free = {leaf: found for leaf, found in members(self.inference).items() if self._may_go(leaf, found)}
        self.score = Score(context, context.original or self.start)
        self.starts: dict[str, Sequence[Widths]] = {}  # by precision, the starts of its repair
        self.learned: dict[str, Losses] = {}  # by precision, the losses that its repair learned

    def _may_go(self, leaf: Axis, found: Sequence[Member]) -> bool:
        kinds, exclude = self.settings.kinds, self.settings.exclude
        return (kinds is None or kind(leaf) in kinds) and not any(runs_through(found, p) for p in exclude)

    def run(self) -> Program:
        """The best program within the goal.

        Raises:
            InvalidInput: the goal can't be met; says how near one can get and what is in the way.
        """
        with temporary_folder() as folder:
            with spinner("goal: costs of widths", self.context.show_progress):
                given = self.start, self.inference, tuple(self.free), self.quiet, self.settings, folder
                self.costs = FileCosts(*given)
            self.context.notes.extend(self.costs.notes)
            self.leaves, self.whole, original = self.costs.leaves, self.costs.whole, self.costs.original
            self._learn_losses()
            self.precisions = [*map(self._rounded, self.costs.precisions)]
            self.early = time.monotonic() + _EARLY * self.settings.seconds
            self.until = time.monotonic() + self.settings.seconds
            limits = {name: limit.of(original[name]) / original[name] for name, limit in self.goal.limits.items()}
            best = self._within(limits) if limits else self._fastest()
            best = self._refitted(best, limits)
            self._check_loss(best)
            self._look_around(best.precision, next(iter(limits), "latency"))
        tell(self.programs, best, limits, self.context)
        return self.programs.program_of(best)

    def _learn_losses(self) -> None:
        macs = macs_after(self.inference, {}) or 1
        rows = _WORK / (macs * max(1, len(self.leaves)))
        alone, together = (int(min(64, max(least, rows))) for least in (_FEWEST_ALONE, _FEWEST))
        held_out = self._held_out(together)
        self.noise = Noise(self.program, held_out)
        judge = Judge(self.context.original or self.start, held_out)
        if not self.noise.reference:
            raise InvalidInput("the model gives no floating-point output, by which a loss could be told")
        beside = rank_eliminations(self.program, self.costs.ranks, self.quiet)
        one_by_one = self.noise if alone == together else Noise(self.program, self._held_out(alone))
        model = LossModel.measure(self.inference, self.context, one_by_one, self.free, beside)
        self.scores = {leaf: model.scores[leaf] for leaf in self.free}
        self.losses: Losses = {leaf: dict(enumerate(model.losses[leaf].tolist())) for leaf in self.leaves}
        given = self.start, self.inference, self.costs, self.scores, self.noise, judge, self.score
        self.programs = Programs(*given, self.quiet, self.settings, self.context.show_progress)
        self.programs.release_memory()

    def _held_out(self, rows: int) -> Sequence[Inputs]:
        return self.quiet.held_out_batches(rows) or [self.program.example_inputs]

    def _rounded(self, precision: Precision) -> Precision:
        """The precision; if it has weights alone in few bits, with its rounding noise and its file measured."""
        if precision.weights is None:
            return precision
        made = self.costs.stored(precision.weights, self.program.lazy_clone(), self.quiet)
        self.costs.learn(precision, self.whole, self.costs.measure(made))
        return dataclasses.replace(precision, rounding=added(self.noise(made)))

    # Widths for a budget.

    def _within(self, limits: Mapping[str, float]) -> Built:
        """The program of least loss within limits, each a share of the original's."""
        self.precisions = [self._placed_anew(precision, limits) for precision in self.precisions]
        nearest = {precision.name: self._out_of_reach(precision, limits) for precision in self.precisions}
        able = [precision for precision in self.precisions if not nearest[precision.name]]
        expected = {precision.name: self._expected_loss(precision, limits) for precision in able}
        waiting = sorted(able, key=lambda precision: expected[precision.name])
        inside, goes_on = list[Built](), True
        while waiting and goes_on:
            precision = waiting.pop(0)
            self._build_within(precision, limits)
            inside, rounding_hurts = self._inside(limits), self._rounding_hurts(precision)
            kept = any(map(self._keeps, inside))
            goes_on = not kept or time.monotonic() < (self.until if rounding_hurts else self.early)
            if goes_on and rounding_hurts and precision.name == "int8" and self.settings.precision == "auto":
                waiting = [*self._least_expected(self._fewer_integers(), limits), *waiting]
        if not self.programs.built:
            raise InvalidInput("the goal can't be met: " + "; ".join(nearest.values()))
        if not inside:
            near = min(self.programs.built, key=lambda b: max(b.measured[name] / limits[name] for name in limits))
            told = ", ".join(
                f"{name} {near.measured[name]:.3f} of the original's, not {limits[name]:.3f}" for name in limits
            )
            raise InvalidInput(f"the goal was not met by measurement: the nearest file has {told}")
        best = self._using_what_is_left(max(inside, key=self._quality), limits)
        return best if self.context.evaluate is None else self._by_score(best, limits)

    def _placed_anew(self, precision: Precision, limits: Mapping[str, float]) -> Precision:
        """Places integers for about the widths that the budget leaves: narrow operators may be faster in float."""
        if not precision.integers or self.settings.costs is not None:
            return precision
        for _ in range(_PLACEMENTS):
            widths = solve(self._budget(precision, limits), self.losses, precision.options)
            integers = self.programs.place(widths)
            if not integers or set(integers) == set(precision.integers or ()):
                break
            precision = self.costs.precision(precision.name, integers)
        return precision

    def _out_of_reach(self, precision: Precision, limits: Mapping[str, float]) -> str:
        """Which limit even the narrowest widths exceed, and what takes most of it, in words; empty if there is none."""
        for name, limit in limits.items():
            narrowest = cheapest(precision.costs[name], precision.options)
            least = precision.costs[name](narrowest)
            if least <= limit:
                continue
            measured = self._measured(precision, narrowest)  # models may be wrong
            least = measured.get(name, least)
            if least <= tolerated(name, limit):
                continue
            parts: dict[str, float] = {}
            for term in precision.costs[name].terms:
                parts[term.name] = parts.get(term.name, 0.0) + term(narrowest)
            largest = sorted(parts, key=lambda part: -parts[part])[:3]
            whole = sum(parts.values())
            where = ", ".join(f"{part or 'stored tensors'} ({parts[part] / whole:.0%})" for part in largest)
            return (
                f"in {precision.name}, with every axis as narrow as it may get, the {name} is still {least:.3f} of "
                f"the original's, not {limit:.3f}; most of that is {where}"
            )
        return ""

    def _measured(self, precision: Precision, widths: Widths) -> dict[str, float]:
        """What a file of these widths takes; corrects the costs expected of others."""
        measured = self.programs.measure_structure(precision, widths)
        self.costs.learn(precision, widths, measured)
        return measured

    def _rounding_hurts(self, precision: Precision) -> bool:
        """Whether most noise of a precision's programs is rounding: a narrower one, rounded less, may lose less."""
        for built in reversed(self.programs.built):
            rounding = self.programs.rounding(built)
            if built.precision.name == precision.name and rounding is not None:
                return precision.name != "float" and rounding > built.noise / 2
        return False

    def _fewer_integers(self) -> list[Precision]:
        """Precisions with ever fewer operators as integers, by the noise of each operator alone at the outputs."""
        program, choices = self.settings.quantizing.simplify(self.program.lazy_clone(), self.quiet)
        placement = choices.place()
        prepared = prepare(program, placement, self.quiet)
        calibrate(prepared, self.quiet)
        around = observers_by_layer(prepared, placement)
        noises = {
            layer: self.noise.of(simulated(prepared, observers))
            for layer, observers in track(list(around.items()), "sensitivity", self.context.show_progress)
        }
        return self.costs.fewer_integers(noises)

    def _least_expected(self, precisions: Sequence[Precision], limits: Mapping[str, float]) -> list[Precision]:
        """The precision that is expected to lose least at the widths that its budget leaves, in a list; or no entry."""

        def expected(precision: Precision) -> float:
            return self._loss(precision, solve(self._budget(precision, limits), self.losses, precision.options))

        return sorted(precisions, key=expected)[:1]

    def _loss(self, precision: Precision, widths: Widths) -> float:
        """The expected loss of widths and of rounding together."""
        return precision.rounding + sum_of(self.losses, widths)

    def _expected_loss(self, precision: Precision, limits: Mapping[str, float]) -> float:
        """Solves and measures structures until their costs are as expected; returns the loss expected then."""
        seen: list[Widths] = []
        for _ in range(_CORRECTIONS):
            widths = solve(self._budget(precision, limits), self.losses, precision.options)
            if widths in seen:
                break
            seen.append(widths)
            measured = self._measured(precision, widths)
            if not self._misses(widths, measured, limits):
                break
        return self._loss(precision, solve(self._budget(precision, limits), self.losses, precision.options))

    def _build_within(self, precision: Precision, limits: Mapping[str, float]) -> None:
        """Repairs the solver's widths within the corrected budget, and builds the best.

        A structure is measured first: refitting may take minutes for a file that misses the limits. One that holds them
        without using them up is built at the end if nothing better was.
        """
        repair, widths, starts = self._repaired(precision, limits, self.until)
        last: Widths | None = None
        narrower: Widths | None = None
        for attempt in range(1, _CORRECTIONS + 1):
            if self.programs.built_of(precision, widths):
                break
            measured: Mapping[str, float] = {} if widths == last else self._measured(precision, widths)
            if widths == last or attempt == _CORRECTIONS or not self._misses(widths, measured, limits):
                measured = self.programs.build(precision, widths).measured
                missed = self._misses(widths, measured, limits)
                if not missed or (self._inside(limits) and time.monotonic() > self.until):
                    break
            last = widths
            over = any(measured.get(name, 0.0) > limit for name, limit in limits.items())
            narrower = widths if narrower is None and not over else narrower
            lower = {name: (1 - _LOWER * attempt * over) * limit for name, limit in limits.items()}
            budget = self._budget(precision, lower)
            widths = solve(budget, repair.learned(), precision.options)
        learned = self.learned[precision.name] = repair.learned()
        self.starts[precision.name] = starts
        others = [built.widths for built in self._inside(limits) if built.precision.name == precision.name]
        in_time = not others or time.monotonic() < self.until
        if narrower is not None and in_time and all(sum_of(learned, narrower) < sum_of(learned, w) for w in others):
            self.programs.build(precision, narrower)

    def _using_what_is_left(self, best: Built, limits: Mapping[str, float]) -> Built:
        """The best within limits, after also building programs expected a little above them but measured below them.

        A model that is right on average is some percent wrong about a single file. Only the best's precision is tried.
        """
        precision = best.precision
        if limits.keys() == {"size"}:
            return best  # bytes are as expected
        if self.settings.costs is not None and "latency" in limits:
            return best  # another machine can't be measured here
        for share in _HIGHER:
            full = any(best.measured[name] >= (1 - NEAR) * limit for name, limit in limits.items())
            if full or best.widths == self.whole or time.monotonic() > self.until:
                break
            # Bytes are no more than expected, so nothing is gained by aiming above their limit.
            higher = {name: limit if name == "size" else (1 + share) * limit for name, limit in limits.items()}
            budget = self._budget(precision, higher)
            widths = solve(budget, self.learned[precision.name], precision.options)
            if self.programs.built_of(precision, widths):
                continue
            measured = self._measured(precision, widths)
            expected = {name: self.costs.expected(precision, name, widths) for name in limits} | measured
            if all(expected[name] <= tolerated(name, limit) for name, limit in limits.items()):
                self.programs.compare(precision, widths)  # what pruning alone loses
                self.programs.build(precision, widths)
                best = max(self._inside(limits), key=self._quality)
        return best

    def _refitted(self, best: Built, limits: Mapping[str, float]) -> Built:
        """The best, refitted to all data where candidates were refitted to a part of it, if that is better."""
        whole = self.programs.refitted(best)
        holds = all(whole.measured[name] <= tolerated(name, limit) for name, limit in limits.items())
        if not holds or self._quality(whole) <= self._quality(best):
            return best
        self.programs.replace(best, whole)
        return whole

    def _by_score(self, best: Built, limits: Mapping[str, float]) -> Built:
        """The best by its score, after also building the widths of the solver and the scopes: noise may mislead."""
        for widths in self.starts[best.precision.name]:
            if time.monotonic() < self.until and self.programs.built_of(best.precision, widths) is None:
                self.programs.build(best.precision, widths)
        return max(self._inside(limits), key=self._quality)

    def _inside(self, limits: Mapping[str, float]) -> list[Built]:
        """The programs that were built and measured to hold the limits."""
        return [
            b for b in self.programs.built if all(b.measured[name] <= tolerated(name, limits[name]) for name in limits)
        ]

    def _budget(self, precision: Precision, limits: Mapping[str, float]) -> Budget:
        """The budget of widths under limits, corrected by the measurements so far."""
        return Budget(tuple((self.costs.towards(precision, name, limit), 1.0) for name, limit in limits.items()))

    def _repaired(
        self, precision: Precision, limits: Mapping[str, float], until: float
    ) -> tuple[Repair, Widths, Sequence[Widths]]:
        """Repairs the widths of the solver and of the scopes; returns the repair, its best widths and its starts.

        Layers that the solver leaves at full rank stay so: candidates are few, and lower ranks rarely pay.
        """
        candidates = Candidates(self.free, self.scores)
        scopes = [*cut_by_scopes(self.programs, precision, candidates, limits, until)]
        budget = self._budget(precision, limits)
        solved = solve(budget, self.losses, precision.options)
        whole = {rank.leaf for rank in self.costs.ranks if solved[rank.leaf] == rank.leaf.size}
        options = {leaf: found[-1:] if leaf in whole else found for leaf, found in precision.options.items()}
        repair = Repair(budget, self.losses, options, lambda w: self.programs.compare(precision, w), self.context.seed)
        starts = [solved, *scopes]
        return repair, repair.run(starts, self.settings.moves, until), starts

    def _misses(self, widths: Widths, measured: Mapping[str, float], limits: Mapping[str, float]) -> bool:
        """Whether a limit was missed, or a single one not used up."""
        missed = False
        for name, limit in limits.items():
            if name not in measured:
                continue  # another machine can't be measured here
            over = measured[name] > tolerated(name, limit)
            under = widths != self.whole and measured[name] < (1 - NEAR) * limit and len(limits) == 1
            missed |= over or under
        return missed

    # The loss as the limit, the front, the report.

    def _fastest(self) -> Built:
        """The fastest within the limit of loss: bisects the latency, starting from unpruned programs."""
        whole = [self.programs.build(precision, self.whole) for precision in self.precisions]
        if not self._keeps(whole[0]):
            whole += [self.programs.build(precision, self.whole) for precision in self._finer(whole[0])]
        keeping = [built for built in whole if self._keeps(built)]
        if not keeping:
            return max(whole, key=self._quality)
        best = min(keeping, key=_latency)
        precision = best.precision
        narrowest = cheapest(precision.costs["latency"], precision.options)
        least = self.costs.expected(precision, "latency", narrowest)
        low, high = math.log(max(least, _LEAST)), math.log(_latency(best))
        for _ in range(_LOSS_STEPS):
            if high - low < NEAR or time.monotonic() > self.until:
                break
            middle = (low + high) / 2
            until = min(self.until, time.monotonic() + self.settings.seconds / _LOSS_STEPS)
            widths = self._repaired(precision, {"latency": math.exp(middle)}, until)[1]
            found = self.programs.built_of(precision, widths) or self.programs.build(precision, widths)
            # a file may take more or less than it was to take: what it took is no longer in question either
            taken = math.log(_latency(found))
            low, high = (low, min(middle, taken)) if self._keeps(found) else (max(middle, min(taken, high)), high)
        return min(filter(self._keeps, self.programs.built), key=_latency)

    def _finer(self, built: Built) -> Iterator[Precision]:
        """If all integers lose too much: precisions with fewer of them, at a quarter of the noise and less."""
        if built.precision.name != "int8" or self.settings.precision != "auto":
            return
        fewer, most_noise = self._fewer_integers(), built.noise
        for _ in range(_FINER):
            most_noise /= 4
            found = next((precision for precision in fewer if precision.rounding <= most_noise), None)
            if found is not None:
                yield found

    def _keeps(self, built: Built) -> bool:
        """Whether the limit of loss holds."""
        if self.goal.drop is not None:
            assert built.score is not None
            return built.score >= self.score.original - self.goal.drop
        return self.goal.decibels is None or built.verdict.worst >= self.goal.decibels

    def _quality(self, built: Built) -> tuple[bool, float, float]:
        """The order of programs within the other limits: those within the limit of loss, then by score and decibels."""
        return self._keeps(built), 0.0 if built.score is None else built.score, built.verdict.worst

    def _check_loss(self, best: Built) -> None:
        if not self._keeps(best):
            got = (
                f"loses {self.score.original - best.score:.4g} of the score"
                if best.score is not None and self.goal.drop is not None
                else f"has {best.verdict.worst:.1f} dB"
            )
            asked = f"drop={self.goal.drop}" if self.goal.drop is not None else f"decibels={self.goal.decibels}"
            raise InvalidInput(
                f"the goal can't be met: the best within the other limits {got}, and {asked} was asked for. "
                "Loosen one of them, or train after a looser goal (FineTune, Distill)"
            )

    def _look_around(self, precision: Precision, name: str) -> None:
        """Compares candidates at other shares of a quantity, for the front, as long as there is time."""
        for share in track(_SHARES, "front", self.context.show_progress):
            if time.monotonic() > self.until:
                return
            budget = self._budget(precision, {name: share})
            widths = solve(budget, self.losses, precision.options)
            if budget.fits(widths) and all(widths != known for _, known, _ in self.programs.tried):
                self.programs.compare(precision, widths)


def _latency(built: Built) -> float:
    return max(built.measured["latency"], _LEAST)
