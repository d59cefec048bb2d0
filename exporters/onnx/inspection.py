"""Describes an ONNX file, ours or a stranger's: operators, precisions, sizes, kernels, and where the time goes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnx.loading import element_type, files_of, load_structure, shown_value
from lobo_fx.exporters.onnxruntime.profile import KernelTime, kernel_times
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.measures.latency import MEGABYTE, random_arrays, random_shape
from lobo_fx.plugins.protocols import Arrays
from lobo_fx.terminal.tables import decimals, new_table, printable, render

__all__ = ["FileFacts", "Stored", "inspect_file"]

_MOST_INPUT = 2**31
"""Bytes of an input that are made up to measure with; a file that wants more is read, not run."""
_SHORT = 200
"""Longest entry of metadata that is shown unasked: a list of passes fits, a vocabulary does not."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Weights of one element type.

    Attributes:
        tensors: number of tensors.
        elements: numbers in them.
        bytes: bytes that they take in the file.
    """

    tensors: int
    elements: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """What is in a file.

    Attributes:
        path: path of the file.
        bytes: bytes of the file and of the weights beside it.
        producer: name and version of the program that wrote the file.
        ir_version: version of the file format.
        opsets: versions of operators, by domain.
        inputs: inputs in words.
        outputs: outputs in words.
        metadata: what the file says of itself; ours name version, model and passes.
        operators: by operator, how often it occurs, by the element type that it computes on.
        stored: weights, by element type.
        kernels: what ONNX Runtime runs after its optimisations, and how long; empty where it can't.
        not_run: why there are no kernels; empty where there are.
    """

    path: Path
    bytes: int
    producer: str
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str]
    operators: Mapping[str, Mapping[str, int]]
    stored: Mapping[str, Stored]
    kernels: tuple[KernelTime, ...] = ()
    not_run: str = ""

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def to_text(self, verbose: bool = False) -> str:
        """Lines and tables for a terminal.

        Args:
            verbose: also the metadata in full.
        """
        opsets = ", ".join(f"{domain} {version}" for domain, version in self.opsets.items())
        said = [
            f"{self.path}: {decimals(self.bytes / MEGABYTE)} MB, ONNX IR {self.ir_version}, opset {opsets}",
            *([f"written by {self.producer}"] if self.producer else []),
            *(f"input: {line}" for line in self.inputs),
            *(f"output: {line}" for line in self.outputs),
            *(f"{name}: {value}" for name, value in self.metadata.items() if verbose or len(value) <= _SHORT),
        ]
        operators = new_table("operators", ["operator", "count", "computes on"])
        for name, types in self.operators.items():
            on = ", ".join(f"{count} {kind}" if len(types) > 1 else kind for kind, count in types.items())
            operators.add_row(name, str(sum(types.values())), on)
        stored = new_table("weights", ["stored as", "tensors", "numbers", "MB"])
        for name, entry in self.stored.items():
            stored.add_row(name, str(entry.tensors), f"{entry.elements:,}", decimals(entry.bytes / MEGABYTE))
        tables = [operators, *([stored] if self.stored else [])]
        if self.kernels:
            whole = sum(kernel.microseconds for kernel in self.kernels) or 1.0
            title = f"kernels of {OnnxRuntime().version}, one thread: {whole / 1e3:.3f} ms"
            kernels = new_table(title, ["kernel", "computes on", "count", "ms", "share"])
            for kernel in self.kernels:
                time = kernel.microseconds
                kernels.add_row(kernel.name, kernel.type, str(kernel.count), f"{time / 1e3:.3f}", f"{time / whole:.1%}")
            tables.append(kernels)
        lines = "".join(f"{printable(line.replace(chr(10), ' '))}\n" for line in said)  # no name looks like a line
        notes = f"note: {printable(self.not_run)}\n" if self.not_run else ""
        return lines + "".join(map(render, tables)) + notes


def inspect_file(path: Path, arrays: Arrays | None = None, batch: int = 1) -> FileFacts:
    """Reads a file, and times it in ONNX Runtime; nothing else is run.

    Args:
        path: path of the file.
        arrays: inputs by name to time it with; None makes up random ones.
        batch: rows of random inputs, where they are free; every other free size is 64.

    Raises:
        InvalidInput: the file is missing, damaged, or wants files from elsewhere. One that ONNX Runtime can't load
            is described all the same, with the reason.
    """
    model = load_structure(path)
    kernels, not_run = _timed(path, arrays, batch)
    return FileFacts(
        path,
        sum(file.stat().st_size for file in files_of(path, model)),
        " ".join(filter(None, (model.producer_name, model.producer_version))),
        model.ir_version,
        {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        tuple(shown_value(value) for value in _fed(model.graph)),
        tuple(shown_value(value) for value in model.graph.output),
        {entry.key: entry.value for entry in model.metadata_props},
        _operators(model),
        _stored(model.graph),
        kernels,
        not_run,
    )


def _timed(path: Path, arrays: Arrays | None, batch: int) -> tuple[tuple[KernelTime, ...], str]:
    try:
        specs = OnnxRuntime().load(path, 1).inputs
        if arrays is None:
            wanted = 8 * sum(math.prod(random_shape(spec, batch)) for spec in specs)
            if wanted > _MOST_INPUT:
                return (), f"not run: its inputs would take {wanted / 1e9:,.1f} GB"
            arrays = random_arrays(specs, batch)
        if missing := [spec.name for spec in specs if spec.name not in arrays]:
            raise InvalidInput(f"the inputs given lack '{missing[0]}'")
        return tuple(kernel_times(path, arrays)), ""
    except InvalidInput as error:
        return (), f"not run: {' '.join(str(error).split())}"
    except Exception as error:
        reason = " ".join(str(error).split())
        return (), f"not run on these inputs: {reason}; --example-inputs gives others"


def _fed(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Inputs that a caller gives: old files list their weights as inputs too."""
    stored = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in stored]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those inside its nodes (branches, loops)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _operators(model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Counts operators, by name and element type of the first typed input, most frequent first."""
    try:
        typed = onnx.shape_inference.infer_shapes(model).graph
    except Exception:
        typed = model.graph  # types of a malformed graph are not known
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for graph in _graphs(typed):
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            types.setdefault(value.name, value.type.tensor_type.elem_type)
        for node in graph.node:
            kinds = (types[name] for name in (*node.input, *node.output) if types.get(name))
            counts[_operator(node)][element_type(next(kinds, 0))] += 1
    ranked = sorted(counts.items(), key=lambda entry: (-sum(entry[1].values()), entry[0]))
    return {name: dict(found.most_common()) for name, found in ranked}


def _operator(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _stored(graph: onnx.GraphProto) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for part in _graphs(graph):
        for tensor in part.initializer:
            name, old = element_type(tensor.data_type), found.get(element_type(tensor.data_type), Stored(0, 0, 0))
            elements = math.prod(tensor.dims)
            found[name] = Stored(old.tensors + 1, old.elements + elements, old.bytes + _bytes(tensor))
    return dict(sorted(found.items(), key=lambda entry: -entry[1].bytes))


def _bytes(tensor: onnx.TensorProto) -> int:
    beside = next((int(e.value) for e in tensor.external_data if e.key == "length" and e.value.isdecimal()), None)
    if beside is not None:
        return beside
    return len(tensor.raw_data) or tensor.ByteSize()
