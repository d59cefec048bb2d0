"""Turns a float graph into an integer one: inserts observers, calibrates them, and converts the graph."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import exact_tolerance
from lobo_fx.errors import ContractError, InvalidInput
from lobo_fx.graph.layers import layers
from lobo_fx.graph.operators import aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.running import AS_IT_IS, Runner, kept_buffers
from lobo_fx.graph.shapes import dimension_names, tensor_specs
from lobo_fx.graph.tensors import fetch
from lobo_fx.graph.weight_names import mark_weights
from lobo_fx.measures.fidelity import largest_error
from lobo_fx.passes.quantization.integers.naming import name_weights, stored_operands
from lobo_fx.passes.quantization.integers.placement import Placement
from lobo_fx.terminal.quiet import quiet

__all__ = ["calibrate", "convert", "prepare", "widen_weight_scales"]

_LARGEST_BIAS = 2**30
"""Half of int32's range: room for the products that are added to the bias."""


def prepare(program: Program, placement: Placement, context: Context, training: bool = False) -> fx.GraphModule:
    """Inserts observers where integers are to run; changes the program's graph, and folds batch norms where possible.

    Training on quantized values: `prepare(..., training=True)`, a loop of your own over the module that it returns,
    then `convert`.

    Args:
        program: shapes propagated.
        placement: where integers run, and with which observers (`QuantizeStatic.place`).
        context: takes notes.
        training: whether to insert fake quantizers, to be trained with before `convert`.

    Raises:
        ContractError: inserting observers changed what the program computes.
    """
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

        from lobo_fx.passes.quantization.integers.annotation import Annotator

        insert = prepare_qat_pt2e if training else prepare_pt2e
        before = program.run()
        with _norms_hidden(program.module) as modules:
            prepared: fx.GraphModule = insert(program.module, Annotator(placement, training))
            modules.append(prepared)
    error = largest_error(before, _unobserved(prepared)(program.example_inputs))
    if error > exact_tolerance(before):
        raise ContractError(f"torchao's prepare moved the outputs by {error:.1e} of their range, before any rounding")
    if not any(node.op == "call_module" for node in prepared.graph.nodes):
        context.note("quantize_static runs nothing as integers")
    return prepared


def calibrate(prepared: fx.GraphModule, context: Context) -> None:
    """Runs the calibration data through the observers, one batch in memory at a time.

    If an observer clips values far beyond its range (outliers), all observers see the data again, now computed from
    clipped values as in the quantized network: otherwise an outlier clipped at the input would set all later ranges.

    Raises:
        InvalidInput: no data, values that are NaN or infinite, or a layer that no data reaches.
    """
    from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

    nodes = {str(node.target): node for node in prepared.graph.find_nodes(op="call_module")}
    fresh = copy.deepcopy({name: prepared.get_submodule(name) for name in nodes})
    reached = _observe(prepared, nodes, context, {})
    for name, node in nodes.items():
        if name not in reached and not isinstance(prepared.get_submodule(name), DerivedObserverOrFakeQuantize):
            where = describe(cast("fx.Node", node.args[0]))
            raise InvalidInput(f"no calibration data reaches {where}: it is empty there")
    limits = {name: limit for name in nodes if (limit := getattr(prepared.get_submodule(name), "limits", None))}
    if limits:
        for name, observer in fresh.items():
            prepared.set_submodule(name, observer)
        _observe(prepared, nodes, context, limits)


def _observe(
    prepared: fx.GraphModule,
    nodes: Mapping[str, fx.Node],
    context: Context,
    limits: Mapping[str, tuple[float, float]],
) -> set[str]:
    """Runs the data through the observers once.

    Args:
        prepared: holds the observers.
        nodes: the calls of the observers by name.
        context: gives the rows that fits may see.
        limits: by observer, the range that its output is clipped to.

    Returns:
        The observers that saw any value.
    """
    reached: set[str] = set()
    by_row = _split_by_rows(prepared, context)
    batch = count = 0

    def see(name: str, value: torch.Tensor) -> None:
        if value.numel():
            reached.add(name)
            source = cast("fx.Node", nodes[name].args[0])
            low, high = value.aminmax()
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InvalidInput(f"calibration batch {batch} gives NaN or an infinite range at {describe(source)}")
            rows = count if source in by_row and len(value) % count == 0 else 1
            vars(prepared.get_submodule(name))["rows"] = rows  # read by observers that count by rows

    hooks = [
        prepared.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name in nodes
    ] + [
        prepared.get_submodule(name).register_forward_hook(lambda _, __, value, ends=ends: value.clamp(*ends))
        for name, ends in limits.items()
    ]
    try:
        with torch.no_grad(), quiet(), kept_buffers(prepared):
            for batch, inputs in enumerate(context.fitting_batches()):  # noqa: B007  read by see
                count = context.signature.count_rows(inputs)
                prepared(*inputs.args, **inputs.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return reached


def _split_by_rows(prepared: fx.GraphModule, context: Context) -> set[fx.Node]:
    """The nodes whose first dimension runs over the rows of the batch, or over several parts of each row."""
    values = {node: value for node in prepared.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)}
    specs = tensor_specs([""] * len(values), list(values.values()), dimension_names(prepared.graph))
    batch = context.signature.batch
    return {
        node
        for node, spec in zip(values, specs, strict=True)
        if batch and spec is not None and spec.shape and re.search(rf"\b{batch}\b", str(spec.shape[0]))
    }


def convert(program: Program, prepared: fx.GraphModule) -> Program:
    """Replaces observers by quantize and dequantize operators and stores weights as integers."""
    mark_weights(program.module)
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        widen_weight_scales(prepared)
        sources = stored_operands(prepared)
        with _norms_hidden(prepared) as modules:
            converted = convert_pt2e(prepared)
            modules.append(converted)
        _drop_second_quantizing(converted.graph)
    program = program.with_graph_module(converted)
    name_weights(program.module, sources)
    return program


def _drop_second_quantizing(graph: fx.Graph) -> None:
    """Quantizes a value once: codes that would be dequantized and quantized alike are handed on."""
    codes = torch.ops.quantized_decomposed
    known: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=codes.quantize_per_tensor.default):
        source = node.args[0]
        again = is_call(source, codes.dequantize_per_tensor.default) and source.args[1:6] == node.args[1:6]
        instead = source.args[0] if again else known.setdefault(node.args, node)
        if instead is node:
            continue
        node.replace_all_uses_with(instead)
        graph.erase_node(node)
        if again and not source.users:
            graph.erase_node(source)


def _norm(*args: Any) -> torch.Tensor:
    """A batch norm that torchao does not recognise."""
    return aten.batch_norm.default(*args)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _norms_hidden(module: fx.GraphModule) -> Iterator[list[fx.GraphModule]]:
    """Keeps torchao from folding the remaining batch norms; restores them at the end in all modules of the list.

    It would fold them even into convolutions that others read too, that have another norm, or that share their weight.
    """
    modules = [module]

    def exchange(before: Any, after: Any) -> None:
        for changed in modules:
            for node in changed.graph.find_nodes(op="call_function", target=before):
                node.target = after
            changed.recompile()

    exchange(aten.batch_norm.default, _norm)
    try:
        yield modules
    finally:
        exchange(_norm, aten.batch_norm.default)


def _unobserved(prepared: fx.GraphModule) -> Runner:
    """Runs a graph with observers that see and do nothing."""
    return Runner(prepared, instead=lambda node, args, _: args[0] if node.op == "call_module" else AS_IT_IS)


def widen_weight_scales(prepared: fx.GraphModule) -> None:
    """Raises weight scales so small that the bias, at input × weight scale, would overflow int32.

    A channel of zeros (pruned, or a dead batch norm) is the usual case. The product of both scales must not become
    subnormal either: smaller scales would not make the layer's outputs more precise in float32. ONNX Runtime also
    quantizes the biases that stay float here, those of products with more than two dimensions.
    """
    from lobo_fx.passes.quantization.integers.observers import SMALLEST_SCALE

    for layer in layers(prepared.graph):
        if layer.bias is None or not layer.input.op == layer.weight.op == "call_module":
            continue
        read = layer.bias.args[0] if layer.bias.op == "call_module" else layer.bias
        if not isinstance(read, fx.Node) or read.op != "get_attr":
            continue
        activation, weight = (prepared.get_submodule(str(node.target)) for node in (layer.input, layer.weight))
        bias = fetch(prepared, str(read.target)).detach()
        smallest = (bias.abs() / _LARGEST_BIAS).clamp_min(SMALLEST_SCALE) / activation.calculate_qparams()[0]  # type: ignore[operator]
        seen: Any = getattr(weight, "activation_post_process", weight)  # a fake quantizer holds its observer
        seen.max_val.copy_(torch.maximum(seen.max_val, smallest * seen.quant_max))
