"""Structured pruning: whole channels, heads and groups leave the network, wherever they run through it."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lobo_fx.axes import KINDS, Axis, Inference, kind
from lobo_fx.axes.cost import COSTS
from lobo_fx.axes.kept import kept_indices
from lobo_fx.axes.members import Member, members
from lobo_fx.axes.removal import Removal
from lobo_fx.axes.surgery import remove, zero
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise, exact_tolerance
from lobo_fx.errors import ContractError, InvalidInput, suggestion
from lobo_fx.graph.layers import weight_uses
from lobo_fx.graph.masks import strip_masks
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import check_patterns, module_name
from lobo_fx.graph.shapes import propagate
from lobo_fx.measures.fidelity import largest_error
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.pruning.compensation import METHODS, fit
from lobo_fx.passes.pruning.criteria import Criterion, Elementwise, resolve
from lobo_fx.passes.pruning.plan import PruningPlan
from lobo_fx.passes.pruning.widths import (
    Widths,
    best_positions,
    likeness,
    modules_above,
    parameters,
    specificity,
)

__all__ = ["SCOPES", "TARGET_TOLERANCE", "PruneChannels"]

SCOPES = ("axis", "global", "isomorphic")
TARGET_TOLERANCE = 0.02
_HALF = 0.5
"""What `ratio` and `keep` are where they are left out."""
_MOST_TRIED = 1000
"""Widths tried to hit a target."""


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
        importance: a criterion's name (`lobo_fx.passes.pruning.criteria.CRITERIA`), a criterion such as
            `Consensus(["l1", "taylor"])`, or a function that scores each element of a parameter.
        scope: `axis` removes the share from each axis; `global` ranks all axes together, each divided by its
            mean; `isomorphic` ranks together the axes that run through the same kinds of parameters.
        target: `macs`, `parameters` or `file_size`: chooses the ratio so that the share `keep` of them stays.
        keep: share of `target` that stays, in (0, 1], 0.5 where left out; hit within 2 %.
        kinds: the kinds of axes to prune (`lobo_fx.axes.KINDS`); None prunes every kind.
        steps: in how many steps to get there; importance is scored anew, and what stays fitted anew, in each.
        exclude: patterns of names of modules or parameters; an axis that runs through one of them stays whole.
        plan: a `PruningPlan`, or the file of one: what to remove was decided before, and nothing else says how much.
        round_to: widths that stay are multiples of this, where the axis is at least twice as wide: the
            elements of a vector register, 8 for float32, 16 where the result will be quantized to int8.
        minimum: no axis gets narrower.
        compensation: what is fitted to calibration data after removal, so that the outputs stay near the
            original's: `none`, `recalibrate` (batch norms), `bias` (and biases), `reconstruct` (and weights, by
            least squares); `auto` is `reconstruct` where calibration data is given, else `none`.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, for the problem; "Isomorphic Pruning
        for Vision Models", 2024, for the scope of that name.
    """

    ratio: float | Mapping[str, float] | None = None
    importance: str | Criterion | Elementwise = "l2"
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
        if isinstance(self.ratio, Mapping) and not (self.ratio and all(isinstance(name, str) for name in self.ratio)):
            raise InvalidInput("ratio maps patterns of module names to shares; it names none")
        if self.target and self.ratio is not None:
            raise InvalidInput(f"target={self.target!r} chooses the ratio itself; leave ratio out, keep= says how much")
        if not self.target and self.keep is not None:
            raise InvalidInput("keep says how much of a target stays; give target= too, or ratio= alone")
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise InvalidInput(f"exclude is {self.exclude!r}; it must be a list of patterns of names")
        if self.plan is not None:
            given = [name for name in self.settings if name not in ("plan", "compensation")]
            if given:
                raise InvalidInput(f"plan= says what to remove; leave out {', '.join(given)}")
            self._loaded_plan()
        for name in ("steps", "round_to", "minimum"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the criterion and the compensation need."""
        fitted = ("calibration_data",) if self.compensation not in ("auto", "none") else ()
        return tuple(dict.fromkeys((*resolve(self.importance).needs, *fitted)))

    def check(self, program: Program) -> None:
        """Every pattern must match a module; whether that has a width to prune may be up to the passes before."""
        if isinstance(self.ratio, Mapping):
            check_patterns(self.ratio, program.graph)
        names = {name for name, _ in program.module.named_parameters()}
        names |= {module_name(node) for node in program.graph.nodes} - {""}
        for pattern in self.exclude:
            if not fnmatch.filter(names, pattern):
                raise InvalidInput(f"exclude: '{pattern}' matches no module or parameter; {suggestion(pattern, names)}")

    def run(self, program: Program, context: Context) -> Program:
        method = self._method(context)
        program = self._prepared(program, method)
        original = program if method == "none" else program.clone()
        inference = Inference(program).run()
        for operator, where in inference.unknown.items():
            context.note(f"{operator} has no axis rule, so what it touches keeps its size: {where}")
        whole = {name: cost(inference, {}) for name, cost in COSTS.items() if name == self.target}
        if whole and self.steps > 1:  # refused before any work
            dataclasses.replace(self, steps=1).removal(inference, context)
        for step in range(1, self.steps + 1):
            if step > 1:
                propagate(program.module)
                inference = Inference(program).run()
            part = self._part(step, inference, whole)
            removal = part.removal(inference, context, strict=self.steps == 1)
            if not removal:
                continue
            _cut(program, inference, removal, context)
            if method != "none" or step < self.steps:
                self._check_removal(program, context)
            if method != "none":
                fit(program, original, context, method)
        if not kept_indices(program.module):
            context.note("prune_channels found nothing to remove")
        return program

    def _method(self, context: Context) -> str:
        if self.compensation != "auto":
            return self.compensation
        return "none" if context.calibration_data is None else "reconstruct"

    def _prepared(self, program: Program, method: str) -> Program:
        """Masks become plain zeros, and weights that refitting needs stored are."""
        strip_masks(program)
        if method != "none" and fold_weights(program, swapped=False):
            propagate(program.module)
        return program

    def _part(self, step: int, inference: Inference, whole: Mapping[str, int]) -> PruneChannels:
        """What to do in one step: equal shares of the way, and the widths rounded in the last."""
        if self.steps == 1:
            return self
        before, after = (step - 1) / self.steps, step / self.steps

        def share(ratio: float) -> float:
            return 1 - (1 - ratio * after) / (1 - ratio * before)

        ratio, keep = self._ratio, self.keep
        if self.target is not None:
            keep = self._keep
            now = COSTS[self.target](inference, {}) / whole[self.target]
            keep = min(1.0, keep**after / now)
        else:
            ratio = {k: share(v) for k, v in ratio.items()} if isinstance(ratio, Mapping) else share(ratio)
        rounding = self.round_to if step == self.steps else 1
        chosen = None if self.target is not None else ratio
        return dataclasses.replace(self, ratio=chosen, keep=keep, round_to=rounding, steps=1)

    @property
    def _ratio(self) -> float | Mapping[str, float]:
        return _HALF if self.ratio is None else self.ratio

    @property
    def _keep(self) -> float:
        return _HALF if self.keep is None else self.keep

    def _loaded_plan(self) -> PruningPlan:
        if isinstance(self.plan, PruningPlan):
            return self.plan
        if not isinstance(self.plan, (str, Path)):
            raise InvalidInput(f"plan is a {type(self.plan).__name__}; expected a PruningPlan, or the path of one")
        return PruningPlan.load(self.plan)

    def plan_for(self, program: Program, context: Context) -> PruningPlan:
        """Decides what would go, as `run` does, and touches nothing.

        Raises:
            InvalidInput: a pattern matches nothing, the target can't be hit, or there are several steps: what goes in
                the second depends on what the first left.
        """
        if self.steps > 1:
            raise InvalidInput("a plan is made in one step; leave steps out, or prune several times")
        inference = Inference(self._prepared(program.clone(), self._method(context))).run()
        removal = self.removal(inference, context)
        named = self.importance if isinstance(self.importance, str) else type(self.importance).__name__
        how = (
            f"{self.target} to {self._keep}" if self.target else "by pattern" if self.ratio is not None else f"{_HALF}"
        )
        how = how if self.target or not isinstance(self.ratio, float) else f"{self.ratio} of each"
        return PruningPlan.of(inference, removal, dict.fromkeys(removal, f"{named}, scope {self.scope}, {how}"))

    def removal(self, inference: Inference, context: Context, strict: bool = True) -> Removal:
        """Decides what goes, and touches nothing.

        Args:
            inference: axes of the program.
            context: data for the criterion.
            strict: whether the target must be hit.

        Raises:
            InvalidInput: a pattern matches nothing, or the target can't be hit.
        """
        if self.plan is not None:
            return self._loaded_plan().removal(inference)
        everything = members(inference)
        free = {leaf: found for leaf, found in everything.items() if self._may_go(leaf, found)}
        for pattern in self.exclude:
            if not any(_runs_through(found, pattern) for found in everything.values()):
                context.note(f"exclude: '{pattern}' excludes nothing, since no axis that could go runs through it")
        ratio = self._ratio
        chosen = self._by_pattern(ratio, free, inference, context) if isinstance(ratio, Mapping) else None
        scorer = resolve(self.importance).scorer(inference, context)
        scores = {
            leaf: scorer(leaf, parameters(found)) for leaf, found in free.items() if chosen is None or leaf in chosen
        }
        for leaf, score in scores.items():
            if score.shape != (leaf.size,) or not bool(score.isfinite().all()):
                names = ", ".join(member.name for member in free[leaf][:2])
                raise InvalidInput(f"importance gives NaN, infinity or a wrong number of scores for '{names}'")
        if chosen is not None:
            return best_positions(scores, self._widths(chosen))
        if self.target is None:
            assert isinstance(ratio, (int, float))
            return best_positions(scores, self._widths(self._shares(scores, free, ratio)))
        widths, share = self._hit(inference, scores, free)
        if strict and not self._is_hit(share):
            raise InvalidInput(
                f"keep={self._keep} of the {self.target} can't be hit with round_to={self.round_to}, "
                f"minimum={self.minimum} and scope={self.scope!r}: the nearest possible is {share:.3f}"
                f"{self._what_would_hit(inference, scores, free)}"
            )
        return best_positions(scores, widths)

    def _is_hit(self, share: float) -> bool:
        return abs(share - self._keep) <= TARGET_TOLERANCE * self._keep

    def _what_would_hit(
        self, inference: Inference, scores: Mapping[Axis, torch.Tensor], free: Mapping[Axis, Sequence[Member]]
    ) -> str:
        """The first setting that would hit the target, as words for the message; empty where none would."""
        for name, value in (("round_to", 1), ("minimum", 1), ("scope", "global"), ("scope", "axis")):
            if getattr(self, name) != value:
                changed: dict[str, Any] = {name: value}
                other = dataclasses.replace(self, **changed)
                if other._is_hit(other._hit(inference, scores, free)[1]):
                    return f"; {name}={value!r} would hit it"
        return ""

    def _may_go(self, leaf: Axis, found: Sequence[Member]) -> bool:
        """Whether an axis is of the kinds asked for, and runs through nothing that is excluded."""
        if self.kinds is not None and kind(leaf) not in self.kinds:
            return False
        return not any(_runs_through(found, pattern) for pattern in self.exclude)

    def _hit(
        self, inference: Inference, scores: Mapping[Axis, torch.Tensor], free: Mapping[Axis, Sequence[Member]]
    ) -> tuple[Widths, float]:
        """The widths whose cost comes nearest to the target, and the share that they keep.

        One ratio for all axes is bisected first. Since all axes step to their next widths at once, the nearest such
        widths are then improved by moving single axes, those widths first that are nearest to the target.
        """
        assert self.target is not None
        keep = self._keep

        def widths_at(ratio: float) -> Widths:
            return self._widths(self._shares(scores, free, ratio))

        cost = COSTS[self.target]
        whole = cost(inference, {})
        best: tuple[float, float, Widths] = (math.inf, 1.0, {})

        def try_out(widths: Widths) -> float:
            """The share that these widths keep; remembered where it is nearer than any before."""
            nonlocal best
            share = cost(inference, best_positions(scores, widths)) / whole
            best = min(best, (abs(share - keep), share, widths), key=lambda entry: entry[0])
            return share

        low, high = 0.0, 1.0
        try_out(widths_at(high))
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if try_out(widths_at(middle)) > keep else (low, middle)
        frontier, seen = [best], {tuple(best[2].values())}
        while frontier and best[0] > TARGET_TOLERANCE * keep / 2 and len(seen) < _MOST_TRIED:
            _, _, widths = frontier.pop(min(range(len(frontier)), key=lambda at: frontier[at][0]))
            for leaf, change in itertools.product(widths, (-1, 1)):
                unit = self.round_to if leaf.size >= 2 * self.round_to else 1
                moved = widths | {leaf: widths[leaf] + change * unit}
                allowed = max(self.minimum, unit) <= moved[leaf] <= leaf.size
                if allowed and tuple(moved.values()) not in seen:
                    seen.add(tuple(moved.values()))
                    share = try_out(moved)
                    frontier.append((abs(share - keep), share, moved))
        return best[2], best[1]

    def _widths(self, shares: Mapping[Axis, float]) -> Widths:
        """How many positions of each leaf stay, given the share to remove."""
        return {leaf: self._width(leaf.size, share) for leaf, share in shares.items()}

    def _shares(
        self, scores: Mapping[Axis, torch.Tensor], free: Mapping[Axis, Sequence[Member]], ratio: float
    ) -> dict[Axis, float]:
        """The share to remove from each leaf."""
        if self.scope == "axis":
            return dict.fromkeys(scores, ratio)
        ranked: dict[object, list[Axis]] = defaultdict(list)
        for leaf in scores:
            ranked["all" if self.scope == "global" else likeness(free[leaf])].append(leaf)
        shares: dict[Axis, float] = {}
        for leaves in ranked.values():
            scaled = {leaf: scores[leaf] / scores[leaf].mean().clamp_min(1e-300) for leaf in leaves}
            threshold = torch.cat(list(scaled.values())).quantile(ratio) if ratio else -math.inf
            shares |= {leaf: float((score < threshold).double().mean()) for leaf, score in scaled.items()}
        return shares

    def _check_removal(self, program: Program, context: Context) -> None:
        """Compares removal with zeroing now: fitting moves the outputs on purpose."""
        outputs = program.run()
        for expected in context.expected:
            error = largest_error(expected, outputs)
            if error > exact_tolerance(outputs):
                raise ContractError(f"{self}: removing differs from zeroing by {error:.1e} of the output range")
        context.expected.clear()

    def _width(self, size: int, ratio: float) -> int:
        """How many positions of an axis stay."""
        if not ratio:
            return size
        stay = size * (1 - ratio)
        if size >= 2 * self.round_to:
            stay = max(self.round_to, self.round_to * math.floor(stay / self.round_to + 0.5))
        return min(size, max(self.minimum, 1, round(stay)))

    def _by_pattern(
        self,
        ratios: Mapping[str, float],
        free: Mapping[Axis, Sequence[Member]],
        inference: Inference,
        context: Context,
    ) -> dict[Axis, float]:
        """The share to remove from the output widths of the modules matched, by the most specific pattern."""
        outputs = {str(u.read.target): u.output_dim for n in inference.program.graph.nodes for u in weight_uses(n)}
        makers = {
            leaf: {m.name.rpartition(".")[0] for m in found if m.dim == outputs.get(m.name, 0)}
            for leaf, found in free.items()
        }
        chosen: dict[Axis, float] = {}
        overridden: dict[tuple[str, str], int] = defaultdict(int)
        for leaf, modules in makers.items():
            matching = sorted((p for p in ratios if fnmatch.filter(modules, p)), key=specificity, reverse=True)
            if matching:
                chosen[leaf] = ratios[matching[0]]
            for other in matching[1:]:
                overridden[other, matching[0]] += 1
        names = set().union(*makers.values())
        for pattern in ratios:
            if not any(fnmatch.filter(modules, pattern) for modules in makers.values()):
                raise InvalidInput(f"'{pattern}' matches no module with a width to prune; {suggestion(pattern, names)}")
        for (pattern, winner), count in overridden.items():
            context.note(f"'{pattern}' is overridden by '{winner}', which is more specific, on {count} axes")
        return chosen


def _runs_through(found: Sequence[Member], pattern: str) -> bool:
    """Whether an axis runs through a parameter of this name, or of a module of this name."""
    names = {name for member in found for name in (member.name, *modules_above(member.name))}
    return bool(fnmatch.filter(names, pattern))


def _are_kinds(kinds: object) -> bool:
    return isinstance(kinds, (list, tuple, set, frozenset)) and bool(kinds) and all(kind in KINDS for kind in kinds)


def _cut(program: Program, inference: Inference, removal: Removal, context: Context) -> None:
    """Removes positions, and says what the outputs must then be where that is known."""
    zero(inference, removal)
    if reasons := {reason for leaf in removal for reason in leaf.inexact}:
        context.note(f"removal is more than zeroing on some axes: {'; '.join(sorted(reasons))}")
    else:
        context.expect(program.run())
    remove(inference, removal)
