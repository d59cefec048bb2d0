"""Low-rank factorization: a large layer becomes two layers that are smaller together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import fx

from lobo_fx.axes import Inference
from lobo_fx.axes.cost import COSTS
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.layers import Layer
from lobo_fx.graph.masks import mask_weight, masks, strip_masks
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import check_named, check_patterns
from lobo_fx.graph.running import watch
from lobo_fx.graph.shapes import propagate
from lobo_fx.measures.counts import rows
from lobo_fx.passes.fitting.linear_problem import count_rows
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.low_rank.candidates import Candidate, find_candidates, spectra
from lobo_fx.passes.low_rank.lowering import lower, split_layers
from lobo_fx.passes.low_rank.ranks import Option, best_within, options
from lobo_fx.passes.low_rank.refit import LowRankFit
from lobo_fx.passes.pruning.compensation import METHODS, compensate
from lobo_fx.passes.pruning.search import TARGET_TOLERANCE, Patterns, Search, Target
from lobo_fx.passes.pruning.widths import is_named
from lobo_fx.report.records import Sheet

__all__ = ["Factorize", "factorize"]

_QUARTER = 0.25
"""Default of `rank`: at a quarter of the full rank, a square layer becomes half as large."""
_HALF = 0.5
"""Default of `keep`."""


@dataclasses.dataclass(frozen=True)
class Factorize(Pass):
    """Replaces a linear layer or a pointwise convolution by two layers of a lower rank that are smaller together.

    Before: `linear(x, W[512, 512], b)`. After: `linear(linear(x, W_down[64, 512]), W_up[512, 64], b)`. Of a
    convolution, the first layer takes the stride and the padding. `fc.weight` becomes `fc.down.weight` and
    `fc.up.weight`. The rank is an axis like others: `PruneChannels` may cut it afterwards.

    With calibration data, the nearest weight of a rank is the one that changes the layer's outputs least. Every layer
    is then fitted to the original layer's outputs, given the inputs that it gets in the factorized network. A share of
    the data is held out: plain singular values, or no refitting, are taken where they come within half a decibel of
    the best on it. Without data, plain singular values are taken.

    Left alone, with the reason in the report: layers that two factors would not make smaller (so the full rank stays
    exact), convolutions with larger windows or several groups, and weights that other operators read. A weight that
    several layers share is factorized once.

    Attributes:
        rank: share of the full rank that stays, in (0, 1], 0.25 where nothing else says how much; or shares by pattern
            of module names (`{"layers.*.fc1": 0.3}`), where other layers stay whole. Of several patterns that match,
            the most specific counts, as in `PruneChannels`.
        decibels: gives each layer the lowest rank at which its outputs, less their mean, have this signal-to-noise
            ratio on calibration data; without data, the lowest rank at which its weight has it.
        target: `macs`, `parameters` or `file_size`: chooses the ranks so that the share `keep` of them stays, and the
            relative errors of the layers' outputs, summed over all layers, are least.
        keep: share of `target` that stays in the whole model, in (0, 1], 0.5 where left out; hit within 2 %.
        exclude: patterns of names of modules or parameters that stay whole.
        round_to: ranks are multiples of this, where the full rank is at least twice as high.
        compensation: what is fitted to calibration data: `none`, `recalibrate` (batch norms), `bias` (and biases),
            `reconstruct` (and weights); `auto` is `reconstruct` where calibration data is given, else `none`.

    Source: see `lobo_fx.passes.low_rank.spectrum`, `lobo_fx.passes.low_rank.refit`.
    """

    rank: float | Mapping[str, float] | None = None
    decibels: float | None = None
    target: str | None = None
    keep: float | None = None
    exclude: Sequence[str] = ()
    round_to: int = 8
    compensation: str = "auto"

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("rank", "decibels", "target") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInput(f"{' and '.join(given)} each say how much stays; give one of them")
        shares = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        for share in shares if self.rank is not None else ():
            if not _is_share(share):
                raise InvalidInput(f"rank is {share!r}; it must be in (0, 1], the share of the full rank that stays")
        if isinstance(self.rank, Mapping) and not (self.rank and all(isinstance(name, str) for name in self.rank)):
            raise InvalidInput("rank maps patterns of module names to shares; it names none")
        if self.decibels is not None and (not isinstance(self.decibels, (int, float)) or not self.decibels > 0):
            raise InvalidInput(f"decibels is {self.decibels!r}; it must be above 0, the ratio of signal to noise")
        choices = {"target": (None, *COSTS), "compensation": ("auto", *METHODS)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(str, known))}")
        if self.keep is not None and not _is_share(self.keep):
            raise InvalidInput(f"keep is {self.keep!r}; it must be in (0, 1], the share of the target that stays")
        if not self.target and self.keep is not None:
            raise InvalidInput("keep says how much of a target stays; give target= too, or rank= alone")
        listed = isinstance(self.exclude, Sequence) and not isinstance(self.exclude, (str, bytes))
        if not listed or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise InvalidInput(f"exclude is {self.exclude!r}; it must be a list of patterns of names")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise InvalidInput(f"round_to is {self.round_to!r}; it must be a whole number of at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data where a compensation that fits to it is named."""
        return ("calibration_data",) if self.compensation not in ("auto", "none") else ()

    def check(self, program: Program) -> None:
        """Every pattern must match a module; whether that can be factorized may be up to the passes before."""
        if isinstance(self.rank, Mapping):
            check_patterns(self.rank, program.graph)
        check_named("exclude", self.exclude, program.module)

    def run(self, program: Program, context: Context) -> Program:
        if fold_weights(program, swapped=False):
            propagate(program.module)
        masked = {name: mask.clone() for name, mask in masks(program).items()}
        strip_masks(program)
        candidates = [one for one in find_candidates(program, context) if not is_named(one.names, self.exclude)]
        ranks = self._ranks(candidates, program, context)
        chosen = [one for one in candidates if ranks.get(one.name, one.shape.full) < one.shape.full]
        if chosen:
            program = factorize(program, chosen, ranks, context, self.compensation, masked)
        else:
            context.note("factorize found no layer that two would make smaller")
        for name, mask in masked.items():
            if any(name in one.names for one in chosen):
                context.note("loses its mask: what two factors give has no zeros", parameter=name)
            else:
                mask_weight(program, name, mask)
        return program

    def _ranks(self, candidates: Sequence[Candidate], program: Program, context: Context) -> dict[str, int]:
        """The rank of each weight that is to have a lower one, by name; the others are noted."""
        if self.target is not None:
            return self._hit(candidates, self.target, program, context)
        if self.decibels is not None:
            found = {one.name: found for one, found in spectra(program, candidates, context)}
            wanted = {one.name: self._rounded_up(one, found[one.name].rank_for(self.decibels)) for one in candidates}
        else:
            shares = self._shares(candidates, context)
            search = Search("axis", self.round_to, 1)
            wanted = {
                one.name: search.width(one.shape.full, 1 - shares[one.name]) for one in candidates if one.name in shares
            }
        for one in candidates:
            if wanted.get(one.name, 0) > one.shape.highest:
                context.note(
                    f"is left alone: two layers of rank {wanted.pop(one.name)} are no smaller than one of "
                    f"{one.shape.outputs} by {one.shape.inputs}; up to {one.shape.highest} they are",
                    parameter=one.name,
                )
        return wanted

    def _rounded_up(self, candidate: Candidate, rank: int) -> int:
        step = self.round_to if candidate.shape.full >= 2 * self.round_to else 1
        return min(candidate.shape.full, -(-rank // step) * step)

    def _shares(self, candidates: Sequence[Candidate], context: Context) -> dict[str, float]:
        """The share of the full rank that stays, by name of the weight."""
        if not isinstance(self.rank, Mapping):
            return dict.fromkeys((one.name for one in candidates), _QUARTER if self.rank is None else self.rank)
        modules = {one.name: [name.rpartition(".")[0] for name in one.names] for one in candidates}
        patterns = Patterns(self.rank, modules, "a weight that could be two")
        patterns.note_overridden(context, "layers")
        return {name: self.rank[pattern] for name, pattern in patterns.chosen.items()}

    def _hit(self, candidates: Sequence[Candidate], target: str, program: Program, context: Context) -> dict[str, int]:
        """The ranks that hit a target.

        Raises:
            InvalidInput: none do.
        """
        whole = COSTS[target](Inference(program).run(), {})
        if not whole:
            raise InvalidInput(f"target={target!r}: the model has none, so no share of it can be kept")
        wanted = Target(target, _HALF if self.keep is None else self.keep)
        costs = _costs(program, candidates, target)
        found = {one.name: found for one, found in spectra(program, candidates, context)}
        rest = whole - sum(costs.values())

        def nearest(step: int) -> tuple[dict[str, Option], float]:
            """Options that keep at most the wanted share, or up to the tolerance more if that misses; the share."""
            choices = {one.name: options(one.shape, found[one.name], costs[one.name], step) for one in candidates}
            for slack in (1.0, 1 + TARGET_TOLERANCE):
                chosen = best_within(choices, slack * wanted.keep * whole - rest)
                share = (rest + sum(one.cost for one in chosen.values())) / whole
                if wanted.is_hit(share):
                    break
            return chosen, share

        chosen, share = nearest(self.round_to)
        if not wanted.is_hit(share):
            why = f", since layers that can be two have {sum(costs.values()) / whole:.3f} of them" if rest else ""
            raise InvalidInput(
                f"keep={wanted.keep} of the {target} can't be hit with round_to={self.round_to}: the nearest possible "
                f"is {share:.3f}{why}" + ("; round_to=1 would hit it" if wanted.is_hit(nearest(1)[1]) else "")
            )
        for one in candidates:
            if chosen[one.name].rank == one.shape.full:
                small = one.shape.highest < self._rounded_up(one, 1)
                why = "no rank makes two layers smaller" if small else "it loses most for what it would save"
                context.note(f"is left alone: {why}", parameter=one.name)
        return {name: one.rank for name, one in chosen.items()}


def factorize(
    program: Program,
    chosen: Sequence[Candidate],
    ranks: Mapping[str, int],
    context: Context,
    compensation: str = "auto",
    fixed: Collection[str] = (),
) -> Program:
    """Replaces each chosen layer by two and fits them to calibration data; returns the program or a copy.

    Args:
        program: masks are part of its weights.
        chosen: candidates of this program.
        ranks: ranks by name of the candidate, lower than full.
        context: calibration data and notes.
        compensation: as in `Factorize`.
        fixed: names of weights that no fit may change.
    """
    if compensation == "auto":
        compensation = "none" if context.calibration_data is None else "reconstruct"
    original = program if compensation == "none" else program.lazy_clone()
    wholes = lower(program, chosen, ranks)
    if compensation == "none":
        context.note("ranks were lowered by plain singular values: no calibration data says what matters")
    else:
        bounds = {name: ranks[one.name] for one in chosen for name in one.names}
        fit = functools.partial(LowRankFit, ranks=bounds, wholes=wholes, fixed=set(fixed) - bounds.keys())
        compensated = compensate(program, original, context, compensation, fit)
        program = compensated.program
        context.note(compensated.remark)
        context.sheets.extend([compensated.sheet] if compensated.sheet else [])
    split_layers(program, chosen, ranks)
    context.sheets.append(_sheet(chosen, ranks))
    return program


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value <= 1


def _costs(program: Program, candidates: Sequence[Candidate], target: str) -> dict[str, float]:
    """What each weight costs as it is."""
    if target != "macs":
        return {
            one.name: one.weight.numel() * (one.weight.element_size() if target == "file_size" else 1)
            for one in candidates
        }
    counts: dict[fx.Node, int] = {}

    def see(layer: Layer, value: torch.Tensor) -> None:
        counts[layer.node] = count_rows(layer, value)

    watchers = {layer.node: functools.partial(see, layer) for one in candidates for layer in one.layers}
    watch(program.module, [program.example_inputs], watchers)
    per_row = rows(program)
    return {
        one.name: sum(counts[layer.node] for layer in one.layers) * one.weight.numel() / per_row for one in candidates
    }


def _sheet(chosen: Sequence[Candidate], ranks: Mapping[str, int]) -> Sheet:
    found = []
    for one in chosen:
        rank, shape = ranks[one.name], one.shape
        found.append((one.name, rank, shape.full, round(shape.share(rank), 3)))
    return Sheet("ranks", ("weight", "rank", "full rank", "share that stays"), tuple(found))
