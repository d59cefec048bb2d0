"""A narrower copy of the model, to be trained by its teacher."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.contracts.verification import check_expected
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.program import Program
from lobo_fx.passes.pruning.criteria import Importance
from lobo_fx.passes.pruning.prune_channels import PruneChannels
from lobo_fx.passes.training.initialisation import initialise

__all__ = ["Student"]


@dataclasses.dataclass(frozen=True)
class Student(Pass):
    """Cuts every free axis to a share of its width: a student of the same architecture, for `Distill` to train.

    Attributes:
        width: share of every axis that stays, in (0, 1]; half where neither this nor `parameters` is given.
        parameters: instead of `width`, share of the parameters that stays.
        start: `kept` begins with the channels that matter most, refitted where calibration data is given; `fresh` with
            weights drawn anew.
        importance: the criterion of which channels matter most, see `PruneChannels`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; that a student starts from the
        teacher's own weights: Sanh et al., "DistilBERT", 2019, section 2.

    Example:
        ```python
        chosen = [Student(width=0.25), Distill(epochs=10)]
        lobo_fx.compile(model, chosen, example_inputs=images, train_data=unlabelled)
        ```
    """

    width: float | None = None
    parameters: float | None = None
    start: Literal["kept", "fresh"] = "kept"
    importance: Importance = "l2"

    promise: ClassVar[Promise] = Promise.MASKED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None and self.parameters is not None:
            raise InvalidInput("width and parameters both say how much stays; give one")
        for name in ("width", "parameters"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1
            ):
                raise InvalidInput(f"{name} is {value!r}; it must be in (0, 1], the share that stays")
        self._cut  # noqa: B018  refuses a wrong importance

    @property
    def _cut(self) -> PruneChannels:
        compensation = "auto" if self.start == "kept" else "none"
        how = {"importance": self.importance, "round_to": 1, "compensation": compensation}
        if self.parameters is not None:
            return PruneChannels(target="parameters", keep=self.parameters, **how)  # type: ignore[arg-type]
        return PruneChannels(ratio=1 - (self.width or 0.5), **how)  # type: ignore[arg-type]

    @property
    def needs(self) -> tuple[str, ...]:
        """What the criterion needs."""
        return self._cut.needs

    def run(self, program: Program, context: Context) -> Program:
        program = self._cut.run(program, context)
        if self.start == "fresh":
            check_expected(self, program, context)
            initialise(program, context.generator())
        return program
