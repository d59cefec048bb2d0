"""`FitGoal`: chooses widths, ranks and precisions together, so that a model keeps limits on measured latency."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from lobo_fx.axes import KINDS, Inference
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import InvalidInput
from lobo_fx.goal import Goal
from lobo_fx.graph.masks import masks
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import check_named
from lobo_fx.graph.shapes import propagate
from lobo_fx.passes.goal.latency_model import LatencyModel
from lobo_fx.passes.goal.plan import GoalPlan
from lobo_fx.passes.goal.search import GoalSearch
from lobo_fx.passes.pruning.widths import is_named
from lobo_fx.passes.quantization.integers.kernels import kernel_table
from lobo_fx.passes.quantization.integers.prices import check_costs
from lobo_fx.passes.quantization.integers.targets import target_named, target_of_this_machine
from lobo_fx.passes.quantization.mixed_precision import DECIBELS
from lobo_fx.passes.quantization.quantize_static import QuantizeStatic, folded
from lobo_fx.plugins.kernels import Kernel
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.recipe import build

__all__ = ["FitGoal"]


@dataclasses.dataclass(frozen=True)
class FitGoal(Pass):
    """Makes the best model within limits: how wide every axis stays, what rank, and which operators run as integers.

    The cost of a width comes from kernels measured on a grid of sizes, and from the profile of the original's file. Its
    loss comes from the moments that refitting uses, scaled by one run for each axis. A solver chooses widths; equal
    shares and the other scopes of `PruneChannels` are candidates beside them. Then candidates of the same cost are
    pruned, refitted and compared, as long as there is time. Files are measured in turn with the original's, which
    corrects the budget. Plans of all candidates stand in `Result.front`.

    Attributes:
        latency: limit, as in `lobo_fx.Goal`; so are the next four.
        size: size of the file.
        memory: peak memory.
        drop: how much of `evaluate`'s score may be lost.
        decibels: least signal-to-noise ratio; 30 where nothing is limited.
        precision: `auto` chooses: operators that are faster as integers run as integers. Where rounding is then most
            of the loss, fewer operators are tried, and float. Where size or memory is limited, or where most of the
            time goes to linear layers of few rows, weights alone in 8 or 4 bits are tried too. `int8`, `float`,
            `weights_int8` and `weights_int4` leave no choice.
        low_rank: whether layers may become two of a lower rank (`Factorize`): those that take 2 % of the time or more,
            where the model fixes the width of neither their inputs nor their outputs.
        kinds: the kinds of axes that may be cut (`lobo_fx.axes.KINDS`); None for all.
        exclude: patterns of names of modules or parameters; an axis that runs through one of them stays whole.
        round_to: widths are multiples of this, of half of it where the axis is less than twice as wide, and so on;
            heads and groups may be any number; ranks likewise. 0 takes 16 for int8, 8 for float.
        moves: candidates that are pruned, refitted and compared beside the solver's.
        seconds: time of the search, after which no further candidate is begun once one is within the limits; costs and
            losses are measured before.
        quantizer: how operators are quantized: a `QuantizeStatic`, or its settings by name.
        costs: a cost table of the machine to run on; None measures this one, once.
        target: the integers that the CPU multiplies fast, as in `QuantizeStatic`: `auto`, `x86-vnni`, `x86-avx2` or
            `arm`.
        plan: a `GoalPlan`, or its file, which decides what to do, so that nothing is searched; the quantizer is the
            plan's where none is given.

    Source: the problem with measured costs: Kurtić et al., "ZipLM: Inference-Aware Structured Pruning of Language
        Models", 2023.

    Example:
        ```python
        lobo_fx.compile(model, [FitGoal(latency="20ms")], example_inputs=images, calibration_data=loader)
        ```
    """

    latency: float | str | None = None
    size: float | str | None = None
    memory: float | str | None = None
    drop: float | None = None
    decibels: float | None = None
    precision: Literal["auto", "int8", "float", "weights_int8", "weights_int4"] = "auto"
    low_rank: bool = True
    kinds: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    round_to: int = 0
    moves: int = 60
    seconds: float = 240.0
    quantizer: QuantizeStatic | None = None
    costs: str | None = None
    target: Literal["auto", "x86-vnni", "x86-avx2", "arm"] = "auto"
    plan: GoalPlan | str | Path | None = None

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def __post_init__(self) -> None:
        given: object = self.quantizer
        if isinstance(given, Mapping):
            object.__setattr__(self, "quantizer", build(QuantizeStatic, dict(given)))
        if self.plan is not None:
            if given := [name for name in self.settings if name not in ("plan", "quantizer", "costs", "target")]:
                raise InvalidInput(f"plan= says what to do; leave out {', '.join(given)}")
            self.given_plan  # noqa: B018  refused here, before any work
        else:
            self.goal  # noqa: B018  likewise
        chosen = self.kinds if isinstance(self.kinds, Sequence) else ()
        if self.kinds is not None and not (chosen and all(kind in KINDS for kind in chosen)):
            raise InvalidInput(f"kinds is {self.kinds!r}; it must be a list of {', '.join(KINDS)}")
        listed = isinstance(self.exclude, Sequence) and not isinstance(self.exclude, str)
        if not listed or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise InvalidInput(f"exclude is {self.exclude!r}; it must be a list of patterns of names")
        for name in ("round_to", "moves"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidInput(f"{name} is {value!r}; it must be a whole number of at least 0")
        if not isinstance(self.seconds, (int, float)) or not self.seconds >= 0:
            raise InvalidInput(f"seconds is {self.seconds!r}; it must be a number of at least 0")
        if self.quantizer is not None and not isinstance(self.quantizer, QuantizeStatic):
            raise InvalidInput(f"quantizer is a {type(self.quantizer).__name__}; expected a QuantizeStatic")
        own = (self.costs, self.target)
        if self.quantizer is not None and (self.quantizer.costs, self.quantizer.target) not in ((None, "auto"), own):
            raise InvalidInput("quantizer has costs or a target of its own: give costs= and target= to the goal")
        check_costs(self.costs)
        target_named(self.target)
        limit = None if self.plan is not None else self.goal.limits.get("latency")
        if self.costs is not None and limit is not None and not limit.is_share:
            raise InvalidInput(
                f"latency={self.latency!r} can't be told from another machine's costs: give a share of the original's"
            )
        if self.target not in ("auto", target_of_this_machine()) and self.costs is None:
            raise InvalidInput(
                f"target={self.target!r} is another machine: its kernels can't be measured here. Run "
                "`lobo-fx costs MODEL --widths -o costs.json` there, and give costs="
            )
        super().__post_init__()  # last, since the messages above say more

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data, and the score where that is limited."""
        return ("calibration_data", *(("evaluate",) if self.drop is not None else ()))

    @functools.cached_property
    def goal(self) -> Goal:
        """The limits; if nothing is limited, `DECIBELS` must stay."""
        limits = (self.latency, self.size, self.memory, self.drop)
        nothing = all(limit is None for limit in (*limits, self.decibels))
        return Goal(*limits, DECIBELS if nothing else self.decibels)

    @functools.cached_property
    def given_plan(self) -> GoalPlan | None:
        """The plan to apply; a file is read once."""
        if self.plan is None or isinstance(self.plan, GoalPlan):
            return self.plan
        if not isinstance(self.plan, (str, Path)):
            raise InvalidInput(f"plan is a {type(self.plan).__name__}; expected a GoalPlan, or the path of one")
        return GoalPlan.load(self.plan)

    @property
    def quantizing(self) -> QuantizeStatic:
        """How operators are quantized, for this target and by these costs."""
        return dataclasses.replace(self.quantizer or QuantizeStatic(), costs=self.costs, target=self.target)

    def excludes(self, names: Iterable[str]) -> bool:
        """Whether a parameter of these names is to stay as it is."""
        return is_named(names, self.exclude)

    def planned(self, file: Path) -> FitGoal:
        """A `FitGoal` that carries out a saved plan."""
        return self.applying(GoalPlan.load(file))

    def applying(self, plan: GoalPlan) -> FitGoal:
        """A `FitGoal` that carries out a plan, for the same machine."""
        return FitGoal(plan=plan, costs=self.costs, target=self.target)

    def priced(self, program: Program, context: Context) -> list[Kernel]:
        """The kernels whose costs a search asks for, at all sizes: a cost table for another machine must hold them."""
        program = folded(program.lazy_clone(), context)
        propagate(program.module)
        return LatencyModel(Inference(program).run(), kernel_table(RUNTIMES.default), {}).priced

    def check(self, program: Program) -> None:
        """Every pattern must match; whether a plan fits is up to the passes before."""
        check_named("exclude", self.exclude, program.module)
        if self.quantizer is not None:
            self.quantizer.check(program)

    def run(self, program: Program, context: Context) -> Program:
        if masks(program):
            context.note("weights that were zeroed before are no longer kept at zero: prune weights after the goal")
        if self.given_plan is not None:
            self.given_plan.check(Inference(folded(program.lazy_clone(), context)).run())
            chosen = self.quantizer or self.given_plan.quantizer
            here = dataclasses.replace(chosen, costs=self.costs, target=self.target)
            return self.given_plan.apply(program, context, here)
        return GoalSearch(program, context, self).run()
