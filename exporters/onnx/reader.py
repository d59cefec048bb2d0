"""Reads ONNX files as modules, so that a model whose PyTorch source is gone can be compiled.

A file becomes a module with a submodule for every operator that has weights, named as the file names them. The
file's computations on sizes stay computations on sizes (`lobo_fx.exporters.onnx.reader_sizes`), so that `torch.export`
follows them, and sizes that are free in the file stay free. The module is run beside ONNX Runtime, and refused if its
outputs differ.

The packages that do this were tried with torch 2.13 on files of `torch.onnx` and ours: onnx2torch 1.5.15, of 2024,
knows neither `ReduceMean` nor `Reshape` of today's opsets; onnx2pytorch 0.6.0 and onnx2fx 0.0.1, of 2026, keep sizes
in tensors, through which `torch.export` finds no way.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnx.loading import element_type, load_structure
from lobo_fx.exporters.onnx.reader_operators import ALIKE, OPERATORS, READS_KNOWN, torch_type
from lobo_fx.exporters.onnx.reader_sizes import SIZES, as_known, as_tensor
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.graph.inputs import Inputs

__all__ = ["READ_TOLERANCE", "OnnxModule", "example_inputs_of", "read_onnx"]

READ_TOLERANCE = 1e-4
"""Largest difference between a module and the file that it was read from, as a share of an output's range."""

_STANDARD = ("", "ai.onnx")
_CONSTANT = "Constant"
_QUANTIZED = re.compile(r"Q[A-Z].*|.*(Quantize|Integer|NBits).*")
_MOST_KNOWN = 1024
"""Longest vector of whole numbers that is taken for sizes, axes or places, which a graph holds as constants."""
_ROWS, _LENGTH = 2, 16
"""Sizes of example inputs where the file leaves them free: of the first dimension, and of others."""
_ROLES = {"BatchNormalization": ("", "weight", "bias", "running_mean", "running_var"), "Gather": ("weight",)}
_ROLE = ("input", "weight", "bias")
_TAKE_NUMBERS = ("Resize", "Upsample", "Pad")
"""Operators whose inputs after the first are numbers that a graph holds as constants."""
_STATISTICS = ("running_mean", "running_var")


class OnnxModule(nn.Module):
    """What a file computes; `read_onnx` makes it, and gives its `forward` the inputs that the file names.

    Args:
        graph: the file's graph.
        weights: the file's weights, by name.
        opset: version of the file's operators.
    """

    def __init__(self, graph: onnx.GraphProto, weights: Mapping[str, np.ndarray[Any, Any]], opset: int) -> None:
        super().__init__()
        numbers = {name for node in graph.node if node.op_type in _TAKE_NUMBERS for name in node.input[1:]}
        self.known = {name: as_known(array) for name, array in weights.items() if _is_known(array) or name in numbers}
        self.fed = {value.name: _python_name(value.name) for value in graph.input if value.name not in weights}
        self.specs = [value for value in graph.input if value.name in self.fed]
        self.made = [value.name for value in graph.output]
        if plain := [name for name in self.made if name in weights and name not in self.known]:
            raise InvalidInput(f"the output '{plain[0]}' is a stored weight, and not computed")
        read = {name for node in graph.node for name in node.input}
        stored = {name: _parameter(weights[name]) for name in weights if name in read and name not in self.known}
        self.steps: list[tuple[_Node, str]] = []
        for number, proto in enumerate(graph.node):
            if proto.op_type == _CONSTANT:
                continue
            node, place = _Node(proto, opset), ""
            if own := {at: stored[name] for at, name in enumerate(proto.input) if name in stored}:
                place = self._add(_Layer(node, own), _place(proto, own, number))
            self.steps.append((node, place))

    def _add(self, layer: _Layer, place: str) -> str:
        """Puts a layer where its name says, under a numbered name if that place is taken; returns the name."""
        *path, last = place.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        name, count = last, 1
        while hasattr(module, name):
            name, count = f"{last}_{count}", count + 1
        module.add_module(name, layer)
        return ".".join([*path, name])

    def run(self, given: Mapping[str, Any]) -> Any:
        """Computes outputs from inputs by the names of `forward`: one as it is, several in a dict by their names."""
        values: dict[str, Any] = {**self.known, "": None}
        values |= {name: given[own] for name, own in self.fed.items()}
        for node, place in self.steps:
            inputs = [values.get(name) for name in node.inputs]
            made = self.get_submodule(place)(*inputs) if place else node.compute(inputs)
            found = zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False)
            values |= {name: value for name, value in found if name}  # an output that is left out has no name
        outputs = {name: as_tensor(values[name]) for name in self.made}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs


class _Node:
    """An operator of the file, and the names of its inputs and outputs."""

    def __init__(self, proto: onnx.NodeProto, opset: int) -> None:
        self.operator, self.name = proto.op_type, proto.name or proto.op_type
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        self.attributes = {"opset": opset, "outputs": len(self.outputs)} | dict(_attributes(proto))

    def compute(self, inputs: Sequence[Any]) -> Any:
        """The operator's outputs.

        Raises:
            InvalidInput: PyTorch can't compute them, or not in a way that `torch.export` follows.
        """
        given = [entry for entry in inputs if entry is not None]
        try:
            if given and not any(isinstance(entry, torch.Tensor) for entry in given) and self.operator in SIZES:
                return SIZES[self.operator](self.attributes, *inputs)
            if self.operator not in READS_KNOWN:
                tensors = (entry.dtype for entry in given if isinstance(entry, torch.Tensor))
                kind = next(tensors, None) if self.operator in ALIKE else None
                inputs = [_plain(entry, len(given) == 1, kind) for entry in inputs]
            return OPERATORS[self.operator](self.attributes, *inputs)
        except ValueError as error:
            raise InvalidInput(f"{self.operator} '{self.name}' can't be read: {error}") from error
        except Exception as error:
            if torch.compiler.is_exporting():
                raise  # torch's own, by which it finds what sizes can be free
            reason = str(error).partition("\n")[0]
            raise InvalidInput(f"{self.operator} '{self.name}' can't be computed in PyTorch: {reason}") from error


class _Layer(nn.Module):
    """An operator with its stored tensors."""

    def __init__(self, node: _Node, stored: Mapping[int, nn.Parameter]) -> None:
        super().__init__()
        self.node, self.places = node, dict[int, str]()
        for at, tensor in stored.items():
            roles = _ROLES.get(node.operator, _ROLE)
            name = roles[at] if at < len(roles) else f"input_{at}"
            self.places[at] = name
            if name in _STATISTICS or not tensor.is_floating_point():
                self.register_buffer(name, tensor.detach())
            else:
                self.register_parameter(name, tensor)

    def forward(self, *inputs: Any) -> Any:
        """The operator's outputs."""
        return self.node.compute(
            [getattr(self, self.places[at]) if at in self.places else entry for at, entry in enumerate(inputs)]
        )


def read_onnx(path: Path, inputs: Inputs | None = None) -> nn.Module:
    """Reads a file and compares what was read with ONNX Runtime.

    Args:
        path: the file; nothing but PyTorch's operators is run for it.
        inputs: inputs to compare on; None makes them up.

    Raises:
        InvalidInput: the file is missing or damaged, is quantized already, has operators that can't be read (they are
            named), or what was read differs.
    """
    structure = load_structure(path)
    _check_operators(path, structure.graph)
    try:
        model = onnx.load(path)
    except Exception as error:
        raise InvalidInput(f"{path}: the weights beside it can't be read: {error}") from error
    opset = next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 1)
    try:
        weights = {tensor.name: _array(path, tensor) for tensor in model.graph.initializer}
        weights |= {node.output[0]: _constant(node) for node in model.graph.node if node.op_type == _CONSTANT}
        module = _with_forward(model.graph, weights, opset).eval()
        _compare(path, module, example_inputs_of(module) if inputs is None else inputs)
    except InvalidInput as error:
        raise InvalidInput(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return module


def example_inputs_of(module: nn.Module) -> Inputs:
    """Inputs for a file: seeded normal numbers; zeros and ones for whole numbers, as every vocabulary has them.

    Raises:
        InvalidInput: an input is no tensor, or has no shape.
    """
    assert isinstance(module, OnnxModule)
    generator, sizes, found = torch.Generator().manual_seed(0), dict[str, int](), dict[str, torch.Tensor]()
    for value in module.specs:
        spec = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not spec.HasField("shape"):
            raise InvalidInput(f"the input '{value.name}' has no shape; give --example-inputs")
        shape = [
            dim.dim_value or sizes.setdefault(dim.dim_param or f"{value.name}.{at}", _LENGTH if at else _ROWS)
            for at, dim in enumerate(spec.shape.dim)
        ]
        try:
            kind = torch_type(spec.elem_type)
        except ValueError as error:
            raise InvalidInput(f"the input '{value.name}' can't be made: {error}") from error
        drawn = torch.randn(shape, generator=generator)
        found[module.fed[value.name]] = drawn.to(kind) if kind.is_floating_point else (drawn > 0).to(kind)
    return Inputs((), found)


def _with_forward(graph: onnx.GraphProto, weights: Mapping[str, np.ndarray[Any, Any]], opset: int) -> OnnxModule:
    """The module, of a class whose `forward` takes the file's inputs by name."""

    def forward(self: OnnxModule, *args: Any, **kwargs: Any) -> Any:
        return self.run(signature.bind(self, *args, **kwargs).arguments)

    names = [_python_name(value.name) for value in graph.input if value.name not in weights]
    if len(set(names)) < len(names):
        raise InvalidInput(f"two inputs have names that Python takes for one: {', '.join(names)}")
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    made: OnnxModule = type("OnnxModule", (OnnxModule,), {"forward": forward})(graph, weights, opset)
    return made


def _check_operators(path: Path, graph: onnx.GraphProto) -> None:
    counts: Counter[str] = Counter()
    for node in graph.node:
        name = node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}"
        if _QUANTIZED.fullmatch(node.op_type):
            raise InvalidInput(f"{path} is quantized already ({name}); compile the file in float that it was made of")
        if name not in OPERATORS and name != _CONSTANT:
            counts[name] += 1
    if counts:
        said = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        raise InvalidInput(
            f"{path} has operators that can't be read: {said}. Compile the model's PyTorch source, or a .pt2 file of "
            "it; `lobo-fx inspect` and `lobo-fx benchmark` take the file as it is"
        )


def _compare(path: Path, module: OnnxModule, inputs: Inputs) -> None:
    """Runs the module and the file, and compares their outputs.

    Raises:
        InvalidInput: either can't run, or outputs differ.
    """
    session = OnnxRuntime().load(path, 1)
    try:
        bound = inspect.signature(module.forward).bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError as error:
        raise InvalidInput(f"the inputs given do not fit: {error}; it takes {', '.join(module.fed.values())}") from None
    try:
        wanted = session.run({name: bound[own].numpy() for name, own in module.fed.items()})
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(f"ONNX Runtime refuses these inputs ({reason}); give --example-inputs that fit") from error
    try:
        with torch.no_grad():
            made = module(**bound)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"it can't be computed in PyTorch: {error}") from error
    found = list(made.values()) if isinstance(made, dict) else [made]
    for name, one, other in zip(module.made, wanted, found, strict=True):
        difference = _difference(one, other.numpy())
        if not difference <= READ_TOLERANCE:
            raise InvalidInput(
                f"what was read differs from ONNX Runtime by {difference:.1e} of the range of '{name}', more than "
                f"{READ_TOLERANCE:.0e}; compile the model's PyTorch source instead, and please report the file"
            )


def _difference(wanted: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """The largest difference over the largest magnitude wanted; infinite if shapes, types, infinities or NaN differ."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return float("inf")
    if not wanted.size:
        return 0.0
    one, other = wanted.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return float("inf")
    largest = np.abs(one[finite]).max(initial=0.0) or 1.0
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0) / largest)


def _attributes(proto: onnx.NodeProto) -> Iterator[tuple[str, Any]]:
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        yield attribute.name, value.decode() if isinstance(value, bytes) else value


def _constant(node: onnx.NodeProto) -> np.ndarray[Any, Any]:
    name, value = next(_attributes(node), ("", None))
    if not name:
        raise InvalidInput(f"the constant '{node.output[0]}' holds no value")
    if name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise InvalidInput(f"the constant '{node.output[0]}' is a {name.removeprefix('value_')}, which can't be read")
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return np.asarray(value, kinds.get(name))


def _array(path: Path, tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    try:
        torch_type(tensor.data_type)
        return numpy_helper.to_array(tensor)
    except Exception as error:
        kind = element_type(tensor.data_type)
        raise InvalidInput(f"{path}: the weight '{tensor.name}' ({kind}) can't be read: {error}") from error


def _is_known(array: np.ndarray[Any, Any]) -> bool:
    return array.ndim == 0 or (array.ndim == 1 and array.dtype.kind in "iub" and array.size <= _MOST_KNOWN)


def _parameter(array: np.ndarray[Any, Any]) -> nn.Parameter:
    if array.dtype.name == "bfloat16":  # which numpy lacks, and torch takes as bits alone
        tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array.copy())
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def _plain(value: Any, alone: bool, kind: torch.dtype | None) -> Any:
    """A known value as a number, or as a tensor (of a `kind`) if it has dimensions or is the operator's only input."""
    if not isinstance(value, np.ndarray):
        return value
    return as_tensor(value, kind) if value.ndim or alone else value.item()


def _place(node: onnx.NodeProto, own: Mapping[int, nn.Parameter], number: int) -> str:
    """The path of a layer in the module: by its first weight's name (`layer1.0.conv1.weight`), or by its own name."""
    named = node.input[min(own)].rpartition(".")[0]
    path = named if named.strip(".") and not set("/:") & set(named) else node.name.replace("/", ".")
    path = path if path.strip(".") else f"{node.op_type}_{number}"
    return ".".join(_python_name(part, digits=True) for part in path.split(".") if part)


def _python_name(name: str, digits: bool = False) -> str:
    """A name that Python, and a module, can have."""
    found = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    if found[0].isdigit() and not (digits and found.isdigit()):
        found = f"_{found}"
    taken = keyword.iskeyword(found) or found == "self" or hasattr(OnnxModule, found)
    return f"{found}_" if taken else found
