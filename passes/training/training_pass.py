"""The settings that all passes that train have in common."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_folder
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import check_named
from lobo_fx.passes.training.optimizers import SCHEDULES, MakeOptimizer, MakeSchedule, optimizer_class
from lobo_fx.sources.packages import import_package

__all__ = ["TrainingPass", "is_number"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPass(Pass):
    """A pass that trains; subclasses say what the loss is.

    Training runs on Hugging Face Accelerate: on one process, or on as many as `accelerate launch` starts; if data,
    loss, score or checkpoint fails on one of them, all end with its error. Random numbers of a step depend on the
    step's number alone, so an interrupted training goes on to the same weights.

    Attributes:
        epochs: passes over the training data.
        steps: how many steps to train instead of epochs; needed where the data does not say how long it is.
        learning_rate: the highest learning rate; `auto` finds it by some short trainings on the data at hand.
        optimizer: name of an optimizer of `torch.optim`, or a function of groups of parameters and `lr=`.
        weight_decay: decay of weights, where `optimizer` is no `functools.partial` that gives its own; biases and norms
            have none.
        schedule: `cosine`, `linear` or `constant`, or a function from an optimizer to a `torch.optim.lr_scheduler`.
        warmup: share of the steps in which the rate rises, for schedules by name.
        clip_norm: gradients longer than this are shortened to it; None leaves them.
        accumulate: batches whose gradients are averaged for one step.
        mixed_precision: `no`, `bf16` or `fp16` (on a GPU).
        patience: epochs without a better score after which training ends; needs `evaluate`.
        frozen: patterns of names of modules or parameters that are left as they are.
        checkpoint_dir: folder for checkpoints, from which a killed training goes on; None writes none.
    """

    epochs: int = 3
    steps: int | None = None
    learning_rate: float | Literal["auto"] = "auto"
    optimizer: str | MakeOptimizer = "adamw"
    weight_decay: float = 0.01
    schedule: str | MakeSchedule = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = 1.0
    accumulate: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    patience: int | None = None
    frozen: Sequence[str] = ()
    checkpoint_dir: str | Path | None = None

    promise: ClassVar[Promise] = Promise.APPROXIMATE
    keeps_best: ClassVar[bool] = True  # no setting: whether a pass keeps the weights with the best score, or the last

    def __post_init__(self) -> None:
        import_package("accelerate", "accelerate", extra="train")
        for name, least in {"epochs": 0, "steps": 1, "accumulate": 1, "patience": 1}.items():
            value = getattr(self, name)
            if value is None and name in ("steps", "patience"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInput(f"{name} is {value!r}; it must be a whole number of at least {least}")
        rate = self.learning_rate
        if rate != "auto" and not (is_number(rate) and 0 < float(rate) < math.inf):
            raise InvalidInput(f"learning_rate is {rate!r}; it must be a positive number, or 'auto'")
        if not is_number(self.weight_decay) or self.weight_decay < 0:
            raise InvalidInput(f"weight_decay is {self.weight_decay!r}; it must be a number of at least 0")
        if not is_number(self.warmup) or not 0 <= self.warmup < 1:
            raise InvalidInput(f"warmup is {self.warmup!r}; it must be in [0, 1), a share of the steps")
        if self.clip_norm is not None and not (is_number(self.clip_norm) and self.clip_norm > 0):
            raise InvalidInput(f"clip_norm is {self.clip_norm!r}; it must be a positive number, or None")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise InvalidInput(f"mixed_precision is {self.mixed_precision!r}; it must be no, bf16 or fp16")
        if isinstance(self.optimizer, str):
            optimizer_class(self.optimizer)
        elif not callable(self.optimizer):
            raise InvalidInput(
                f"optimizer is a {type(self.optimizer).__name__}; give a name, or a function that makes one of groups "
                "of parameters and lr=: the parameters are those of the compiled model"
            )
        if isinstance(self.optimizer, functools.partial) and "lr" in self.optimizer.keywords:
            raise InvalidInput("optimizer gives lr of its own: say it as learning_rate=, and leave it out there")
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise InvalidInput(f"schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        if not isinstance(self.schedule, str) and not callable(self.schedule):
            raise InvalidInput(
                f"schedule is a {type(self.schedule).__name__}; give a name, or a function that makes one"
            )
        patterns: object = self.frozen
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise InvalidInput(f"frozen is {patterns!r}; it must be a list of patterns of names")
        if self.checkpoint_dir is not None and not isinstance(self.checkpoint_dir, (str, Path)):
            raise InvalidInput(f"checkpoint_dir is {self.checkpoint_dir!r}; it must be the path of a folder, or None")

    @property
    def needs(self) -> tuple[str, ...]:
        """Data with labels, and a loss; a score where training is to stop by it."""
        return ("train_data", "loss_fn", *["evaluate"] * (self.patience is not None))

    def check(self, program: Program) -> None:
        """Every pattern must match, and the folder for checkpoints must be one."""
        check_named("frozen", self.frozen, program.module)
        if self.checkpoint_dir is not None:
            check_folder(Path(self.checkpoint_dir))


def is_number(value: object) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
