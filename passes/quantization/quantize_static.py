"""Static int8 quantization: ranges observed on calibration data, integers all the way where kernels exist."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import InvalidInput, near
from lobo_fx.graph.masks import strip_masks
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import check_patterns, module_name
from lobo_fx.graph.shapes import propagate
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.own_operators.formats import FORMATS
from lobo_fx.passes.fitting.layer_grams import collect_grams, gram_of
from lobo_fx.passes.fusion.fold_batch_norm import FoldBatchNorm
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.fusion.fuse_attention import FuseAttention
from lobo_fx.passes.quantization.codes.gptq import round_compensated
from lobo_fx.passes.quantization.codes.weights import find_weights
from lobo_fx.passes.quantization.integers.calibration import calibrate, convert, prepare
from lobo_fx.passes.quantization.integers.kernels import kernel_of, kernels_for
from lobo_fx.passes.quantization.integers.naming import look_up_codes
from lobo_fx.passes.quantization.integers.regions import Regions, cut
from lobo_fx.passes.quantization.integers.targets import target_named
from lobo_fx.passes.quantization.quantize_weights import QuantizeWeights
from lobo_fx.plugins.protocols import MeasuresKernels
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.terminal.progress import spinner
from lobo_fx.terminal.quiet import quiet

if TYPE_CHECKING:
    from lobo_fx.passes.quantization.integers.annotation import Observers, OnnxRuntimeQuantizer

_OBSERVERS = ("histogram", "mse", "entropy", "percentile", "min_max", "moving_average")
SMALLEST_SCALE = 2.0**-60
"""Far below any scale in use, and its square is still a normal float32."""


@dataclasses.dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Weights and activations become 8-bit integers; see `lobo_fx.passes.quantization.integers.annotation` for where.

    Before: `relu(conv(x, W, b))`. After: `q(relu(conv(dq(q(x)), dq(W₈), dq(b₃₂))))`, which ONNX Runtime
    runs as one integer convolution. Batch norms are folded first. Zeros of pruned weights stay zero.

    Attributes:
        observer: how the range of an activation is chosen from calibration data: `histogram` (smallest expected
            squared error, approximately), `mse` (the same, searched), `entropy`, `percentile`, `min_max`, or
            `moving_average`.
        percentile: share of the values that `percentile` keeps at either end, in percent.
        target: the CPU's integers: `x86-vnni` (uint8 × int8), `x86-avx2` (weights of 7 bits, whose sums don't
            saturate), `arm` (int8 × int8); `auto` is this machine's.
        kernels: `cheapest` runs an operator as integers where that pays on the CPU, conversions included, and
            stores the weights of the others as int8, decoded at load: a small file at the speed of float; attention
            is fused where that pays; `all` runs integers wherever there is a kernel, and leaves everything else as
            it is.
        costs: a cost table of the machine to run on (`lobo_fx.measures.kernel_costs`); None measures this one, once.
        overrides: by pattern of module names, another observer, or `float` to leave its operators float.
        rounding: of weights, to the `nearest` code, or `compensated`: what one adds to its layer's outputs on
            calibration data, those after it take back (GPTQ).
        correct_bias: whether biases take back the mean error of their layers' outputs on calibration data.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", 2018; observers: torchao's PT2E.
    """

    observer: str = "histogram"
    percentile: float = 99.99
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
        target_named(self.target)
        choices = {
            "observer": _OBSERVERS,
            "kernels": ("cheapest", "all"),
            "rounding": ("nearest", "compensated"),
            "correct_bias": (False, True),
        }
        known: tuple[object, ...]
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(str, known))}")
        if not isinstance(self.percentile, (int, float)) or not 50 < self.percentile <= 100:
            raise InvalidInput(f"percentile is {self.percentile!r}; it must be in (50, 100]")
        if not isinstance(self.overrides, Mapping) or not all(isinstance(name, str) for name in self.overrides):
            raise InvalidInput("overrides maps patterns of module names to an observer or 'float'")
        for pattern, choice in self.overrides.items():
            if choice not in (*_OBSERVERS, "float"):
                known = (*_OBSERVERS, "float")
                raise InvalidInput(f"overrides['{pattern}'] is {choice!r}; it must be one of {', '.join(known)}")
        if self.costs is not None:
            CostTable.load(self.costs)

    def check(self, program: Program) -> None:
        """Every override must match a module."""
        check_patterns(self.overrides, program.graph)

    def run(self, program: Program, context: Context) -> Program:
        program = self.simplify(program, context)
        quantizer = self.quantizer(program, context)
        self.round_weights(program, quantizer, context)
        return self.quantize(program, quantizer, context)

    def simplify(self, program: Program, context: Context) -> Program:
        """Folds batch norms, makes masks plain zeros, and fuses attention where that pays."""
        strip_masks(program)
        fold_weights(program)
        program = FoldBatchNorm().run(program, context)
        if self.kernels == "all":
            return program
        table = self.cost_table(program, self.quantizer_of_all(program), context)

        def refuse(attention: fx.Node) -> str | None:
            kernel = kernel_of(attention)
            if kernel is None or table[kernel].integer < table[kernel].floating:
                return None
            return f"separate kernels take {table[kernel].floating:.0f} µs, a fused one {table[kernel].integer:.0f} µs"

        return FuseAttention().fuse(program, context, refuse)

    def round_weights(self, program: Program, quantizer: OnnxRuntimeQuantizer, context: Context) -> None:
        """Puts weights on the codes that they will be stored as, where rounding is compensated.

        Whatever rounds them to the nearest later changes nothing.
        """
        if self.rounding == "nearest":
            return
        integer = {node.name for node in quantizer.choices(program.graph)}
        if quantizer.chosen is not None:
            integer &= quantizer.chosen
        silent = dataclasses.replace(context, notes=[])
        weights = []
        for weight in find_weights(program, silent):
            readers = [reader.name for reader in weight.readers]
            floating = any(quantizer.overrides.get(name, quantizer.observers) is None for name in readers)
            if not floating and (self.kernels == "cheapest" or integer.issuperset(readers)):
                weights.append(weight)
        grams = collect_grams(program, [layer for weight in weights for layer in weight.layers], context)
        for weight in weights:
            if (gram := gram_of(weight.readers, grams)) is None:
                continue
            limit = quantizer.target.weight if integer.issuperset(reader.name for reader in weight.readers) else 127
            number = dataclasses.replace(FORMATS["int8"], limits=(-limit, limit))
            matrix = weight.matrix
            rounded = round_compensated(matrix, number, matrix.shape[1], gram)
            weight.put(rounded.codes * rounded.scale)

    def quantize(
        self, program: Program, quantizer: OnnxRuntimeQuantizer, context: Context, stored: bool = True
    ) -> Program:
        """Prepares, calibrates, refits where that is asked for, converts, and stores what is left float as int8."""
        prepared = prepare(program, quantizer, context)
        calibrate(prepared, context)
        if self.correct_bias:
            from lobo_fx.passes.quantization.integers.bias_correction import correct_biases
            from lobo_fx.passes.quantization.integers.simulation import first_batches

            correct_biases(prepared, first_batches(context), context.show_progress)
        program = convert(program, prepared)
        if self.kernels == "cheapest":
            program.module.set_facts(estimated=True)
        return self._store_rest(program, context) if stored and self.kernels == "cheapest" else program

    def _store_rest(self, program: Program, context: Context) -> Program:
        """Weights of the layers left float become int8 in the file; those of overridden modules stay as they are."""
        left = [name for name, choice in self._overrides(program).items() if choice is None]
        look_up_codes(program, left)
        propagate(program.module)  # what convert inserted has no shapes yet
        silent = dataclasses.replace(context, notes=[])
        nodes = {node.name: node for node in program.graph.nodes}
        named = {str(source.target) for name in left for source in nodes[name].all_input_nodes}
        return QuantizeWeights(block_size=None, method="round").store(program, silent, named)

    def quantizer(self, program: Program, context: Context) -> OnnxRuntimeQuantizer:
        """Decides where integers run, and returns what marks it."""
        quantizer = self.quantizer_of_all(program)
        if self.kernels == "all":
            return quantizer
        table = self.cost_table(program, quantizer, context)
        integer = self.regions(program, quantizer, table).integer
        for node in _choices(program, quantizer):
            if node.name not in integer and (kernel := kernel_of(node)) is not None:
                cost = table[kernel]
                context.note(
                    f"stays float: {cost.floating:.0f} µs, as integers {cost.integer:.0f} µs beside conversions", node
                )
        quantizer.chosen = integer
        return quantizer

    def quantizer_of_all(self, program: Program) -> OnnxRuntimeQuantizer:
        """What marks every operator that has an integer kernel."""
        with quiet():
            from lobo_fx.passes.quantization.integers.annotation import OnnxRuntimeQuantizer
        target = target_named(self.target)
        return OnnxRuntimeQuantizer(self.observers(self.observer), target, None, self._overrides(program))

    def observers(self, name: str) -> Observers:
        """The observers that a name stands for."""
        with quiet():
            from torchao.quantization.pt2e import PerChannelMinMaxObserver

            from lobo_fx.passes.quantization.integers.annotation import Observers
            from lobo_fx.passes.quantization.integers.observers import OBSERVERS
        more: dict[str, Any] = {"percentile": self.percentile} if name == "percentile" else {}
        return Observers(
            activation=OBSERVERS[name].with_args(eps=SMALLEST_SCALE, **more),  # type: ignore[attr-defined]
            weight=PerChannelMinMaxObserver.with_args(eps=SMALLEST_SCALE),
        )

    def training_quantizer(self, program: Program, context: Context) -> OnnxRuntimeQuantizer:
        """The same with fake quantizers, for `prepare(..., training=True)` and a training loop.

        Ranges follow moving averages, whatever `observer` is, since activations move while weights train.

        Source: Jacob et al., 2018, section 3.
        """
        with quiet():
            from torchao.quantization.pt2e import FakeQuantize, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
        quantizer = self.quantizer(program, context)
        quantizer.observers = dataclasses.replace(
            quantizer.observers,
            activation=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, eps=SMALLEST_SCALE),
            weight=FakeQuantize.with_args(observer=PerChannelMinMaxObserver, eps=SMALLEST_SCALE),
        )
        return quantizer

    def _overrides(self, program: Program) -> dict[str, Observers | None]:
        """What each pattern says, by node name.

        Raises:
            InvalidInput: a pattern matches no module.
        """
        names = {node.name: module_name(node) for node in program.graph.nodes if node.op == "call_function"}
        found: dict[str, Observers | None] = {}
        for pattern, choice in self.overrides.items():
            matched = [node for node, module in names.items() if fnmatch.fnmatchcase(module, pattern)]
            if not matched:
                raise InvalidInput(f"overrides: '{pattern}' matches no module; {near(pattern, names.values())}")
            found |= dict.fromkeys(matched, None if choice == "float" else self.observers(choice))
        return found

    def cost_table(self, program: Program, quantizer: OnnxRuntimeQuantizer, context: Context) -> CostTable:
        """The costs of all kernels that the program may ask for; those not known yet are measured."""
        runtime = RUNTIMES.get(RUNTIMES.default)()
        table = CostTable.load(self.costs) if self.costs else CostTable.of_this_machine(runtime.version)
        missing = table.missing(kernels_for(program.graph, _choices(program, quantizer), quantizer.passes_on))
        if missing and self.costs:
            context.note(f"the cost table lacks {len(missing)} kernels, measured on this machine instead")
            table.path = None
        if missing and not isinstance(runtime, MeasuresKernels):
            raise InvalidInput(f"{runtime.version} measures no kernels; give costs=, or kernels='all'")
        with spinner(f"measure {len(missing)} kernels", context.show_progress and bool(missing)):
            table.add(runtime.measure_kernels(missing) if missing else {})
        return table

    def regions(
        self,
        program: Program,
        quantizer: OnnxRuntimeQuantizer,
        table: CostTable,
        penalties: Mapping[str, float] | None = None,
    ) -> Regions:
        """The cheapest way to run the program.

        Args:
            program: shapes propagated.
            quantizer: whose choices there are.
            table: what kernels cost.
            penalties: microseconds that an integer operator pays beside, by node name.
        """
        choices = _choices(program, quantizer)
        if quantizer.chosen is not None:
            choices = [node for node in choices if node.name in quantizer.chosen]
        return cut(program.graph, choices, quantizer.passes_on, table.__getitem__, penalties)


def _choices(program: Program, quantizer: OnnxRuntimeQuantizer) -> list[fx.Node]:
    """Operators with an integer kernel whose cost can be asked."""
    return [node for node in quantizer.choices(program.graph) if kernel_of(node) is not None]
