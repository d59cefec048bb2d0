"""Static int8 quantization: ranges observed on calibration data, integers all the way where kernels exist."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import fx, nn

from lobo_fx.context import Context
from lobo_fx.costs import CostTable, MeasuresKernels
from lobo_fx.errors import InvalidInput, near
from lobo_fx.formats import FORMATS
from lobo_fx.masks import strip_masks
from lobo_fx.measures import mark_weights
from lobo_fx.operators import aten, is_call, set_argument
from lobo_fx.own_operators import DECODE
from lobo_fx.passbase import Pass, Promise
from lobo_fx.passes.fold_batch_norm import FoldBatchNorm
from lobo_fx.passes.fuse_attention import FuseAttention
from lobo_fx.passes.integer_regions import Regions, cut, kernel_of, kernels_for
from lobo_fx.passes.layer_grams import collect_grams, gram_of
from lobo_fx.passes.quantize_weights import QuantizeWeights
from lobo_fx.passes.stored_weights import find_weights
from lobo_fx.passes.targets import target_named
from lobo_fx.passes.weight_rounding import round_compensated
from lobo_fx.program import ESTIMATED, Program, fetch, register
from lobo_fx.progress import spinner
from lobo_fx.provenance import check_patterns, describe, inherit, module_name
from lobo_fx.quiet import quiet
from lobo_fx.registry import RUNTIMES
from lobo_fx.rewriting import drop_unused, free_name
from lobo_fx.shapes import propagate

if TYPE_CHECKING:
    from lobo_fx.passes.onnxruntime_quantizer import Observers, OnnxRuntimeQuantizer

_OBSERVERS = ("histogram", "mse", "entropy", "percentile", "min_max", "moving_average")
_TIED = "lobo_fx_tied"
"""On reads of codes: the parameter that others still read as float."""
_COARSE = 0.01
"""Largest error of a lookup in codes, as a share of the row's largest value: that of 7 bits, and a little more."""
SMALLEST_SCALE = 2.0**-60
"""Far below any scale in use, and its square is still a normal float32."""
_LARGEST_BIAS = 2**30
"""Half of int32's range: room for the products that are added to the bias."""


@dataclasses.dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Weights and activations become 8-bit integers; see `lobo_fx.passes.onnxruntime_quantizer` for where.

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
        costs: a cost table of the machine to run on (`lobo_fx.costs`); None measures this one, once.
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
        program = FoldBatchNorm().run(program, context)
        strip_masks(program)
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
        grams = collect_grams(program, weights, context)
        for weight in weights:
            if (gram := gram_of(weight, grams)) is None:
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
            from lobo_fx.passes.bias_correction import correct_biases
            from lobo_fx.passes.simulation import first_batches

            correct_biases(prepared, first_batches(context), context.show_progress)
        program = convert(program, prepared)
        if self.kernels == "cheapest":
            program.module.meta[ESTIMATED] = True
        return self._store_rest(program, context) if stored and self.kernels == "cheapest" else program

    def _store_rest(self, program: Program, context: Context) -> Program:
        """Weights of the layers left float become int8 in the file; those of overridden modules stay as they are."""
        left = [name for name, choice in self._overrides(program).items() if choice is None]
        _look_up_codes(program, left)
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
                    f"{describe(node)} stays float: {cost.floating:.0f} µs, as integers {cost.integer:.0f} µs "
                    "beside conversions"
                )
        quantizer.chosen = integer
        return quantizer

    def quantizer_of_all(self, program: Program) -> OnnxRuntimeQuantizer:
        """What marks every operator that has an integer kernel."""
        with quiet():
            from lobo_fx.passes.onnxruntime_quantizer import OnnxRuntimeQuantizer
        target = target_named(self.target)
        return OnnxRuntimeQuantizer(self.observers(self.observer), target, None, self._overrides(program))

    def observers(self, name: str) -> Observers:
        """The observers that a name stands for."""
        with quiet():
            from torchao.quantization.pt2e import PerChannelMinMaxObserver

            from lobo_fx.passes.observers import OBSERVERS
            from lobo_fx.passes.onnxruntime_quantizer import Observers
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


def prepare(
    program: Program, quantizer: OnnxRuntimeQuantizer, context: Context, training: bool = False
) -> fx.GraphModule:
    """Inserts what the quantizer asks for. Changes the program's graph; batch norms must be folded.

    Args:
        program: shapes propagated.
        quantizer: says where, and with which observers.
        context: for notes.
        training: whether they are fake quantizers, to be trained with before `convert`.
    """
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

        insert = prepare_qat_pt2e if training else prepare_pt2e
        prepared: fx.GraphModule = insert(program.module, quantizer)
    if not any(node.op == "call_module" for node in prepared.graph.nodes):
        context.note("quantize_static found nothing to quantize")
    for node, reason in quantizer.skipped:
        context.note(f"{describe(node)} stays float: {reason}")
    return prepared


def calibrate(prepared: fx.GraphModule, context: Context) -> None:
    """Runs the calibration data through the observers, one batch in memory at a time.

    Raises:
        InvalidInput: no data, values that are NaN or infinite, or a layer that no data reaches.
    """
    from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

    observed = {str(node.target): node.args[0] for node in prepared.graph.find_nodes(op="call_module")}
    reached: set[str] = set()
    batch = 0

    def check(name: str, value: torch.Tensor) -> None:
        if value.numel():
            reached.add(name)
            low, high = value.aminmax()
            if not (math.isfinite(low) and math.isfinite(high)):
                where = describe(cast("fx.Node", observed[name]))
                raise InvalidInput(f"calibration batch {batch} gives NaN or an infinite range at {where}")

    hooks = [
        prepared.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: check(name, given[0]))
        for name in observed
    ]
    try:
        with torch.no_grad(), quiet():
            for batch, inputs in enumerate(context.calibration_batches()):  # noqa: B007  read by check
                prepared(*inputs.args, **inputs.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, source in observed.items():
        if name not in reached and not isinstance(prepared.get_submodule(name), DerivedObserverOrFakeQuantize):
            raise InvalidInput(f"no calibration data reaches {describe(cast('fx.Node', source))}: it is empty there")


def convert(program: Program, prepared: fx.GraphModule) -> Program:
    """Replaces observers by quantize and dequantize operators and stores weights as integers."""
    mark_weights(program.module)
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        widen_weight_scales(prepared)
        sources = _stored_operands(prepared)
        converted = convert_pt2e(prepared)
    program = program.with_graph_module(converted)
    _name_weights(program, sources)
    return program


def widen_weight_scales(prepared: fx.GraphModule) -> None:
    """Raises weight scales so small that the bias, at input × weight scale, would overflow int32.

    A channel of zeros (pruned, or a dead batch norm) is the usual case.
    """
    from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

    for node in prepared.graph.find_nodes(op="call_module"):
        observer = prepared.get_submodule(str(node.target))
        if not isinstance(observer, DerivedObserverOrFakeQuantize):
            continue
        activation, weight = observer.obs_or_fqs
        bias = fetch(prepared, str(node.args[0].target)).detach()
        smallest = bias.abs() / (activation.calculate_qparams()[0] * _LARGEST_BIAS)
        seen = getattr(weight, "activation_post_process", weight)  # a fake quantizer holds its observer
        seen.max_val.copy_(torch.maximum(seen.max_val, smallest * seen.quant_max))


def _stored_operands(prepared: fx.GraphModule) -> dict[tuple[str, int], str]:
    """Which parameter each operator reads through an observer, by operator and argument position."""
    found = {}
    for node in prepared.graph.nodes:
        for position, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "call_module":
                source = argument.args[0]
                if isinstance(source, fx.Node) and source.op == "get_attr":
                    found[node.name, position] = str(source.target)
    return found


def _name_weights(program: Program, sources: dict[tuple[str, int], str]) -> None:
    """Stores each quantized weight under its parameter's name, its scale and zero point beside it."""
    graph, module = program.graph, program.module
    nodes = {node.name: node for node in graph.nodes}
    stored: dict[str, torch.Tensor] = {}
    for (operator, position), name in sources.items():
        dequantize = nodes[operator].args[position]
        reads = [n for n in dequantize.args[:3] if isinstance(n, fx.Node) and n.op == "get_attr"]
        if not reads or reads[0] is not dequantize.args[0]:
            continue  # not folded: the weight stays float
        values = [fetch(module, str(read.target)).detach() for read in reads]
        still_float = any(node.target == name for node in graph.find_nodes(op="get_attr"))
        if still_float if name not in stored else not torch.equal(stored[name], values[0]):
            reads[0].meta[_TIED] = name
            name = f"{name}_{operator}_int8"  # a shared parameter: others read it as float, or at another scale
        stored[name] = values[0]
        for read, suffix, value in zip(reads, ("", "_scale", "_zero_point"), values, strict=False):
            read.target = _replace(module, name + suffix, value)
    read_names = {node.target for node in graph.find_nodes(op="get_attr")}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        if name not in read_names:
            path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(path), leaf)
    module.recompile()


def _look_up_codes(program: Program, left: Collection[str]) -> None:
    """Lookups in a table that products read as int8 read the same codes, so that the file has it once.

    Not where they are `left` float, something else reads the table too, or codes are too coarse: the scale of a row
    whose product has a large bias is wider than the row.
    """
    graph = program.graph
    for dequantize in graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.dequantize_per_channel.default
    ):
        codes, scale, _, axis, *_ = dequantize.args
        tied = [node for node in graph.find_nodes(op="get_attr") if node.target == codes.meta.get(_TIED)]
        readers = [user for read in tied for user in read.users]
        if not readers or axis or not all(is_call(user, aten.embedding.default) for user in readers):
            continue
        stored, scales, table = (fetch(program.module, str(node.target)).detach() for node in (codes, scale, tied[0]))
        largest = table.abs().amax(1, keepdim=True)
        if any(user.name in left for user in readers) or bool(
            ((stored * scales[:, None] - table).abs() > _COARSE * largest).any()
        ):
            continue
        columns = free_name(program, f"{codes.target}_column_scale")
        register(program.module, columns, scales.unsqueeze(1))
        for lookup in readers:
            with graph.inserting_before(lookup):
                reads = [graph.get_attr(str(codes.target)), graph.get_attr(columns)]
                weight = graph.call_function(DECODE, (*reads, None, "int8", list(stored.shape), stored.shape[1]))
            inherit(weight, lookup)
            set_argument(lookup, "weight", weight)
        for read in tied:
            graph.erase_node(read)
        drop_unused(program, [str(read.target) for read in tied])


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> str:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    register(module, name, value)
    return name
