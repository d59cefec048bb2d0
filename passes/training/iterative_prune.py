"""Pruning in steps, with training between."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch

from lobo_fx.axes.kept import kept_indices
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass
from lobo_fx.contracts.verification import check_expected
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.facts import KeptIndices
from lobo_fx.graph.masks import masks
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate
from lobo_fx.passes.pruning.prune_channels import PruneChannels
from lobo_fx.passes.training.loop import train
from lobo_fx.passes.training.objective import Objective
from lobo_fx.passes.training.training_pass import TrainingPass
from lobo_fx.recipe import read_value

__all__ = ["Gradual", "IterativePrune", "cut_state"]

# How far the pruning is after a share of the steps.
_PATHS: dict[str, Callable[[float], float]] = {
    "cubic": lambda share: 1 - (1 - share) ** 3,
    "linear": lambda share: share,
}


@runtime_checkable
class Gradual(Protocol):
    """A pass that can go a part of its way."""

    def portion(self, before: float, after: float, start: Program, now: Program) -> Pass:
        """The pass that goes on from the share `before` of the way to the share `after`.

        Args:
            before: where `now` is, in [0, 1).
            after: where to go, in (0, 1].
            start: the program when nothing was done.
            now: the program as it is.
        """


@dataclasses.dataclass(frozen=True)
class IterativePrune(TrainingPass):
    """Prunes in steps and trains after each; the optimizer's moments are cut as the weights are.

    Attributes:
        prune: the pass that prunes: `PruneChannels(…)`, `PruneWeights(…)`, a name, or in recipes `{name: {settings}}`.
        cuts: number of steps.
        path: `cubic` removes much at first and little in the end; `linear` the same in each step.
        epochs: epochs of training after each cut.

    Source: Zhu and Gupta, "To Prune, or Not to Prune", 2017, for the cubic path.

    Example:
        ```python
        IterativePrune(PruneChannels(target="macs", keep=0.5), cuts=4, epochs=1)
        ```
    """

    prune: Pass | str | Mapping[str, Any] = "prune_channels"
    cuts: int = 4
    path: Literal["cubic", "linear"] = "cubic"
    epochs: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.cuts, bool) or not isinstance(self.cuts, int) or self.cuts < 1:
            raise InvalidInput(f"cuts is {self.cuts!r}; it must be a whole number of at least 1")
        if self.path not in tuple(_PATHS):
            raise InvalidInput(f"path is {self.path!r}; it must be one of {', '.join(_PATHS)}")
        if isinstance(self._pruning, PruneChannels) and self._pruning.steps > 1:
            raise InvalidInput(
                f"prune is {self._pruning}, which has steps of its own: leave them out, cuts= says how many"
            )
        if not isinstance(self._pruning, Gradual):
            raise InvalidInput(f"prune is {self._pruning}, which can't go a part of its way: it has no `portion`")

    @functools.cached_property
    def _pruning(self) -> Pass:
        return read_value(self.prune, "prune")

    @property
    def needs(self) -> tuple[str, ...]:
        """What training needs, and the pass that prunes."""
        return tuple(dict.fromkeys((*super().needs, *self._pruning.needs)))

    def check(self, program: Program) -> None:
        super().check(program)
        self._pruning.check(program)
        if self.cuts > 1:
            cast("Gradual", self._pruning).portion(0, 0.5, program, program)

    def run(self, program: Program, context: Context) -> Program:
        if isinstance(self._pruning, PruneChannels) and self._pruning.target is not None:
            self._pruning.plan_for(program, context)  # a target that can't be hit is refused before any training
        start = program.lazy_clone()
        state: dict[str, Any] = {}
        shares = [_PATHS[self.path](cut / self.cuts) for cut in range(self.cuts + 1)]
        interrupted = False
        rate: float | None = None
        for cut in range(self.cuts):
            part = cast("Gradual", self._pruning).portion(shares[cut], shares[cut + 1], start, program)
            before = kept_indices(program.module)
            program = part.run(program, dataclasses.replace(context, evaluate=None))
            propagate(program.module)
            check_expected(self, program, context)
            if interrupted:
                continue  # no training, and no checkpoint: another run, which completes this cut, could not use it
            state = _masked(cut_state(state, before, kept_indices(program.module)), program)
            loop = train(
                Objective(program.module, context),
                self,
                context,
                functools.partial(_copy_of, program),
                {f"module.{name}": entry for name, entry in state.items()},
                f"cut {cut + 1} of {self.cuts}",
                rate,
            )
            rate = loop.trained.rate
            if loop.trained.interrupted:
                interrupted = True
                if cut + 1 < self.cuts:
                    context.note(f"{self.name}: cuts {cut + 2} to {self.cuts} were made without training")
                continue
            state = {name.removeprefix("module."): entry for name, entry in loop.optimizer_moments().items()}
        return program


def _copy_of(program: Program) -> torch.nn.Module:
    return program.lazy_clone().module


def _masked(state: Mapping[str, Any], program: Program) -> dict[str, Any]:
    """An optimizer's state with zeros for masked weights, which other moments would move away from zero."""
    known = masks(program)

    def kept(name: str, value: Any) -> Any:
        alike = isinstance(value, torch.Tensor) and name in known and value.shape == known[name].shape
        return value * known[name] if alike else value

    return {name: {key: kept(name, value) for key, value in entries.items()} for name, entries in state.items()}


def cut_state(state: Mapping[str, Any], before: KeptIndices, after: KeptIndices) -> dict[str, Any]:
    """An optimizer's state after positions of its parameters were removed: moments lose the same positions.

    Args:
        state: by name of a parameter, entries by name. Entries of size 1 along a dimension (Adafactor's means over
            rows and columns) are not cut there.
        before: positions of the original parameters that were kept before.
        after: positions that are kept now.
    """

    def positions(name: str, dim: int, now: Sequence[int]) -> torch.Tensor:
        then = before.get(name, {}).get(dim)
        where = {index: at for at, index in enumerate(then)} if then is not None else None
        return torch.tensor([index if where is None else where[index] for index in now])

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        for dim, now in after.get(name, {}).items():
            if before.get(name, {}).get(dim) != now and value.shape[dim] > 1:
                value = value.index_select(dim, positions(name, dim, now))
        return value

    return {name: {key: cut(name, value) for key, value in entries.items()} for name, entries in state.items()}
