"""The settings that a search reads of `FitGoal`, as a protocol, since `FitGoal` imports the search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from lobo_fx.contracts.passbase import Pass
from lobo_fx.goal import Goal
from lobo_fx.passes.goal.plan import GoalPlan
from lobo_fx.passes.quantization.quantize_static import QuantizeStatic

__all__ = ["Settings"]


class Settings(Protocol):
    """The settings of `FitGoal` as a search reads them; see there."""

    @property
    def goal(self) -> Goal: ...
    @property
    def precision(self) -> str: ...
    @property
    def kinds(self) -> Sequence[str] | None: ...
    @property
    def exclude(self) -> Sequence[str]: ...
    @property
    def low_rank(self) -> bool: ...
    @property
    def round_to(self) -> int: ...
    @property
    def moves(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def costs(self) -> str | None: ...
    @property
    def target(self) -> str: ...
    @property
    def quantizing(self) -> QuantizeStatic: ...

    def excludes(self, names: Iterable[str]) -> bool:
        """Whether a parameter of these names is to stay as it is."""

    def applying(self, plan: GoalPlan) -> Pass:
        """The pass that carries out a plan, for the same machine."""
