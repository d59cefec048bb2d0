"""Static int8 quantization: ranges observed on calibration data, integers all the way where kernels exist."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import fx, nn

from lobo_fx.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.masks import strip_masks
from lobo_fx.measures import mark_weights
from lobo_fx.passbase import Pass, Promise
from lobo_fx.passes.fold_batch_norm import FoldBatchNorm
from lobo_fx.program import Program, fetch, register
from lobo_fx.provenance import describe
from lobo_fx.quiet import quiet

if TYPE_CHECKING:
    from lobo_fx.passes.onnxruntime_quantizer import Observers

_OBSERVERS = ("min_max", "histogram")
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
        observer: how the range of an activation is chosen from calibration data: `histogram` cuts outliers
            where that lowers the expected squared error, `min_max` keeps them.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", 2018; observers: torchao's PT2E.
    """

    observer: Literal["min_max", "histogram"] = "histogram"

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data, always."""
        return ("calibration_data",)

    def __post_init__(self) -> None:
        if self.observer not in _OBSERVERS:
            raise InvalidInput(f"observer is {self.observer!r}; it must be one of {', '.join(_OBSERVERS)}")

    def run(self, program: Program, context: Context) -> Program:
        program = FoldBatchNorm().run(program, context)
        strip_masks(program)
        prepared = prepare(program, self.observers(), context)
        calibrate(prepared, context)
        return convert(program, prepared)

    def observers(self) -> Observers:
        """The torchao observers that the settings stand for."""
        with quiet():
            from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver

            from lobo_fx.passes.onnxruntime_quantizer import Observers
        chosen = {"min_max": MinMaxObserver, "histogram": HistogramObserver}[self.observer]
        return Observers(
            activation=chosen.with_args(eps=SMALLEST_SCALE),
            weight=PerChannelMinMaxObserver.with_args(eps=SMALLEST_SCALE),
        )


def prepare(program: Program, observers: Observers, context: Context) -> fx.GraphModule:
    """Inserts observers where ONNX Runtime has integer kernels. Changes the program's graph."""
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        from lobo_fx.passes.onnxruntime_quantizer import OnnxRuntimeQuantizer

        quantizer = OnnxRuntimeQuantizer(observers)
        prepared: fx.GraphModule = prepare_pt2e(program.module, quantizer)
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
        weight.max_val.copy_(torch.maximum(weight.max_val, smallest * weight.quant_max))


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


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> str:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    register(module, name, value)
    return name
