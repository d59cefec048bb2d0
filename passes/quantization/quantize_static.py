"""Static int8 quantization: ranges observed on calibration data, integers all the way where kernels exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.masks import strip_masks
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import check_patterns
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes.fusion.fold_batch_norm import FoldBatchNorm
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.fusion.fuse_attention import FuseAttention
from lobo_fx.passes.quantization.integers.calibration import calibrate, convert, prepare
from lobo_fx.passes.quantization.integers.drowning import drowned
from lobo_fx.passes.quantization.integers.kernels import kernel_table
from lobo_fx.passes.quantization.integers.observer_names import OBSERVERS
from lobo_fx.passes.quantization.integers.placement import (
    PERCENTILE,
    Choices,
    Observing,
    Placement,
    Request,
    attention_kernels,
)
from lobo_fx.passes.quantization.integers.prices import check_costs, measure_missing, open_table
from lobo_fx.passes.quantization.integers.rounding import even_floating, round_weights
from lobo_fx.passes.quantization.integers.storing import store_rest
from lobo_fx.passes.quantization.integers.targets import target_named, target_of_this_machine
from lobo_fx.plugins.kernels import Cost, Kernel
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.plugins.settings import Range

__all__ = ["QuantizeStatic", "folded", "fused_where_faster"]


@dataclasses.dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Weights and activations become 8-bit integers; see `lobo_fx.passes.quantization.integers.kernels` for where.

    Before: `relu(conv(x, W, b))`. After: `q(relu(conv(dq(q(x)), dq(W₈), dq(b₃₂))))`, which ONNX Runtime
    runs as one integer convolution. Batch norms are folded first. Zeros of pruned weights stay zero. Values that an
    earlier pass quantized keep their scale and zero point.

    Attributes:
        observer: how the range of an activation is chosen from calibration data: `histogram` (least squared
            error, without isolated values), `mse` (least squared error), `entropy`, `percentile`, `min_max`,
            `moving_average`, or one that another package offers
            (`lobo_fx.passes.quantization.integers.observer_names.OBSERVERS`).
        percentile: for the observer `percentile`, how many percent of the values are below the upper end of the range,
            and as many above its lower end.
        target: the CPU's integers: `x86-vnni` (uint8 × int8), `x86-avx2` (weights of 7 bits, whose sums don't
            saturate), `arm` (int8 × int8); `auto` is this machine's.
        kernels: `cheapest` runs an operator as integers where that pays on the CPU, conversions included, and fuses
            attention where that pays; `all` runs integers wherever there is a kernel. Either way, weights of
            operators that stay float are stored as int8 and decoded at load: a small file at the speed of float; a
            weight that can't be stored so is named in the report, with the reason.
        costs: a cost table of the machine to run on (`lobo_fx.measures.kernel_costs`); None measures this one, once.
        overrides: by pattern of module names, another observer, or `float` to leave its operators float.
        rounding: rounds weights to the `nearest` code, or `compensated`: later weights of a row make up for the error
            of each in the layer's outputs on calibration data (GPTQ).
        correct_bias: whether biases take back the mean error of their layers' outputs on calibration data.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", 2018; observers: torchao's PT2E.
    """

    observer: str = "histogram"
    percentile: Annotated[float, Range(above=50, most=100)] = PERCENTILE
    target: str = "auto"
    kernels: Literal["cheapest", "all"] = "cheapest"
    costs: str | None = None
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rounding: Literal["nearest", "compensated"] = "nearest"
    correct_bias: bool = True

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data, always."""
        return ("calibration_data",)

    def __post_init__(self) -> None:
        OBSERVERS.check(self.observer, "observer")
        target_named(self.target)
        check_costs(self.costs)
        super().__post_init__()
        if not isinstance(self.overrides, Mapping) or not all(isinstance(name, str) for name in self.overrides):
            raise InvalidInput("overrides maps patterns of module names to an observer or 'float'")
        for pattern, choice in self.overrides.items():
            if choice != "float":
                OBSERVERS.check(choice, f"overrides['{pattern}']", ["float"])

    def check(self, program: Program) -> None:
        """Every override must match a module."""
        check_patterns(self.overrides, program.graph)

    def run(self, program: Program, context: Context) -> Program:
        program, choices = self.simplify(program, context)
        placement = choices.place()
        placement.note(program.graph, context)
        factors = self.rounded(program, placement, context)
        return self.quantize(program, placement, context, factors)

    def rounded(self, program: Program, placement: Placement, context: Context) -> Mapping[str, torch.Tensor]:
        """Rounds weights if `rounding` is compensated; returns factors for columns of weights that stay float."""
        prepare_weights = round_weights if self.rounding == "compensated" else even_floating
        return prepare_weights(program, placement, context)

    def simplify(self, program: Program, context: Context) -> tuple[Program, Choices]:
        """Folds batch norms, makes masks zeros, fuses attention where that pays; finds operators with integer kernels.

        The cost table is opened once; kernels that it lacks are measured.
        """
        program = folded(program, context)
        table = open_table(self.costs) if self.kernels == "cheapest" else None
        if table is not None:
            program = fused_where_faster(program, table, context)
        return program, self._choices(program, table, context)

    def place(self, program: Program, context: Context) -> Placement:
        """Decides where integers run in a program whose batch norms are folded.

        For training on quantized values, `prepare(program, placement, context, training=True)` takes the placement, and
        `convert` the trained module (`lobo_fx.passes.quantization.integers.calibration`).
        """
        table = open_table(self.costs) if self.kernels == "cheapest" else None
        placement = self._choices(program, table, context).place()
        placement.note(program.graph, context)
        return placement

    def quantize(
        self,
        program: Program,
        placement: Placement,
        context: Context,
        factors: Mapping[str, torch.Tensor] | None = None,
        stored: bool = True,
    ) -> Program:
        """Carries a placement out on calibration data.

        Args:
            program: as `simplify` gives it.
            placement: where integers run.
            context: gives data, takes notes.
            factors: as `rounded` gives them.
            stored: whether weights of operators that stay float become int8.
        """
        prepared = prepare(program, placement, context)
        calibrate(prepared, context)
        if self.correct_bias:
            from lobo_fx.passes.quantization.integers.bias_correction import correct_biases
            from lobo_fx.passes.quantization.integers.simulation import first_batches

            correct_biases(prepared, first_batches(context), context.show_progress)
        program = self.to_confirm(convert(program, prepared), placement)
        return store_rest(program, placement, context, factors) if stored else program

    def to_confirm(self, program: Program, placement: Placement) -> Program:
        """Marks a program whose whole file is to confirm a choice made by this machine's times; returns it."""
        if placement.integer and placement.microseconds is not None and self._is_for_this_machine:
            program.module.set_facts(estimated=True)
        return program

    @property
    def _is_for_this_machine(self) -> bool:
        """Whether the file is to run on a CPU like this one, so that its latency here says how fast it is."""
        if self.target not in ("auto", target_of_this_machine()):
            return False
        return self.costs is None or open_table(self.costs).machine == open_table(None).machine

    def _choices(self, program: Program, table: CostTable | None, context: Context) -> Choices:
        """The operators that could run as integers, with their costs if these decide."""
        request = self._request()
        for pattern in request.unmatched(program.graph):
            context.note(f"overrides: nothing that '{pattern}' matches is left to be overridden")
        choices = Choices.find(program.graph, request)
        choices = choices.without(drowned(program, choices.kernels, request.table, context))
        if table is not None:
            measure_missing(table, choices.priced, context)
            if self.costs is None and not self._is_for_this_machine:
                context.note(
                    f"integer kernels are chosen by the times of this machine, and target={self.target!r} is another "
                    "CPU: run `lobo-fx costs MODEL -o costs.json` there, and give costs="
                )
        return dataclasses.replace(choices, costs=table)

    def _request(self) -> Request:
        overrides = {
            pattern: None if choice == "float" else Observing(choice, self.percentile)
            for pattern, choice in self.overrides.items()
        }
        observing = Observing(self.observer, self.percentile)
        return Request(kernel_table(RUNTIMES.default), target_named(self.target), observing, overrides)


def folded(program: Program, context: Context) -> Program:
    """Makes masks zeros, and folds computed weights and batch norms."""
    strip_masks(program)
    fold_weights(program)
    return FoldBatchNorm().run(program, context)


def fused_where_faster(program: Program, table: CostTable, context: Context) -> Program:
    """Fuses every attention whose fused kernel is faster; costs that the table lacks are measured."""
    return FuseAttention().fuse(program, context, _slower_when_fused(program.graph, table, context))


def _slower_when_fused(graph: fx.Graph, table: CostTable, context: Context) -> Callable[[fx.Node], str | None]:
    """A function that tells why not to fuse an attention: its fused kernel is slower, or its cost is not known."""
    kernels = attention_kernels(graph)
    measure_missing(table, [kernel for kernel in kernels.values() if isinstance(kernel, Kernel)], context)

    def refuse(attention: fx.Node) -> str | None:
        kernel = kernels[attention]
        if isinstance(kernel, str):
            return kernel
        cost = table.find(kernel)
        if not isinstance(cost, Cost):
            return f"what it costs is not known: {cost.reason}"
        if cost.integer < cost.floating:
            return None
        return f"separate kernels take {cost.floating:.0f} µs, a fused one {cost.integer:.0f} µs"

    return refuse
