"""Structured pruning: whole channels, heads and groups leave the network, wherever they run through it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from lobo_fx.axes import KINDS, Axis, Inference, kind
from lobo_fx.axes.cost import COSTS
from lobo_fx.axes.members import Member, members, parameters
from lobo_fx.axes.removal import Removal
from lobo_fx.axes.surgery import remove, zero
from lobo_fx.axes.survey import survey
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.contracts.verification import check_expected
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.masks import masks, strip_masks
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import check_named, check_patterns
from lobo_fx.graph.randomness import drawn
from lobo_fx.graph.shapes import propagate
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.pruning.compensation import METHODS, Compensated, compensate
from lobo_fx.passes.pruning.criteria import Importance, resolve
from lobo_fx.passes.pruning.plan import PruningPlan
from lobo_fx.passes.pruning.search import SCOPES, Candidates, Patterns, Search, Target, makers
from lobo_fx.passes.pruning.widths import best_positions, runs_through

__all__ = ["PruneChannels"]

_HALF = 0.5
"""Default of `ratio` and `keep`."""
_SHOWN_LOCKS = 3
"""How many reasons are named where nothing can be removed."""


@dataclasses.dataclass(frozen=True)
class PruneChannels(Pass):
    """Removes the positions that matter least from every free axis: channels, heads, head dimensions, groups.

    Which dimensions belong together is inferred from the graph (`lobo_fx.axes`): nothing about the architecture
    needs to be said, and what is not understood keeps its size. Before: `conv(x, W[64, 3, 7, 7])` and whatever
    reads its channels. After: `conv(x, W[32, 3, 7, 7])`, and each reader 32 wide.

    Where nothing but weighted sums runs over an axis, removal equals zeroing, and the compiler checks that.
    Where a norm or a mean runs over it, the report says so and gives the signal-to-noise ratio.

    Attributes:
        ratio: share of each axis to remove, in [0, 1), 0.5 where nothing else says how much; or shares by pattern of
            module names, for the output widths of the modules matched (`{"layer1.*": 0.3}`). Of several patterns that
            match, the most specific counts: a name without wildcards before others, then more letters before fewer;
            of equal ones the first.
        importance: a criterion's name, of `lobo_fx.passes.pruning.criteria`: `l1`, `l2`, `batch_norm`,
            `geometric_median`, `lamp`, `activation`, `second_order`, `taylor`, `taylor_squared`, `fisher`, `random`;
            a name with settings, `{consensus: {criteria: [l1, taylor]}}`; a criterion, `Consensus(["l1", "taylor"])`;
            or a function that scores each element of a parameter.
        scope: `axis` removes the share from each axis; `global` ranks all axes together, each divided by its
            mean; `isomorphic` ranks together the axes that run through the same kinds of parameters.
        target: `macs`, `parameters` or `file_size` (bytes of all weights and buffers): chooses the ratio so that the
            share `keep` of them stays.
        keep: share of `target` that stays, in (0, 1], 0.5 where left out; hit within 2 %.
        kinds: the kinds of axes to prune (`lobo_fx.axes.KINDS`); None prunes every kind.
        steps: number of steps; in each, importance is scored again and the remaining weights are fitted again.
        exclude: patterns of names of modules or parameters; an axis that runs through one of them stays whole.
        plan: a `PruningPlan`, or its file, that decides what to remove; settings that say how much must be left out.
        round_to: widths that stay are multiples of this, where the axis is at least twice as wide: the
            elements of a vector register, 8 for float32, 16 where the result will be quantized to int8.
        minimum: the least width of an axis.
        compensation: what is fitted to calibration data after removal, so that the outputs stay near the
            original's: `none`, `recalibrate` (batch norms), `bias` (and biases), `reconstruct` (and weights, by
            least squares); `auto` is `reconstruct` where calibration data is given, else `none`. A share of the data
            is held out: every layer moves only as far as its error on it falls, and the simplest method within half
            a decibel of the best is taken, so that too few rows, or rows of another domain, do no harm.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, for the problem; "Isomorphic Pruning
        for Vision Models", 2024, for the scope of that name.
    """

    ratio: float | Mapping[str, float] | None = None
    importance: Importance = "l2"
    scope: str = "axis"
    target: str | None = None
    keep: float | None = None
    kinds: Sequence[str] | None = None
    steps: int = 1
    round_to: int = 8
    minimum: int = 1
    compensation: str = "auto"
    exclude: Sequence[str] = ()
    plan: PruningPlan | str | Path | None = None

    promise: ClassVar[Promise] = Promise.MASKED

    def __post_init__(self) -> None:
        ratios = self.ratio.values() if isinstance(self.ratio, Mapping) else [self.ratio]
        for ratio in ratios if self.ratio is not None else ():
            if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
                raise InvalidInput(f"ratio is {ratio!r}; it must be in [0, 1), the share of an axis to remove")
        resolve(self.importance)
        choices = {"scope": SCOPES, "target": (None, *COSTS), "compensation": ("auto", *METHODS)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(str, known))}")
        if self.kinds is not None and not _are_kinds(self.kinds):
            raise InvalidInput(f"kinds is {self.kinds!r}; it must be a list of {', '.join(KINDS)}")
        if self.keep is not None and (not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1):
            raise InvalidInput(f"keep is {self.keep!r}; it must be in (0, 1], the share of the target that stays")
        if isinstance(self.ratio, Mapping) and (self.target or self.scope != "axis"):
            raise InvalidInput("ratio by module names sets each width itself; it goes with neither target nor scope")
        if isinstance(self.ratio, Mapping) and not self.ratio:
            raise InvalidInput("ratio maps patterns of module names to shares; it names none")
        if self.target and self.ratio is not None:
            raise InvalidInput(f"target={self.target!r} chooses the ratio itself; leave ratio out, keep= says how much")
        if not self.target and self.keep is not None:
            raise InvalidInput("keep says how much of a target stays; give target= too, or ratio= alone")
        listed = isinstance(self.exclude, Sequence) and not isinstance(self.exclude, (str, bytes))
        if not listed or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise InvalidInput(f"exclude is {self.exclude!r}; it must be a list of patterns of names")
        if self.plan is not None:
            given = [name for name in self.settings if name not in ("plan", "compensation")]
            if given:
                raise InvalidInput(f"plan= says what to remove; leave out {', '.join(given)}")
            self._given_plan  # noqa: B018  refused here, before any work
        for name in ("steps", "round_to", "minimum"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1")
        super().__post_init__()  # last, since the messages above say more

    @property
    def needs(self) -> tuple[str, ...]:
        """What the criterion and the compensation need."""
        fitted = ("calibration_data",) if self.compensation not in ("auto", "none") else ()
        return tuple(dict.fromkeys((*resolve(self.importance).needs, *fitted)))

    def check(self, program: Program) -> None:
        """Every pattern must match a module; whether that has a width to prune may be up to the passes before."""
        if isinstance(self.ratio, Mapping):
            check_patterns(self.ratio, program.graph)
        check_named("exclude", self.exclude, program.module)

    def run(self, program: Program, context: Context) -> Program:
        method = self._method(context)
        if masks(program):
            filled = ", and refitting fills them" if method != "none" else ""
            context.note(
                f"weights that were zeroed before are no longer kept at zero{filled}: prune weights after channels"
            )
        program = self._prepared(program, method)
        original = program if method == "none" else program.lazy_clone()
        inference = Inference(program).run()
        for operator, where in inference.unknown.items():
            context.note(f"{operator} has no axis rule, so what it touches keeps its size: {where}")
        start = program.lazy_clone() if self.steps > 1 else program
        if self.target and self.steps > 1:  # refused before any work
            dataclasses.replace(self, steps=1).removal(inference, context)
        compensated: Compensated | None = None
        removed = False
        for step in range(1, self.steps + 1):
            if step > 1:
                propagate(program.module)
                inference = Inference(program).run()
            part = self.portion((step - 1) / self.steps, step / self.steps, start, program)
            removal = part.removal(inference, context, strict=self.steps == 1)
            if not removal:
                continue
            removed = True
            _cut(program, inference, removal, context)
            if method != "none" or step < self.steps:
                check_expected(self, program, context)
            if method != "none":
                compensated = compensate(program, original, context, method)
                program = compensated.program
        if compensated is not None:
            context.note(compensated.remark)
            context.sheets.extend([compensated.sheet] if compensated.sheet else [])
        if self.target and self.steps > 1:
            after, before = (COSTS[self.target](Inference(state).run(), {}) for state in (program, start))
            if not Target(self.target, self._keep).is_hit(after / before):
                said = f"keep={self._keep} of the {self.target} was asked for, and {after / before:.3f} is left"
                context.note(f"{said}: the widths that earlier steps left come no nearer")
        if not removed:
            found = survey(inference)
            locks = list(filter(None, dict.fromkeys("; ".join(found.locks).split("; "))))[:_SHOWN_LOCKS]
            why = f", since of every parameter one holds: {'; '.join(locks)}" if locks and not found.axes else ""
            context.note(f"prune_channels found nothing to remove{why}")
        return program

    def _method(self, context: Context) -> str:
        if self.compensation != "auto":
            return self.compensation
        return "none" if context.calibration_data is None else "reconstruct"

    def _prepared(self, program: Program, method: str) -> Program:
        """Turns masks into plain zeros, and computed weights into stored ones if they are to be refitted."""
        strip_masks(program)
        if method != "none" and fold_weights(program, swapped=False):
            propagate(program.module)
        return program

    def portion(self, before: float, after: float, start: Program, now: Program) -> PruneChannels:
        """The pass that goes on from the share `before` of the way to the share `after`; widths are rounded at the end.

        Args:
            before: where `now` is, in [0, 1).
            after: where to go, in (0, 1].
            start: the program when nothing was removed.
            now: the program as it is.
        """
        if before == 0 and after == 1:
            return dataclasses.replace(self, steps=1)
        if self.plan is not None:
            raise InvalidInput("plan= says what to remove at once; it can't be gone a part of the way")
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(PruneChannels)}
        if self.target is None and self.scope == "axis":
            return _Portion(**given | {"steps": 1}, whole=_sizes(start), after=after)
        rounding = self.round_to if after == 1 else 1
        if self.target is not None:
            sizes = [COSTS[self.target](Inference(program).run(), {}) for program in (now, start)]
            keep = min(1.0, self._keep**after * sizes[1] / sizes[0])
            return _PortionOfTarget(**given | {"keep": keep, "round_to": rounding, "steps": 1})
        ratio = 1 - (1 - self._share * after) / (1 - self._share * before)
        return dataclasses.replace(self, ratio=ratio, round_to=rounding, steps=1)

    def _widths(
        self, search: Search, shares: Mapping[Axis, float], free: Mapping[Axis, Sequence[Member]]
    ) -> dict[Axis, int]:
        """How many positions of each leaf stay, given the share to remove."""
        return search.widths(shares)

    @property
    def _share(self) -> float:
        """The one ratio of all axes, where there is one."""
        return _HALF if self.ratio is None or isinstance(self.ratio, Mapping) else self.ratio

    @property
    def _ratio(self) -> float | Mapping[str, float]:
        return _HALF if self.ratio is None else self.ratio

    @property
    def _keep(self) -> float:
        return _HALF if self.keep is None else self.keep

    @functools.cached_property
    def _given_plan(self) -> PruningPlan | None:
        """The plan to apply; a file is read once."""
        if self.plan is None or isinstance(self.plan, PruningPlan):
            return self.plan
        if not isinstance(self.plan, (str, Path)):
            raise InvalidInput(f"plan is a {type(self.plan).__name__}; expected a PruningPlan, or the path of one")
        return PruningPlan.load(self.plan)

    def plan_for(self, program: Program, context: Context) -> PruningPlan:
        """Decides which positions would go, as `run` does, and changes nothing.

        Raises:
            InvalidInput: a pattern matches nothing, the target can't be hit, or there are several steps: what goes in
                the second depends on what the first left.
        """
        if self.steps > 1:
            raise InvalidInput("a plan is made in one step; leave steps out, or prune several times")
        inference = Inference(self._prepared(program.lazy_clone(), self._method(context))).run()
        removal, why = self._decide(inference, context)
        return PruningPlan.of(inference, removal, why)

    def removal(self, inference: Inference, context: Context, strict: bool = True) -> Removal:
        """Decides which positions go, and changes nothing.

        Args:
            inference: axes of the program.
            context: data for the criterion.
            strict: whether the target must be hit.

        Raises:
            InvalidInput: a pattern matches nothing, or the target can't be hit.
        """
        return self._decide(inference, context, strict)[0]

    def _decide(
        self, inference: Inference, context: Context, strict: bool = True
    ) -> tuple[Removal, Mapping[Axis, str]]:
        """The positions to remove, and the reason for each axis, in words."""
        if self._given_plan is not None:
            return self._given_plan.removal(inference), {}
        free = self._free(inference, context)
        search = Search(self.scope, self.round_to, self.minimum)
        how: dict[Axis, str]
        if isinstance(self._ratio, Mapping):
            ratios, patterns = self._ratio, self._matched(self._ratio, free, inference.program, context)
            candidates = Candidates(free, self._scores(patterns.chosen, free, inference, context))
            widths = self._widths(search, {leaf: ratios[pattern] for leaf, pattern in patterns.chosen.items()}, free)
            how = {leaf: f"{ratios[pattern]} by '{pattern}'" for leaf, pattern in patterns.chosen.items()}
        elif self.target is None:
            candidates = Candidates(free, self._scores(free, free, inference, context))
            widths = self._widths(search, search.shares(candidates, self._share), free)
            how = dict.fromkeys(free, f"{self._ratio} of {'each' if self.scope == 'axis' else self.scope}")
        else:
            candidates = Candidates(free, self._scores(free, free, inference, context))
            target = Target(self.target, self._keep)
            widths, share = search.hit(candidates, inference, target)
            if strict and not target.is_hit(share):
                hint = search.setting_that_hits(candidates, inference, target)
                raise InvalidInput(
                    f"keep={self._keep} of the {self.target} can't be hit with round_to={self.round_to}, "
                    f"minimum={self.minimum} and scope={self.scope!r}: the nearest possible is {share:.3f}"
                    + (f"; {hint} would hit it" if hint else "")
                )
            how = dict.fromkeys(free, f"{self._keep} of the {self.target}")
        given = self.importance
        named = given if isinstance(given, str) else getattr(given, "__name__", type(resolve(given)).__name__)
        return best_positions(candidates.scores, widths), {leaf: f"{named}, {words}" for leaf, words in how.items()}

    def _free(self, inference: Inference, context: Context) -> dict[Axis, list[Member]]:
        """The free axes of the kinds asked for that run through nothing that is excluded."""
        everything = members(inference)
        for pattern in self.exclude:
            if not any(runs_through(found, pattern) for found in everything.values()):
                context.note(f"exclude: '{pattern}' excludes nothing, since no axis that could go runs through it")
        return {
            leaf: found
            for leaf, found in everything.items()
            if (self.kinds is None or kind(leaf) in self.kinds)
            and not any(runs_through(found, pattern) for pattern in self.exclude)
        }

    def _matched(
        self, ratios: Iterable[str], free: Mapping[Axis, Sequence[Member]], program: Program, context: Context
    ) -> Patterns[Axis]:
        patterns = Patterns(ratios, makers(free, program.graph), "a width to prune")
        patterns.note_overridden(context, "axes")
        return patterns

    def _scores(
        self, leaves: Iterable[Axis], free: Mapping[Axis, Sequence[Member]], inference: Inference, context: Context
    ) -> dict[Axis, torch.Tensor]:
        """Importance of each position of each leaf.

        Raises:
            InvalidInput: the criterion gives anything but one finite number a position.
        """
        scorer = resolve(self.importance).scorer(inference, context)
        scores = {leaf: scorer(leaf, parameters(free[leaf])) for leaf in leaves}
        for leaf, score in scores.items():
            if score.shape != (leaf.size,) or not bool(score.isfinite().all()):
                names = ", ".join(member.name for member in free[leaf][:2])
                raise InvalidInput(f"importance gives NaN, infinity or a wrong number of scores for '{names}'")
        return scores


Place = tuple[str, int, int]
"""Identifies a leaf in any state of the network: the name of a tensor, its dimension, and the leaf's number in it."""


@dataclasses.dataclass(frozen=True)
class _Portion(PruneChannels):
    """Goes a part of the way to the widths that one step would give; the last part reaches them exactly.

    Attributes:
        whole: the size of each leaf when nothing was removed.
        after: the share of the way that this part reaches.
    """

    whole: Mapping[Place, int] = dataclasses.field(default_factory=dict)
    after: float = 1.0

    def _widths(
        self, search: Search, shares: Mapping[Axis, float], free: Mapping[Axis, Sequence[Member]]
    ) -> dict[Axis, int]:
        found = {}
        for leaf, share in shares.items():
            whole = next(self.whole[place] for place in _places(leaf, free[leaf]) if place in self.whole)
            end = search.width(whole, share)
            found[leaf] = min(leaf.size, whole - round((whole - end) * self.after))
        return found


class _PortionOfTarget(PruneChannels):
    """Goes as near to a part of the way to a target as the widths allow."""

    def removal(self, inference: Inference, context: Context, strict: bool = False) -> Removal:
        return super().removal(inference, context, strict=False)


def _places(leaf: Axis, found: Iterable[Member]) -> Iterator[Place]:
    for member in found:
        for index, other in enumerate(member.axes[member.dim].leaves()):
            if other is leaf:
                yield member.name, member.dim, index


def _sizes(program: Program) -> dict[Place, int]:
    """The size of each leaf, under the names that weights have before and after they are folded."""
    folded = program.lazy_clone()
    states = [program, *([folded] if fold_weights(folded, swapped=False) else [])]
    found: dict[Place, int] = {}
    for state in states:
        propagate(state.module)
        for leaf, through in members(Inference(state).run()).items():
            for place in _places(leaf, through):
                found[place] = leaf.size
    return found


def _are_kinds(kinds: object) -> bool:
    return isinstance(kinds, (list, tuple, set, frozenset)) and bool(kinds) and all(kind in KINDS for kind in kinds)


def _cut(program: Program, inference: Inference, removal: Removal, context: Context) -> None:
    """Removes positions; if removal equals zeroing, the outputs with zeros are what the compiler will expect."""
    zero(inference, removal)
    if reasons := {reason for leaf in removal for reason in leaf.inexact}:
        context.note(f"removal is more than zeroing on some axes: {'; '.join(sorted(reasons))}")
        remove(inference, removal)
        return
    expected, numbers = program.run(), drawn(program.module)
    remove(inference, removal)
    if numbers:  # numbers for removed channels are no longer drawn, which shifts the rest
        propagate(program.module)
    if drawn(program.module) == numbers:
        context.expect(expected)
