"""Training on quantized values, so that weights and ranges settle where integers are."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.masks import masks
from lobo_fx.graph.operators import arguments, aten, set_argument
from lobo_fx.graph.program import Program, ProgramModule
from lobo_fx.passes.quantization.integers.calibration import calibrate, convert, prepare
from lobo_fx.passes.quantization.integers.rounding import even_floating
from lobo_fx.passes.quantization.integers.storing import store_rest
from lobo_fx.passes.quantization.quantize_static import QuantizeStatic
from lobo_fx.passes.training.loop import train
from lobo_fx.passes.training.objective import Objective
from lobo_fx.passes.training.training_pass import TrainingPass, is_number
from lobo_fx.recipe import build

__all__ = ["QuantizationAwareTraining"]


@dataclasses.dataclass(frozen=True)
class QuantizationAwareTraining(TrainingPass):
    """`QuantizeStatic` with training between preparing and converting: values are rounded as integers would be.

    Batch norms are folded before, so that training sees the weights that ship; those that can't be folded stop
    following the data at `settle_at`. Where `evaluate` is given, the result of `QuantizeStatic` without training is
    a candidate too, so that training never ends below it.

    Attributes:
        quantize: a `QuantizeStatic` with settings, or those settings by name.
        ranges: ranges of activations: `followed` by moving averages, or `learned` by gradients.
        settle_at: share of the steps after which ranges that are followed, and batch norms, stay as they are.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", 2018, section 3; learned ranges: Esser et al., "Learned Step Size Quantization", 2020.

    Example:
        ```python
        lobo_fx.compile(
            model,
            [QuantizationAwareTraining(epochs=2)],
            example_inputs=images,
            calibration_data=loader,
            train_data=labelled,
            loss_fn=cross_entropy,
        )
        ```
    """

    quantize: QuantizeStatic | Mapping[str, Any] = dataclasses.field(default_factory=QuantizeStatic)
    ranges: Literal["followed", "learned"] = "followed"
    settle_at: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranges not in ("followed", "learned"):
            raise InvalidInput(f"ranges is {self.ranges!r}; it must be followed or learned")
        if not is_number(self.settle_at) or not 0 <= self.settle_at <= 1:
            raise InvalidInput(f"settle_at is {self.settle_at!r}; it must be in [0, 1], a share of the steps")
        self._static  # noqa: B018  refused here, before any work

    @property
    def _static(self) -> QuantizeStatic:
        if isinstance(self.quantize, QuantizeStatic):
            return self.quantize
        if not isinstance(self.quantize, Mapping):
            raise InvalidInput(
                f"quantize is a {type(self.quantize).__name__}; expected a QuantizeStatic or its settings"
            )
        return build(QuantizeStatic, dict(self.quantize))  # type: ignore[return-value]

    @property
    def needs(self) -> tuple[str, ...]:
        """What training needs, and calibration data to start from."""
        return (*super().needs, *self._static.needs)

    def check(self, program: Program) -> None:
        super().check(program)
        self._static.check(program)

    def run(self, program: Program, context: Context) -> Program:
        static, masked = self._static, masks(program).keys()
        program, choices = static.simplify(program, context)
        placement = choices.place()
        placement.note(program.graph, context)
        untrained, quiet = program.lazy_clone(), dataclasses.replace(context, notes=[])
        prepared = prepare(program, placement, context, training=True)
        calibrate(prepared, context)
        module = program.with_graph_module(prepared).module
        module.meta |= prepared.meta  # by which torchao knows what it prepared
        objective = _Quantized(module, self, context)
        objective.keep_zeros({f"module.{name}" for name in masked})
        train(objective, self, context, objective.candidate)
        objective.finish()
        # What columns are evened by follows from their ranges before training, which changes them little.
        factors = even_floating(untrained, placement, quiet)
        best = store_rest(convert(program, module), placement, context, factors)
        if context.evaluate is not None:
            plain = static.quantize(untrained, placement, quiet, static.rounded(untrained, placement, quiet))
            with_training, without = quiet.score(best), quiet.score(plain)
            assert with_training is not None
            assert without is not None
            if without > with_training:
                scores = f"the score with training is {with_training:.4g}, without it {without:.4g}, which is kept"
                context.note(f"{self.name}: {scores}")
                best = plain
        return static.to_confirm(best, placement)


class _Quantized(Objective):
    """The loss of a module whose values are rounded on the way."""

    def __init__(self, module: ProgramModule, settings: QuantizationAwareTraining, context: Context) -> None:
        from lobo_fx.passes.quantization.integers.training_ranges import learn_ranges

        super().__init__(module, context)
        self.program_module, self.settings, self.settled = module, settings, False
        self.stopped: list[fx.Node] = []
        self.hooks: list[RemovableHandle] = []
        self.learned = learn_ranges(module) if settings.ranges == "learned" else {}

    def keep_zeros(self, names: Collection[str]) -> None:
        """Keeps the zeros of these parameters, which had masks: between a weight and its rounding there is no place."""
        for name, parameter in self.named_parameters():
            if name in names:
                kept = parameter.detach() != 0
                hook = functools.partial(_masked, kept)
                self.hooks.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def begin_step(self, share: float) -> None:
        settled = share >= self.settings.settle_at
        if settled and not self.settled:
            self.stopped = settle(self.program_module)
        elif self.settled and not settled:  # a trial has ended, and its restored state lets ranges follow again
            _set_following(self.program_module, self.stopped, True)
        self.settled = settled

    def candidate(self) -> nn.Module:
        """A copy in inference mode, whose ranges and batch norms no longer change."""
        copied = copy.deepcopy(self.program_module)
        settle(copied)
        copied.eval()
        return copied

    def finish(self) -> None:
        """Puts the learned ranges into the fake quantizers, where `convert` reads them."""
        from lobo_fx.passes.quantization.integers.training_ranges import give_back_ranges

        give_back_ranges(self.program_module, self.learned)
        for hook in self.hooks:
            hook.remove()


def _masked(kept: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient * kept.to(gradient.device)


def settle(module: ProgramModule) -> list[fx.Node]:
    """Fixes ranges of activations and statistics of batch norms; returns the norms that followed the data."""
    from lobo_fx.passes.quantization.integers.training_ranges import stop_following

    stop_following(module)
    norms = module.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    following = [node for node in norms if arguments(node)["training"]]
    _set_following(module, following, False)
    return following


def _set_following(module: ProgramModule, norms: Sequence[fx.Node], following: bool) -> None:
    for node in norms:
        set_argument(node, "training", following)
    module.recompile()
