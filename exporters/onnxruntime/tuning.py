"""What ONNX Runtime offers to make a file faster on CPU, as a table of choices, and how a file gets them."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from lobo_fx.errors import ExportError
from lobo_fx.exporters.onnx.versions import MICROSOFT
from lobo_fx.exporters.onnx.weights_beside import name_weights
from lobo_fx.exporters.onnxruntime.session_options import SavedOptions, write_options
from lobo_fx.files import named_by
from lobo_fx.plugins.tuning import Choice
from lobo_fx.terminal.quiet import no_errors_printed, quiet

__all__ = ["CHOICES", "Fusions", "Options", "choices", "write_tuned"]


@dataclasses.dataclass(frozen=True)
class Fusions:
    """Fuses patterns of transformers to one operator each, by `onnxruntime.transformers.optimizer`; changes the file.

    Attributes:
        model_type: name of a set of patterns, which any graph may have.
    """

    kind: ClassVar[str] = "fusions"
    remark: ClassVar[str] = f"its fused operators ({MICROSOFT}) run in ONNX Runtime only"
    model_type: str

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.model_type} fusions"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the session; the file stays as it is.

    Attributes:
        name: name in reports.
        kind: what the options decide.
        saved: the options.
        remark: what a user must know of the options.
    """

    name: str
    kind: str
    saved: SavedOptions
    remark: str = ""


def _level(name: str, level: int) -> Options:
    return Options(f"{name} optimisations", "optimisations", SavedOptions({"graph_optimization_level": level}))


CHOICES: tuple[Fusions | Options, ...] = (
    *(Fusions(model_type) for model_type in ("bert", "bart", "clip", "conformer", "gpt2", "t5")),
    _level("layout", 3),
    _level("extended", 2),
    _level("basic", 1),  # below it constants are not folded: packed weights would be decoded at every call
    Options("no arena", "arena", SavedOptions({"enable_cpu_mem_arena": False})),
    Options("no memory pattern", "memory pattern", SavedOptions({"enable_mem_pattern": False})),
    Options("no pre-packing", "pre-packing", SavedOptions(entries={"session.disable_prepacking": "1"})),
    Options(
        "denormals as zero",
        "denormals",
        SavedOptions(entries={"session.set_denormal_as_zero": "1"}),
        "denormals are zero in the whole process, and only if its first session says so",
    ),
)
"""The choices that are tried, in this order: changes of the file first, then options of its session."""


def choices(threads: Sequence[int]) -> list[Choice]:
    """The choices of the table, and further numbers of threads."""
    counts = [
        Options(f"{count} threads", "threads", SavedOptions({"intra_op_num_threads": count})) for count in threads
    ]
    return [*CHOICES, *counts]


def write_tuned(path: Path, choices: Sequence[Choice], target: Path, threads: int | None) -> None:
    """Writes a file with choices, as `lobo_fx.plugins.tuning.TunesFiles` has it.

    Raises:
        ExportError: the fusions fail on the file, or lose something of what it says.
    """
    fusions = next((choice for choice in choices if isinstance(choice, Fusions)), None)
    if fusions is None or not _fuse(path, fusions, target):
        for file in (path, *(path.with_name(name) for name in sorted(named_by(path)))):
            shutil.copy(file, target.parent)  # a link would be refused: onnx loads no weights that have two names
    options: dict[str, Any] = {} if threads is None else {"intra_op_num_threads": threads}
    entries: dict[str, str] = {}
    for choice in choices:
        if isinstance(choice, Options):
            options |= choice.saved.options
            entries |= choice.saved.entries
    write_options(SavedOptions(options, entries), target)


def _fuse(path: Path, fusions: Fusions, target: Path) -> bool:
    """Writes the fused file; where there is nothing to fuse, it writes nothing."""
    with quiet(), no_errors_printed():
        from onnxruntime.transformers.optimizer import optimize_by_fusion

        try:
            fused = optimize_by_fusion(onnx.load(path), fusions.model_type).model
        except Exception as error:
            raise ExportError(f"onnxruntime.transformers can't fuse it: {error}") from error
    before = onnx.load(path, load_external_data=False)
    if _operators(fused) == _operators(before):
        return False
    if not any(entry.domain == MICROSOFT for entry in fused.opset_import):
        fused.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    for name in ("producer_name", "producer_version", "doc_string", "domain", "model_version"):
        setattr(fused, name, getattr(before, name))
    fused.graph.name, fused.graph.doc_string = before.graph.name, before.graph.doc_string
    if lost := _lost(before, fused):
        raise ExportError(f"the fused file has other {lost}")
    stored_apart = bool(named_by(path))
    model = ir.from_proto(fused)
    model.graph.sort()
    ir.save(model, target, external_data=f"{target.name}.data" if stored_apart else None)
    name_weights(target)
    return True


def _operators(model: Any) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in model.graph.node)


def _lost(before: Any, after: Any) -> str:
    """The parts of a file's interface that another file does not keep; empty if it keeps all."""

    def versions(model: Any) -> Mapping[str, int]:
        return {entry.domain: entry.version for entry in model.opset_import if entry.domain in kept}

    kept = {entry.domain for entry in before.opset_import}
    same: dict[str, list[Any]] = {
        "inputs": [list(map(str, model.graph.input)) for model in (before, after)],
        "outputs": [list(map(str, model.graph.output)) for model in (before, after)],
        "metadata": [{entry.key: entry.value for entry in model.metadata_props} for model in (before, after)],
        "operator sets": [versions(model) for model in (before, after)],
        "IR version": [model.ir_version for model in (before, after)],
    }
    return ", ".join(name for name, (one, other) in same.items() if one != other)
