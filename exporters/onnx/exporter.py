"""Exports ONNX: a file is written beside its place, checked, compared with PyTorch, and only then moved there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from lobo_fx.capture.lifting import exported_program
from lobo_fx.errors import ExportError, InvalidInput
from lobo_fx.exporters.onnx.cleanup import clean, strip_metadata
from lobo_fx.exporters.onnx.decomposing import as_decomposed, with_translated_calls
from lobo_fx.exporters.onnx.names import name_nodes
from lobo_fx.exporters.onnx.nodes import file_graph
from lobo_fx.exporters.onnx.packing import NARROW_TYPES, SHARED_BYTES, PackedWeight, pack
from lobo_fx.exporters.onnx.preparation import (
    with_drawn_dropout,
    with_plain_attention,
    with_plain_products,
    with_plain_splits,
    with_rounded_weights,
    without_gradients,
)
from lobo_fx.exporters.onnx.recurrent import refuse_projections
from lobo_fx.exporters.onnx.simplifying import simplify
from lobo_fx.exporters.onnx.translations import Translations, no_form, refuse_untranslated, translation_table
from lobo_fx.exporters.onnx.versions import lower_versions, needs
from lobo_fx.exporters.onnx.weights_beside import name_weights
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime, kernels
from lobo_fx.exporters.onnxruntime.session_options import SUFFIX
from lobo_fx.exporters.parity import NoisierThanRounding, Parity, check_draws, check_parity, is_quantized, state_error
from lobo_fx.files import followed, written_beside
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.known_shapes import shapes_known
from lobo_fx.graph.masks import without_masks
from lobo_fx.graph.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, arguments, aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.randomness import drawing, draws
from lobo_fx.graph.running import written_buffers
from lobo_fx.graph.shapes import output_values
from lobo_fx.graph.sized_inputs import named_arrays, other_lengths, with_rows, with_sizes
from lobo_fx.graph.tensors import unusual_weight
from lobo_fx.measures.counts import rows
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.machine import products_saturate
from lobo_fx.own_operators.lstm import DYNAMIC_LSTM
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.plugins.file_nodes import FileGraph
from lobo_fx.plugins.protocols import Session
from lobo_fx.terminal.quiet import quiet

__all__ = ["LARGEST_SINGLE_FILE", "OLDEST_OPSET", "OnnxExporter", "newest_opset"]

LARGEST_SINGLE_FILE = 2**31 - 2**20
"""Bytes that fit one protobuf file; weights past that go to a file beside it."""

OLDEST_OPSET = 18
"""The oldest opset that `torch.onnx` writes without converting down, which loses what older operators lack."""


def newest_opset() -> int:
    """The newest opset that the installed onnx knows."""
    import onnx

    return int(onnx.defs.onnx_opset_version())


@dataclasses.dataclass(frozen=True)
class OnnxExporter:
    """Writes ONNX for ONNX Runtime.

    Attributes:
        opset: version of the standard operators, at least 18; None takes the lowest that the program needs.
        translations: from operator overloads to onnxscript functions, for operators that `torch.onnx`
            does not know (its `custom_translation_table`).
        external_data: weights in a file beside the model; None decides by size (past 2 GB).
        storage: `packed` stores each weight in whatever takes fewer bytes: as it is, or as a bit mask and the
            values that are not zero (see `lobo_fx.exporters.onnx.packing`). The file computes the same and loads a
            little later.
        values: packed weights rounded to `float16` or `bfloat16`, and widened when the file is loaded; None leaves
            them as they are.
        compare: whether the file is compared with PyTorch, as it should be unless it is only measured; its `parity` is
            NaN else.
    """

    suffix: ClassVar[str] = ".onnx"
    opset: int | None = None
    translations: Translations | None = None
    external_data: bool | None = None
    storage: Literal["dense", "packed"] = "dense"
    values: Literal["float16", "bfloat16"] | None = None
    compare: bool = True

    def __post_init__(self) -> None:
        newest = newest_opset()
        if self.opset is not None and not (isinstance(self.opset, int) and OLDEST_OPSET <= self.opset <= newest):
            raise InvalidInput(f"opset is {self.opset!r}; it must be from {OLDEST_OPSET} to {newest}")
        if self.storage not in ("dense", "packed"):
            raise InvalidInput(f"storage is {self.storage!r}; it must be 'dense' or 'packed'")
        if self.values is not None and self.values not in tuple(NARROW_TYPES):
            raise InvalidInput(f"values is {self.values!r}; it must be {' or '.join(map(repr, NARROW_TYPES))}, or None")
        if self.values is not None and self.storage != "packed":
            raise InvalidInput(f"values={self.values!r} is how packed weights are stored: give storage='packed' too")

    def export(self, program: Program, path: Path, metadata: Mapping[str, str]) -> Artifact:
        """Writes `path`, and where weights are stored apart a file beside it, which `path` names by its content.

        Raises:
            InvalidInput: the path can't be written to.
            ExportError: an operator has no ONNX form, or the file disagrees with PyTorch; nothing is left.
        """
        path = followed(path)
        _check_program(program)
        program, rounding = self._as_stored(program)
        with written_beside(path, [f"{path.name}{SUFFIX}"]) as folder:
            model = self._translate(program)
            opset = model.model.opset_imports[""]
            if self.opset not in (None, opset):
                raise ExportError(f"torch.onnx wrote opset {opset} where {self.opset} was asked for")
            clean(model.model)
            lower_versions(model.model, keep_opset=self.opset is not None)
            packed = []
            if self.storage == "packed":
                packed = pack(model.model, self.values)
                lower_versions(model.model, keep_opset=self.opset is not None)
            name_nodes(model.model)
            strip_metadata(model.model)
            opset = model.model.opset_imports[""]
            _describe(model.model, program, metadata)
            external = self._stored_apart(program)
            with quiet():
                model.save(folder / path.name, external_data=external)
                name_weights(folder / path.name)
            parity, details = _check(program, folder / path.name) if self.compare else (math.nan, {})
            _tell(folder / path.name, "lobo_fx.parity", "not compared" if math.isnan(parity) else f"{parity:.1e}")
            written = sorted(folder.iterdir())
            size = sum(file.stat().st_size for file in written)
        files = tuple(path.parent / file.name for file in written)
        details |= {"opset": opset, "needs": needs(model.model)}
        if self.storage == "packed":
            details["packed"] = _saved(packed) | rounding
        return Artifact(path, files, size, parity, details)

    def check_program(self, program: Program) -> None:
        """Refuses what has no ONNX form, before passes are run; see `ChecksPrograms`.

        Operators are looked up among those that `torch.onnx` knows; it finds the rest when a file is written.

        Raises:
            ExportError: names the operator, weight or output.
        """
        _check_program(program)
        refuse_untranslated(program, translation_table(self.translations, program))

    def check(self, program: Program, path: Path, session: Session) -> tuple[float, dict[str, Any]]:
        """Compares a file that was changed since `export` wrote it, as `export` does; see `ChecksFiles`.

        Raises:
            ExportError: the file is malformed, or disagrees.
        """
        return _check(self._as_stored(program)[0], path, session)

    def _as_stored(self, program: Program) -> tuple[Program, dict[str, Any]]:
        """The program that a file is compared with, and what rounding its weights costs."""
        program = without_masks(program)
        return (program, {}) if self.values is None else _rounded(program, self.values)

    def nodes(self, path: Path) -> FileGraph:
        """The nodes of a file that it wrote."""
        return file_graph(path)

    def _translate(self, program: Program) -> Any:
        table, signature = translation_table(self.translations, program), program.signature
        program = with_translated_calls(program, table)  # first: calls that the others insert have no shapes
        program = with_plain_splits(with_plain_products(with_plain_attention(with_drawn_dropout(program))))
        with without_gradients(program), quiet(), shapes_known():
            exported = as_decomposed(exported_program(program), table)
            try:
                translated: Any = torch.onnx.export(
                    exported,
                    dynamo=True,
                    verbose=False,
                    opset_version=self.opset,
                    custom_translation_table=table,
                    optimize=False,
                )
                simplify(translated.model)
            except Exception as error:
                raise ExportError(_explain(program, error)) from error
        graph = translated.model.graph
        for values, specs in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
            for value, spec in zip(values, filter(None, specs), strict=True):
                value.name = spec.name
        return translated

    def _stored_apart(self, program: Program) -> bool:
        if self.external_data is not None:
            return self.external_data
        tensors = [*program.module.parameters(), *program.module.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) > LARGEST_SINGLE_FILE


def _rounded(program: Program, values: str) -> tuple[Program, dict[str, Any]]:
    """The program with its weights rounded, and details: the decibels that stay, and the weights left out of range."""
    rounded, left = with_rounded_weights(program, getattr(torch, values))
    decibels = signal_to_noise(program.run(), rounded.run())
    lost = {"decibels": decibels} if math.isfinite(decibels) else {}
    return rounded, {"values": values, "out_of_range": left, **lost}


def _saved(packed: list[PackedWeight]) -> dict[str, Any]:
    """What packing saved, as an artifact says it."""
    weights = {weight.name: [weight.form, weight.dense_bytes, weight.bytes] for weight in packed}
    shared = SHARED_BYTES if any(weight.is_masked for weight in packed) else 0
    return {"saved": sum(weight.dense_bytes - weight.bytes for weight in packed) - shared, "weights": weights}


def _check_program(program: Program) -> None:
    """Refuses what no file could hold.

    Raises:
        ExportError: names the operator, weight or output.
    """
    _check_weights(program)
    _check_outputs(program)
    _check_attention(program)
    _check_groups(program)
    refuse_projections(program)


def _check_weights(program: Program) -> None:
    """Refuses weights that ONNX Runtime has few kernels for on CPU.

    Raises:
        ExportError: a parameter is bfloat16 or float64.
    """
    if unusual := unusual_weight(program.module):
        raise ExportError(f"{unusual}: compile model.float() instead")


def _check_attention(program: Program) -> None:
    """Refuses attention that drops in inference: a file would not.

    Raises:
        ExportError: names the call.
    """
    target = aten.scaled_dot_product_attention.default
    dropping = next(filter(draws, program.graph.find_nodes(op="call_function", target=target)), None)
    if dropping is not None:
        raise ExportError(
            f"{describe(dropping)} drops out in inference too, which has no ONNX form: "
            "pass dropout_p=self.p if self.training else 0.0"
        )


def _check_groups(program: Program) -> None:
    """Refuses convolutions with a free number of groups, the batch's for instance: ONNX has a fixed one.

    Raises:
        ExportError: names the call.
    """
    for node in program.graph.nodes:
        if is_call(node, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS) and isinstance(arguments(node)["groups"], fx.Node):
            raise ExportError(
                f"{describe(node)} has a free number of groups, which has no ONNX form: fix that size, by "
                "dynamic_shapes=None"
            )


def _check_outputs(program: Program) -> None:
    """Refuses outputs that a file can't hold.

    Raises:
        ExportError: an output is no tensor (and not None), or there is none.
    """
    values = output_values(program.graph)
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, torch.Tensor):
            raise ExportError(
                f"output {index} is {value!r}, no tensor; ONNX holds tensors: return one, or leave it out with outputs="
            )
    if not any(isinstance(value, torch.Tensor) for value in values):
        raise ExportError("the model returns no tensor; there is nothing to export")


def _describe(model: Any, program: Program, metadata: Mapping[str, str]) -> None:
    """Names free dimensions as the program does, and writes what was done into the file's metadata.

    A size that is computed from free ones is named after its place, since names in a file are identifiers.
    """
    renamed: dict[str, str] = {}
    for values, specs in (
        (model.graph.inputs, program.signature.inputs),
        (model.graph.outputs, program.signature.outputs),
    ):
        for value, spec in zip(values, [spec for spec in specs if spec], strict=True):
            for index, size in enumerate(spec.shape):
                if isinstance(size, str):
                    name = size if size.isidentifier() else re.sub(r"\W", "_", f"{spec.name}_size_{index}")
                    value.shape[index] = renamed.setdefault(str(value.shape[index]), name)
    for value in [value for node in model.graph for value in node.outputs]:
        if value.shape is not None and value.shape.is_dynamic():  # a new shape: the old one may be frozen
            sizes = [size if isinstance(size, int) else renamed.get(str(size), size) for size in value.shape]
            value.shape = type(value.shape)(sizes)
    model.producer_name, model.producer_version = "lobo-fx", metadata.get("lobo_fx.version", "")
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.metadata_props["lobo_fx.runtime"] = OnnxRuntime().version
    model.metadata_props["lobo_fx.opset"] = str(model.opset_imports[""])
    signature = {
        "inputs": list(map(str, program.signature.inputs)),
        "outputs": list(map(str, program.signature.outputs)),
    }
    model.metadata_props["lobo_fx.signature"] = json.dumps(signature)


def _check(program: Program, path: Path, session: Session | None = None) -> tuple[float, dict[str, Any]]:
    """Checks the file, runs it beside PyTorch on the example, and with other rows and lengths where they are free.

    Args:
        program: the program that the file was written of.
        path: the file.
        session: session that runs the file; a new one if left out.

    Raises:
        ExportError: the file is malformed, does not load, or disagrees.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path))
        # several threads share out the rows of an LSTM's hidden states, and each takes its own range
        shared = any(is_call(node, DYNAMIC_LSTM) for node in program.graph.nodes)
        session = session or OnnxRuntime().load(path, threads=1 if shared else 0)
    except Exception as error:
        raise ExportError(f"the exported file is not valid for ONNX Runtime: {error}") from error
    details: dict[str, Any] = {}
    batches = [with_rows(program, rows(program) + more) for more in range(2 if program.signature.batch else 1)]
    batches += _of_other_lengths(program, batches[-1])
    try:
        parities = [_parity(program, inputs, session) for inputs in batches]
    except NoisierThanRounding as error:
        if not products_saturate():
            raise
        session, details["saturated"] = OnnxRuntime().load_exact(path), error.decibels
        parities = [_parity(program, inputs, session) for inputs in batches]
    worst = min(parities, key=lambda parity: parity.decibels)
    if math.isfinite(worst.decibels):
        details |= {"decibels": worst.decibels, "worst_part": worst.part}
    if is_quantized(program):
        details["kernels"] = kernels(path)
    if buffers := written_buffers(program.graph):
        again = session.run(named_arrays(program, batches[0]))
        details["state"] = {"buffers": buffers, "second_call": state_error(program, batches[0], again)}
    return max(parity.error for parity in parities), details


def _parity(program: Program, inputs: Inputs, session: Session) -> Parity:
    """How far a file agrees with PyTorch on inputs of some sizes; what draws random numbers must draw."""
    try:
        found = session.run(named_arrays(program, inputs))
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs.tensors)
        raise ExportError(f"ONNX Runtime can't run the exported file on inputs of {shapes}: {error}") from error
    parity = check_parity(program, inputs, found)
    if drawing(program.module):
        check_draws(program, inputs, found, session.run(named_arrays(program, inputs)))
    return parity


def _tell(path: Path, name: str, value: str) -> None:
    """Adds an entry to a file's metadata."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    told = {entry.key: entry.value for entry in model.metadata_props} | {name: value}
    onnx.helper.set_model_props(model, dict(sorted(told.items())))
    onnx.save(model, path)


def _of_other_lengths(program: Program, inputs: Inputs) -> list[Inputs]:
    """Inputs of other lengths, where some are free and the values still fit: an index may point past a shorter one."""
    for sizes in other_lengths(program):
        other = with_sizes(program, inputs, sizes)
        with contextlib.suppress(RuntimeError, IndexError):
            program.run(other)
            return [other]
    return []


def _explain(program: Program, error: Exception) -> str:
    """Names the operator without an ONNX form and where the user calls it."""
    text = "\n".join(str(e) for e in _causes(error))
    unknown = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", text)
    if unknown is None:
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Use tlparse")]
        return f"torch.onnx can't translate the program: {lines[-1] if lines else type(error).__name__}"
    operator = f"{unknown[1]}.{unknown[2]}"
    users = [describe(node) for node in program.graph.nodes if str(node.target) == operator]
    return no_form(users[0] if users else operator, operator)


def _causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_causes(error.__cause__ or error.__context__)]
