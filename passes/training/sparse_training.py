"""Training that makes channels small before they are removed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.members import Member, members, parameters
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.masks import without_masks
from lobo_fx.graph.program import Program
from lobo_fx.passes.pruning.prune_channels import PruneChannels
from lobo_fx.passes.training.loop import train
from lobo_fx.passes.training.objective import Objective
from lobo_fx.passes.training.training_pass import TrainingPass, is_number
from lobo_fx.recipe import read_value

__all__ = ["SparseTraining"]


@dataclasses.dataclass(frozen=True)
class SparseTraining(TrainingPass):
    """Trains with a penalty on whole channels, heads and groups, so that removing them afterwards costs little.

    Attributes:
        prune: what will be removed afterwards: a `PruneChannels`, its name, or in recipes `{prune_channels: {…}}`.
        penalty: `group_lasso` pulls every free channel towards zero, which the small ones reach; `growing` pulls only
            those that will be removed, ever harder.
        strength: the penalty before anything has shrunk, in units of the loss; `growing` reaches this at the end.

    Source: group lasso: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, section 3.3; growing: Wang
        et al., "Neural Pruning via Growing Regularization", 2021.

    Example:
        ```python
        cut = PruneChannels(0.5)
        chosen = [SparseTraining(cut, epochs=3), cut, FineTune(epochs=3)]
        lobo_fx.compile(model, chosen, example_inputs=images, train_data=labelled, loss_fn=cross_entropy)
        ```
    """

    prune: PruneChannels | str | dict[str, Any] = "prune_channels"
    penalty: Literal["group_lasso", "growing"] = "growing"
    strength: float = 1.0

    keeps_best: ClassVar[bool] = False  # the score falls while channels shrink

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty not in ("group_lasso", "growing"):
            raise InvalidInput(f"penalty is {self.penalty!r}; it must be group_lasso or growing")
        if not is_number(self.strength) or self.strength < 0:
            raise InvalidInput(f"strength is {self.strength!r}; it must be a number of at least 0")
        self._pruning  # noqa: B018  refused here, before any work

    @property
    def _pruning(self) -> PruneChannels:
        found = read_value(self.prune, "prune")
        if not isinstance(found, PruneChannels):
            raise InvalidInput(f"prune is {found}; only PruneChannels removes channels")
        return found

    @property
    def needs(self) -> tuple[str, ...]:
        """What training needs, and the criterion."""
        return tuple(dict.fromkeys((*super().needs, *self._pruning.needs)))

    def run(self, program: Program, context: Context) -> Program:
        inference = Inference(without_masks(program)).run()  # the penalty leaves zeros alone, and masks keep them
        gone = None
        if self.penalty == "growing":
            removal = self._pruning.removal(inference, context)
            gone = {leaf: ~kept for leaf, kept in removal.items()}
        groups = {leaf: parameters(found) for leaf, found in members(inference).items() if gone is None or leaf in gone}
        objective = _Sparse(program.module, groups, gone, self, context)
        train(objective, self, context, lambda: program.lazy_clone().module)
        return program


class _Sparse(Objective):
    """The loss, with a penalty on the positions of axes."""

    def __init__(
        self,
        module: torch.nn.Module,
        groups: dict[Axis, list[Member]],
        gone: dict[Axis, torch.Tensor] | None,
        settings: SparseTraining,
        context: Context,
    ) -> None:
        super().__init__(module, context)
        self.groups, self.gone, self.settings, self.share = groups, gone, settings, 0.0
        # so that a strength of 1 adds 1 to the loss while nothing has shrunk
        with torch.no_grad():
            self.scale = 1 / max(float(self._size()), 1e-12)

    def begin_step(self, share: float) -> None:
        self.share = share

    def forward(self, inputs: Any, labels: Any) -> torch.Tensor:
        strength = self.settings.strength * (self.share if self.gone is not None else 1.0)
        return super().forward(inputs, labels) + strength * self.scale * self._size()

    def _size(self) -> torch.Tensor:
        """Sum of the norms of all positions, or of the squares of those that are to go."""
        total = torch.zeros(())
        for leaf, found in self.groups.items():
            squares = torch.stack([member.along(leaf, member.tensor.square()) for member in found]).sum(0)
            if self.gone is not None:
                total = total + squares[self.gone[leaf]].sum()
            else:
                total = total + (squares + 1e-12).sqrt().sum()
        return total.float()
