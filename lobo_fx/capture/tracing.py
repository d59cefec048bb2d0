"""The front end: from an `nn.Module`, an `ExportedProgram` or a `.pt2` file to a normalised `Program`."""

from __future__ import annotations

import contextlib
import copy
import re
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from lobo_fx.capture.binding import check_arity, gathered_named, in_order
from lobo_fx.capture.composites import write_composites_out
from lobo_fx.capture.constants import Constants, constants_located
from lobo_fx.capture.disguised_layers import reveal_layers
from lobo_fx.capture.free_dimensions import read_free_dimensions
from lobo_fx.capture.freeing import FreeSizes, constant_notes, free_sizes, only_sizes, step_notes
from lobo_fx.capture.normalize import normalize
from lobo_fx.capture.recurrent_stacks import separate_layers
from lobo_fx.capture.refusals import check_dynamic_shapes, check_traceable
from lobo_fx.errors import InvalidInput, TraceError
from lobo_fx.graph.inputs import FREED, HOW_TO_PASS, DynamicShapes, Inputs, as_inputs
from lobo_fx.graph.known_shapes import shapes_known
from lobo_fx.graph.masks import restore_masks
from lobo_fx.graph.node_facts import facts_of
from lobo_fx.graph.notes import Note
from lobo_fx.graph.operators import aten, is_call
from lobo_fx.graph.program import Program, ProgramModule, mark_always_training, seal
from lobo_fx.graph.provenance import describe, user_line
from lobo_fx.graph.randomness import drop_dead, random_state_kept
from lobo_fx.graph.shapes import PropagationError, has_free_dimension, propagate
from lobo_fx.graph.tensors import register
from lobo_fx.sources.known_inputs import find_inputs
from lobo_fx.terminal.quiet import no_errors_printed, quiet

__all__ = ["Model", "trace"]

Model = nn.Module | ExportedProgram | str | Path

_AT = " at "
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
_MOMENTUM = 0.1
"""Torch's default momentum, for batch norms that have None: a graph can't count batches as they do, and inference would
be traced with 0, so that statistics never followed the data in training."""


@random_state_kept
def trace(model: Model, example_inputs: object = None, dynamic_shapes: DynamicShapes = "auto") -> Program:
    """Captures a model as a normalised graph that shares its parameters; buffers are its own.

    Args:
        model: a module (its mode, device and weights are left as they were), an exported program, or the
            path of a `.pt2` file.
        example_inputs: a tensor, tuple or dict; None where the model describes its own inputs.
        dynamic_shapes: `"auto"` keeps the first dimension and the sequence lengths free where the model allows it,
            `"batch"` only the first dimension, `"all"` every size, also of images; None fixes every size; anything
            else is passed to `torch.export.export`.

    Raises:
        InvalidInput: the inputs can't be found or don't fit `forward`, or `dynamic_shapes` is no specification.
        TraceError: `torch.export` can't capture the model.
    """
    if isinstance(model, (str, Path)):
        from lobo_fx.capture.archive import read_pt2

        model = read_pt2(Path(model))
    if isinstance(model, ExportedProgram):
        if dynamic_shapes != "auto":
            raise InvalidInput("an exported program says itself which of its sizes are free; leave dynamic_shapes out")
        return _from_exported(model, example_inputs)
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model is a {type(model).__name__}; expected an nn.Module, an ExportedProgram or a path")
    if example_inputs is None:
        program = trace(model, find_inputs(model), dynamic_shapes)
        if dynamic_shapes not in FREED or dynamic_shapes == "batch":
            program.module.set_facts(notes=(*program.notes, *_lengths_chosen(program)))
        return program
    inputs = as_inputs(example_inputs)
    check_arity(model, inputs)
    inputs = in_order(model, inputs)
    check_dynamic_shapes(model, inputs, dynamic_shapes)
    check_traceable(model, inputs)
    if not isinstance(dynamic_shapes, str):
        return _program(_export(model, inputs, dynamic_shapes), inputs)
    return _freed(model, inputs, dynamic_shapes)


def _freed(model: nn.Module, inputs: Inputs, which: str) -> Program:
    """A program with as many of the requested sizes free as the model allows; notes say why others are not.

    If the batch, or all requested sizes together, can't be free, fewer are requested.
    """
    reasons: dict[str, str] = {}
    wanted = bool(free_sizes(inputs, model.forward, which)[2])
    attempts = (which, "batch", "steps", *["sizes"] * (which == "all"), "lengths") if wanted else ("batch", "steps")
    for attempt in dict.fromkeys(attempts):
        constants = Constants()
        try:
            program, requested = _freed_as(model, inputs, attempt, constants)
        except TraceError as error:
            reasons[attempt] = _why_fixed(error)
            continue
        if not any(has_free_dimension(n.meta.get("val")) for n in program.graph.find_nodes(op="placeholder")):
            continue
        notes = constant_notes(requested, program.signature, constants, getattr(model, "main_input_name", None))
        notes += step_notes(program.signature)
        if attempt in ("batch", "steps") and which in reasons:
            reason = reasons[which] if attempt == "batch" else "not every batch size is allowed"
            notes.append(f"every size but the batch is fixed: {reason}")
        elif attempt in ("sizes", "lengths"):
            notes.append(f"the batch size is fixed: {reasons['batch']}")
        program.module.set_facts(notes=(*program.notes, *map(Note, notes)))
        return program
    program = _program(_export(model, inputs, None), inputs)
    reason = reasons.get("batch", "the model's code depends on it")
    program.module.set_facts(notes=(*program.notes, Note(f"the batch size is fixed: {reason}")))
    return program


def _freed_as(model: nn.Module, inputs: Inputs, attempt: str, constants: Constants) -> tuple[Program, list[FreeSizes]]:
    """A program with the sizes of one attempt free, and those requested besides the batch.

    A size that torch leaves free, but whose guards hold for the example alone, is fixed in another capture: shapes in
    the graph would be wrong for any other.
    """
    fixed: set[tuple[int, int]] = set()
    while True:
        batched, specification, requested = free_sizes(inputs, model.forward, attempt, fixed)
        exported = _export(model, batched, specification, doubled=batched is not inputs, constants=constants)
        program = _program(exported, inputs)
        only = only_sizes(requested, program.signature)
        if not only:
            return program, free_sizes(inputs, model.forward, attempt)[2]
        fixed |= only


def _why_fixed(error: TraceError) -> str:
    """The user's line that fixes the batch, and torch's reason unless it only says that the size became a constant."""
    told, *reasons = str(error).split("\n")
    reasons = reasons[:-1]  # the last line says what to do
    line, reason = told.partition(_AT)[2], " ".join(" ".join(reasons).split())
    if "specialized it to be a constant" in reason:
        return f"{line or 'the model'} depends on it"
    return f"{line}: {reason}" if line else reason


def _lengths_chosen(program: Program) -> list[Note]:
    """Notes about inputs whose length was chosen without example inputs, and is fixed."""
    return [
        Note(
            f"'{spec.name}' has a fixed length of {spec.shape[1]}, chosen for want of example inputs: for another one "
            f"pass example_inputs=, for any dynamic_shapes={{'{spec.name}': {{0: Dim('batch'), 1: Dim.AUTO}}, ...}}"
        )
        for spec in program.signature.inputs
        if spec is not None and len(spec.shape) == 2 and isinstance(spec.shape[1], int)
    ]


def _export(
    model: nn.Module, inputs: Inputs, dynamic_shapes: Any, doubled: bool = False, constants: Constants | None = None
) -> ExportedProgram:
    """Runs `torch.export` in inference mode, and reports errors in the user's terms."""
    with (
        _inference_mode(model),
        gathered_named(model, inputs),
        quiet(),
        shapes_known(),
        no_errors_printed(),
        constants_located(constants) as fixed,
    ):
        try:
            return torch.export.export(
                model, inputs.args, dict(inputs.kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
        except Exception as error:
            if not doubled:
                _check_runs(model, inputs)
            line = user_line("".join(traceback.format_tb(error.__traceback__))) or next(
                filter(None, fixed.lines.values()), ""
            )
            reason = _reason(error)
            where = f"{_AT}{line}" if line else ""
            raise TraceError(
                f"torch.export can't capture {type(model).__name__}{where}\n"
                f"{type(error).__name__}: {reason}\n{_hint(error, inputs)}"
            ) from None


def _reason(error: Exception) -> str:
    """Torch's complaint; for free dimensions in full, with the fixes that it suggests."""
    text = str(error).strip().partition("\n\nThe error above occurred")[0]
    return text if "Constraints violated" in text else text.split("\n")[0] or type(error).__name__


def _check_runs(model: nn.Module, inputs: Inputs) -> None:
    """Refuses inputs that the model itself refuses."""
    trial, inputs = copy.deepcopy(model), inputs.map(torch.Tensor.clone)  # it may write into them
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            trial(*inputs.args, **inputs.kwargs)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InvalidInput(
                f"{type(model).__name__} refuses these example_inputs: {reason}. {HOW_TO_PASS}"
            ) from None


def _hint(error: Exception, inputs: Inputs) -> str:
    """Advice for an error: to change control flow or free sizes, or else to check the inputs."""
    if "DataDependent" in type(error).__name__ or "data-dependent" in str(error).lower():
        return (
            "The code depends on values, which a graph can't follow: use torch.where or torch.cond; see "
            "https://pytorch.org/docs/stable/export.html#limitations-of-torch-export"
        )
    if re.search(r"specialized it to be a constant \([01]\)", str(error)):
        return "torch.export fixes sizes of 0 and 1: where a size is to be free, give example inputs of at least 2"
    lines = "".join(traceback.format_tb(error.__traceback__))
    sizes_are_values = "nn/modules/rnn.py" in lines and "argument 'size' failed to unpack" in str(error)
    if "pack_padded_sequence" in lines or sizes_are_values:
        return "Packed sequences have no graph: run the layer on padded rows, and choose the last steps by torch.gather"
    if "in output, which is not a known type" in str(error):
        return (
            "Register the class: torch.export.register_dataclass(TheClass) for a dataclass, or return a dict or tuple"
        )
    if "Constraints violated" in str(error):
        return "Give the sizes that torch suggests, if any, or Dim.AUTO: what the model's code allows then stays free"
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in inputs.tensors)
    return f"Check that the example inputs are what the model takes: {shapes}"


@contextlib.contextmanager
def _inference_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within the context; afterwards restores attributes that `forward` set, and every submodule's mode."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)  # not among the attributes of scripted modules
            for attribute in [vars(module), *vars(module).values()]:
                if type(attribute) in _CONTAINERS:
                    stack.callback(_put_back, attribute, copy.copy(attribute))
        model.eval()
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.momentum is None:
                module.momentum = _MOMENTUM
        configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
        for config in configs:
            if getattr(config, "use_cache", None) is True:
                stack.callback(setattr, config, "use_cache", True)
                config.use_cache = False  # a cache of keys and values is not part of a single call
        yield


def _put_back(container: Any, before: Any) -> None:
    """Restores the entries of a dictionary, list or set."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)


def _from_exported(exported: ExportedProgram, example_inputs: object) -> Program:
    if example_inputs is None:
        if exported.example_inputs is None:
            raise InvalidInput("the exported program holds no example inputs; pass example_inputs=")
        example_inputs = Inputs(*exported.example_inputs)
    program = _program(exported, as_inputs(example_inputs))
    training = [str(node.target) for node in program.graph.nodes if facts_of(node).always_training]
    if training:
        note = Note(
            f"WARNING: exported in training mode, and kept in it: {', '.join(dict.fromkeys(training))}; unless that is "
            "meant, call model.eval() before torch.export.export"
        )
        program.module.set_facts(notes=(*program.notes, note))
    return program


def _program(exported: ExportedProgram, inputs: Inputs) -> Program:
    """A normalised program with its shapes propagated and its signature fixed."""
    if any(tensor.device.type != "cpu" for tensor in exported.state_dict.values()):
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, "cpu")
    with quiet():
        traced = exported.module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    module = ProgramModule(traced, traced.graph)
    buffers: dict[int, torch.Tensor] = {}
    torch.nn.Module.train(module, False)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        buffers.setdefault(id(buffer), buffer.detach().clone())
        # running it must not change the user's buffers; a plain attribute (`self.scale = tensor`) is in no state dict
        register(module, name, buffers[id(buffer)], persistent=name in exported.state_dict)
    module.set_facts(free_dimensions=read_free_dimensions(exported, module.graph))
    module.set_facts(notes=tuple(normalize(module)))
    separate_layers(module.graph)
    mark_always_training(module)
    drop_dead(module.graph)
    module.recompile()
    try:
        propagate(module)
        if write_composites_out(module):
            propagate(module)
        if reveal_layers(module):
            propagate(module)
    except PropagationError as error:
        if is_call(error.node, aten.copy_.default) and "a leaf Variable that requires grad" in error.reason:
            weight = cast("fx.Node", error.node.args[0]).target
            raise TraceError(
                f"forward writes into the weight '{weight}' (an embedding with max_norm does, for instance), which a "
                "graph can't while it trains: freeze it (requires_grad_(False)), or compute a new tensor from it"
            ) from error
        raise TraceError(f"shapes can't be followed through {describe(error.node)}: {error.reason}") from error
    seal(module)
    bound = module.signature.bind(inputs.args, inputs.kwargs)  # type: ignore[union-attr]
    program = Program(module, bound.to("cpu"))
    restore_masks(program)
    return program
