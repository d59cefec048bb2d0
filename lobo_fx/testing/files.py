"""Test kits for plug-ins that write or run files: ONNX translations, exporters, runtimes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lobo_fx.capture.tracing import trace
from lobo_fx.errors import LoboError
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.sized_inputs import named_arrays, with_rows
from lobo_fx.plugins.protocols import Exporter, Runtime
from lobo_fx.plugins.registry import EXPORTERS, RUNTIMES
from lobo_fx.testing.networks import networks

__all__ = ["check_exporter", "check_runtime", "check_translation"]

_TOLERANCE = 1e-4
"""Largest error of a file's outputs, as a share of the largest output."""


class _Calls(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *operands: torch.Tensor) -> Any:
        return self.call(*operands)


def check_translation(
    call: Callable[..., Any],
    *cases: tuple[torch.Tensor, ...],
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> None:
    """Exports calls of an operator, and compares ONNX Runtime with PyTorch.

    Each case is also run with its float operands negated, at zero, and a hundred times as large. Any error, in the
    export or in ONNX Runtime, is raised as an `AssertionError` that names the operator.

    Args:
        call: calls the operator on tensors.
        *cases: operands, one case for each shape and dtype to be tried.
        translations: the translations, if no entry point offers them.
    """
    assert cases, "give operands of at least one shape"
    for operands in cases:
        program = trace(_Calls(call), operands, None)
        try:
            _check_file(program, operands, translations)
        except Exception as error:  # ONNX Runtime has errors of its own
            raise AssertionError(f"{_operators(program)}: {error}") from error


def _check_file(program: Program, operands: tuple[torch.Tensor, ...], translations: Mapping[Any, Any] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        exporter = EXPORTERS.ours("onnx")(translations=translations)
        session = RUNTIMES.ours("onnxruntime")().load(exporter.export(program, path, {}).path, 1)
        for factor in (1, -1, 0, 100):
            inputs = Inputs(tuple(x * factor if x.is_floating_point() else x for x in operands))
            _compare(program, inputs, session, f"{[list(x.shape) for x in operands]} times {factor}")


def _operators(program: Program) -> str:
    """Names of the custom operators that a program calls; of all operators, if none is custom."""
    called = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    others = [target for target in called if target.namespace != "aten"]
    return ", ".join(dict.fromkeys(map(str, others or called)))


def check_exporter(exporter: Exporter, runtime: Runtime) -> None:
    """Writes networks, and runs them.

    Asserts: file names end with `suffix`; the artifact names the files that were written, and their size; the outputs
    are PyTorch's, also with other numbers of rows; an existing file is replaced; a path that can't be written to is
    refused with a `LoboError`, and no file is left.

    Args:
        exporter: the exporter under test.
        runtime: the runtime that runs its files.
    """
    suffix = exporter.suffix
    assert suffix[:1] == "." != suffix, f"suffix is {suffix!r}; it is how names end, such as '.onnx'"
    for name, model, inputs in networks():
        program = trace(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{suffix}"
            path.write_bytes(b"what was there")
            artifact = exporter.export(program, path, {"lobo_fx.version": "test"})
            written = {file for file in Path(folder).rglob("*") if file.is_file()}
            assert set(artifact.files) == written, f"{name}: files are {sorted(artifact.files)}, not {sorted(written)}"
            assert artifact.path in written, f"{name}: there is no {artifact.path}"
            size = sum(file.stat().st_size for file in written)
            assert artifact.bytes == size, f"{name}: {artifact.bytes} bytes are stated of {size}"
            assert artifact.parity <= _TOLERANCE, f"{name}: parity is {artifact.parity}"
            session = runtime.load(artifact.path, 1)
            for rows in (4, 1, 5):
                _compare(program, with_rows(program, rows), session, f"{name}, {rows} rows")
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / f"model{suffix}"
        taken.mkdir()
        try:
            exporter.export(program, taken, {})
        except LoboError:
            assert not list(taken.iterdir()), "a refused export leaves files"
        else:
            raise AssertionError("a path that is a folder is not refused")


def check_runtime(runtime: Runtime, exporter: Exporter | None = None) -> None:
    """Loads and runs networks.

    Asserts: it has a version; inputs have the names, dtypes and shapes of the program's; the outputs are PyTorch's, on
    any number of threads and rows, and on repetition; a file that is no model is refused.

    Args:
        runtime: the runtime under test.
        exporter: the exporter that writes its files; ONNX if left out.
    """
    exporter = exporter or EXPORTERS.ours(EXPORTERS.default)()
    assert runtime.version.strip(), "a runtime without a version can't be told apart in reports"
    for name, model, inputs in networks():
        program = trace(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = exporter.export(program, Path(folder) / f"model{exporter.suffix}", {}).path
            for threads in (1, 2):
                session = runtime.load(path, threads)
                (spec,) = session.inputs
                expected = next(spec for spec in program.signature.inputs if spec is not None)
                assert spec.name == expected.name, f"{name}: the input is called {spec.name}, not {expected.name}"
                assert spec.dtype == "float32", f"{name}: the input is {spec.dtype}"
                assert spec.shape == (None, *inputs.shape[1:]), f"{name}: the input is {spec.shape}"
                for rows in (4, 1, 4):
                    _compare(program, with_rows(program, rows), session, f"{name}, {rows} rows, {threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / f"model{exporter.suffix}"
        broken.write_bytes(b"no model")
        try:
            runtime.load(broken, 1)
        except Exception:
            return
        raise AssertionError("a file that is no model is not refused")


def _compare(program: Program, inputs: Inputs, session: Any, where: str) -> None:
    expected = Inputs((program.run(inputs),)).tensors
    found = session.run(named_arrays(program, inputs))
    assert len(found) == len(expected), f"{where}: {len(found)} outputs, not {len(expected)}"
    for output, reference in zip(found, expected, strict=True):
        right = reference.detach().numpy()
        assert output.shape == right.shape, f"{where}: {output.shape}, not {right.shape}"
        off = np.abs(output.astype(np.float64) - right).max() / max(float(np.abs(right).max()), 1e-12)
        assert off <= _TOLERANCE, f"{where}: off by {off:.1e}"
