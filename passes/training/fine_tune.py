"""Fine-tuning: the compressed model learns from labels again."""

from __future__ import annotations

import dataclasses

from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program
from lobo_fx.passes.training.loop import train
from lobo_fx.passes.training.objective import Objective
from lobo_fx.passes.training.training_pass import TrainingPass

__all__ = ["FineTune"]


@dataclasses.dataclass(frozen=True)
class FineTune(TrainingPass):
    """Trains the model on `train_data` with `loss_fn`, or with the loss that the model itself returns.

    Masks keep their zeros, tied weights stay tied. Where `evaluate` is given, the best weights are kept, those before
    training among them; it should score data that neither `train_data` nor the final test holds.

    Example:
        ```python
        chosen = [PruneChannels(0.5), FineTune(epochs=3)]
        lobo_fx.compile(model, chosen, example_inputs=images, train_data=labelled, loss_fn=cross_entropy)
        ```
    """

    def run(self, program: Program, context: Context) -> Program:
        train(Objective(program.module, context), self, context, lambda: program.lazy_clone().module)
        return program
