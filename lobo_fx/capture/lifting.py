"""Writes a program in the form of `torch.export`, from its graph as it is: nothing is traced again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ArgumentSpec,
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.node import Argument
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from lobo_fx.capture.free_dimensions import write_free_dimensions
from lobo_fx.errors import ExportError
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program, ProgramModule
from lobo_fx.graph.shapes import free_symbols, propagate

__all__ = ["exported_program"]


def exported_program(program: Program) -> ExportedProgram:
    """The program as an `ExportedProgram`, in inference mode, with free dimensions kept free; it shares the tensors.

    In the graph of an exported program, stored tensors are inputs, and what is written to buffers is returned before
    the other outputs.

    Raises:
        ExportError: the graph holds what no exported program may, a call of a module for instance.
    """
    from torch._export.verifier import TrainingIRVerifier  # checks programs as `torch.export` returns them

    module = copy.copy(program.module).eval()  # a graph of its own
    propagate(module)
    known, lasting = module.program_facts.free_dimensions, module.state_dict(keep_vars=True)
    tensors, nesting = _stored(program.module), module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    values: list[Any] = [node.meta.get("val") for node in module.graph.nodes]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    assert mode.shape_env is not None
    allowed = mode.shape_env.var_to_range | {
        symbol: ValueRanges(dimension.lowest or 0, dimension.highest or int_oo)
        for symbol, dimension in zip(free_symbols(module.graph), known, strict=True)
    }
    given = module.graph.find_nodes(op="placeholder")
    for node in given:
        node.name = str(node.target)  # fx names an input apart from what Python has built in, such as `input`
    lifted = _lift(module.graph, tensors, lasting)
    for name, node in lifted.items():
        if "val" not in node.meta:  # nobody reads it
            node.meta["val"] = mode.from_tensor(tensors[name], static_shapes=True)
    outputs = _return_written(module.graph, {node: name for name, node in lifted.items()})
    inputs = [
        InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name)
        if isinstance(tensors[name], nn.Parameter)
        else InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=name in lasting)
        for name, node in lifted.items()
    ]
    inputs += [InputSpec(InputKind.USER_INPUT, _argument(node), None) for node in given]
    names = list(program.signature.names)
    calling = ModuleCallSignature([], [], nesting.in_spec, nesting.out_spec, forward_arg_names=names)
    try:
        exported = ExportedProgram(
            module,
            module.graph,
            ExportGraphSignature(inputs, outputs),
            dict(lasting),
            allowed,
            [ModuleCallEntry("", calling)],
            (program.example_inputs.args, dict(program.example_inputs.kwargs)),
            {name: tensor for name, tensor in tensors.items() if name not in lasting},
            verifiers=[TrainingIRVerifier],
        )
    except Exception as error:
        raise ExportError(f"the rewritten graph has no form that torch.export knows: {error}") from error
    write_free_dimensions(exported, known)
    return exported


def _stored(module: ProgramModule) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, shared ones under each of their names."""
    buffers = module.named_buffers(remove_duplicate=False)
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(buffers)}


def _lift(graph: fx.Graph, tensors: dict[str, torch.Tensor], lasting: Collection[str]) -> dict[str, fx.Node]:
    """Makes an input of each stored tensor, in place, before the others.

    A tensor that is read under several names is read by one of them throughout: in a saved program, buffers share no
    memory, and what is written to one name would not be read by another.

    Args:
        graph: changed.
        tensors: by name.
        lasting: the names in the state dict, which are taken before others.

    Returns:
        The inputs by the names of the tensors; those that nobody reads have no `val`.
    """
    with graph.inserting_before(next(iter(graph.nodes))):
        lifted = {name: graph.placeholder(re.sub(r"\W", "_", f"stored_{name}")) for name in tensors}
    for node in lifted.values():
        node.target = node.name  # which is unique
    reads = graph.find_nodes(op="get_attr")
    chosen: dict[int, fx.Node] = {}
    for name in sorted(map(str, (node.target for node in reads)), key=lambda name: name not in lasting):
        if name in lifted:
            chosen.setdefault(id(tensors[name]), lifted[name])
    for node in reads:
        if str(node.target) not in lifted:
            node.meta.pop("val", None)  # the graph of a branch
            continue
        placeholder = chosen[id(tensors[str(node.target)])]
        placeholder.meta.setdefault("val", node.meta["val"])
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
    return lifted


def _return_written(graph: fx.Graph, stored: dict[fx.Node, str]) -> list[OutputSpec]:
    """Returns what is written to stored tensors, before the outputs, instead of writing it, in place.

    Returns:
        What each output is.
    """
    written: dict[fx.Node, str] = {}
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        buffer, value = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        if buffer not in stored:
            continue
        if value in written or value.op == "placeholder":  # each is told by the name of a node of its own
            with graph.inserting_before(node):
                copied = graph.call_function(aten.clone.default, (value,))
            copied.meta["val"], value = value.meta["val"], copied
        written[value] = stored[buffer]
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    returned = list(cast("tuple[Argument, ...]", graph.output_node().args[0]))
    graph.output_node().args = ((*written, *returned),)
    return [
        *(OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(node.name), name) for node, name in written.items()),
        *(OutputSpec(OutputKind.USER_OUTPUT, _argument(value), None) for value in returned),
    ]


_COMPUTED: dict[type, Callable[[str], ArgumentSpec]] = {
    torch.SymInt: SymIntArgument,
    torch.SymFloat: SymFloatArgument,
    torch.SymBool: SymBoolArgument,
}


def _argument(value: object) -> ArgumentSpec:
    """An input or output, as `torch.export` describes it."""
    if not isinstance(value, fx.Node):
        return ConstantArgument("", value)  # type: ignore[arg-type]
    known = value.meta.get("val")
    if isinstance(known, torch.Tensor):
        return TensorArgument(value.name)
    kind = _COMPUTED.get(type(known))
    return ConstantArgument(value.name, known) if kind is None else kind(value.name)
