"""Model specifications for the command line: `torchvision:resnet50`, `timm:…`, `transformers:…`, `file.py:function`.

Architectures are built with seeded random weights; nothing is downloaded. A local checkpoint can fill in the weights:
safetensors, or a `.pt` file with only tensors (never a pickle).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobo_fx.capture.binding import check_arity
from lobo_fx.capture.outputs import keep_outputs
from lobo_fx.capture.tracing import Model, trace
from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.files import check_readable
from lobo_fx.graph.inputs import DynamicShapes, Inputs, as_inputs, dynamic_shapes_of
from lobo_fx.graph.notes import Note
from lobo_fx.graph.program import Program
from lobo_fx.sources.checkpoints import load_checkpoint, weights_in
from lobo_fx.sources.dynamic import for_all_inputs
from lobo_fx.sources.known_inputs import find_inputs
from lobo_fx.sources.libraries import head_outputs, is_config, timm_model, torchvision_model, transformers_model
from lobo_fx.sources.user_code import call_from_file

__all__ = ["build", "build_program", "trace_built", "weights_are_random"]


def build(
    spec: str, checkpoint: Path | None = None, seed: int = 0, float32: bool = False
) -> tuple[Model, Inputs | None]:
    """Builds the model that a specification names.

    Args:
        spec: `torchvision:NAME`, `timm:NAME`, `transformers:NAME` (a model type such as `whisper-tiny` or
            `bert`, or a folder with a `config.json`; with the head that the configuration names in `architectures`,
            or else that of the type's main task), `path/to/file.py:function` (called without
            arguments; returns a model, or a model and its example inputs), or `file.pt2`.
        checkpoint: weights to load, see `load_checkpoint`.
        seed: seed of the random weights.
        float32: whether floating-point weights and example inputs of other precisions are converted to float32.

    Returns:
        The model, and example inputs where the specification gives them.

    Raises:
        InvalidInput: an unknown name (similar ones are suggested), a missing package or file, or a checkpoint
            that does not fit.
    """
    if spec.endswith(".pt2"):
        if checkpoint is not None or float32:
            raise InvalidInput("a .pt2 file holds its own weights as they are; leave out the checkpoint and --float32")
        check_readable(Path(spec))
        return Path(spec), None
    builders: dict[str, Callable[[str], Any]] = {
        "torchvision": torchvision_model,
        "timm": timm_model,
        "transformers": transformers_model,
    }
    library, _, name = spec.partition(":")
    file, _, function = spec.rpartition(":")
    if not (name if library in builders else function and file.endswith(".py")):
        near = suggestion(library, builders) if name else ""
        raise InvalidInput(
            f"'{spec}' names no model; write torchvision:NAME, timm:NAME, transformers:NAME, "
            "path/to/file.py:function, file.pt2 or file.onnx" + (f"; {near}" if near.startswith("did you mean") else "")
        )
    torch.manual_seed(seed)
    made = builders[library](name) if library in builders else _from_file(Path(file), function)
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{spec} gives a {type(model).__name__}; expected an nn.Module")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    if float32:
        model = model.float()
        inputs = inputs and _widened(inputs)
    return model, inputs


def build_program(
    spec: str,
    checkpoint: Path | None = None,
    seed: int = 0,
    dynamic_shapes: DynamicShapes = "auto",
    outputs: Sequence[str] | None = None,
    float32: bool = False,
    example_inputs: Inputs | None = None,
) -> Program:
    """Builds and traces the model that a specification names.

    Args:
        spec: as `build` takes it.
        checkpoint: likewise.
        seed: likewise.
        dynamic_shapes: as `trace` takes it, or the result of `read_dynamic`.
        outputs: names of the outputs to keep. None keeps all; for `transformers:NAME` it keeps those of the head
            (`logits`), and a note lists the others.
        float32: as `build` takes it.
        example_inputs: inputs to trace with; None takes those of the specification or of the model.

    Raises:
        InvalidInput: as `build`, or an output that the model does not have, or sizes that it can't leave free.
        TraceError: the model can't be traced.
    """
    model, known = build(spec, checkpoint, seed, float32)
    inputs = known if example_inputs is None else _widened(example_inputs) if float32 else example_inputs
    return trace_built(spec, model, inputs, dynamic_shapes, outputs)


def trace_built(
    spec: str,
    model: Model,
    inputs: Inputs | None,
    dynamic_shapes: DynamicShapes = "auto",
    outputs: Sequence[str] | None = None,
) -> Program:
    """Traces a model that was built already.

    Args:
        spec: the specification that the model was built from.
        model: result of `build`, or a model that was read from another format.
        inputs: inputs to trace with; None where the model describes its own.
        dynamic_shapes: as `build_program` takes it.
        outputs: likewise.

    Raises:
        InvalidInput: an output that the model does not have, or sizes that it can't leave free.
        TraceError: the model can't be traced.
    """
    if isinstance(model, Path) and dynamic_shapes != "auto":
        raise InvalidInput(f"{spec} says itself which of its sizes are free; leave out --dynamic")
    if isinstance(dynamic_shapes, Mapping) and isinstance(model, nn.Module):
        inputs = find_inputs(model) if inputs is None else inputs
        check_arity(model, inputs)
        dynamic_shapes = for_all_inputs(dynamic_shapes, dynamic_shapes_of(inputs, model.forward, lambda leaf: None))
    program = trace(model, inputs, dynamic_shapes)
    if outputs:
        return keep_outputs(program, outputs)
    names = [output.name for output in program.signature.outputs if output is not None]
    kept = head_outputs(names) if spec.startswith("transformers:") else names
    if kept == names:
        return program
    program = keep_outputs(program, kept)
    gone = ", ".join(name for name in names if name not in kept)
    note = Note(f"outputs left out: {gone}; kept: {', '.join(kept)} (outputs= and --outputs choose others)")
    program.module.set_facts(notes=(*program.notes, note))
    return program


def _widened(inputs: Inputs) -> Inputs:
    return inputs.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def weights_are_random(spec: str, checkpoint: Path | None) -> bool:
    """Whether `build` initialises the weights at random, as far as the specification tells."""
    library, _, name = spec.partition(":")
    if checkpoint is not None or library not in ("torchvision", "timm", "transformers"):
        return False
    return library != "transformers" or not is_config(Path(name)) or weights_in(Path(name)) is None


def _from_file(path: Path, function: str) -> Any:
    made = call_from_file(path, function)
    if not isinstance(made, tuple):
        return made
    if len(made) != 2:
        raise InvalidInput(f"{path}:{function} returns {len(made)} values; expected a model, or a model and its inputs")
    return made[0], as_inputs(made[1])
