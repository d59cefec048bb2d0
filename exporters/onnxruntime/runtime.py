"""ONNX Runtime on CPU: sessions for measuring and comparing, and which kernels it really runs."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnxruntime.session_options import ONLY_FATAL, read_options
from lobo_fx.files import check_readable, temporary_folder
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost
from lobo_fx.plugins.protocols import Arrays, ArraySpec
from lobo_fx.plugins.tuning import Choice

__all__ = ["OnnxRuntime", "OnnxRuntimeSession", "kernels"]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    **{f"tensor({name})": name for name in ("int8", "uint8", "int16", "uint16", "uint32", "uint64")},
    "tensor(bool)": "bool",
}


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeSession:
    """A loaded ONNX file."""

    handle: Any

    @functools.cached_property
    def inputs(self) -> list[ArraySpec]:
        """Names, dtypes and shapes; a free dimension is None.

        Raises:
            InvalidInput: an input is no array of numbers.
        """
        found = self.handle.get_inputs()
        if odd := [i for i in found if i.type not in _DTYPES]:
            raise InvalidInput(f"the input '{odd[0].name}' is a {odd[0].type}, which can't be fed")
        return [
            ArraySpec(i.name, _DTYPES[i.type], tuple(n if isinstance(n, int) else None for n in i.shape)) for i in found
        ]

    def run(self, arrays: Arrays) -> list[np.ndarray[Any, Any]]:
        """Runs it once; arrays that the file does not take are left out."""
        outputs: list[np.ndarray[Any, Any]] = self.handle.run(
            None, {spec.name: arrays[spec.name] for spec in self.inputs}
        )
        return outputs


class OnnxRuntime:
    """ONNX Runtime's CPU execution provider, sequential execution, all graph optimisations."""

    @property
    def version(self) -> str:
        """Name and version."""
        try:
            return f"onnxruntime {metadata.version('onnxruntime')}"  # importing it would cost 40 MB
        except metadata.PackageNotFoundError:  # a build under another name
            import onnxruntime

            return f"onnxruntime {onnxruntime.__version__}"

    def measure_kernels(self, kernels: Sequence[Kernel]) -> dict[Kernel, Cost | NoCost]:
        """Times operators as float and as integer kernels, one thread."""
        from lobo_fx.exporters.onnxruntime.kernel_costs import measure_kernels

        return measure_kernels(kernels)

    def node_times(
        self, path: Path, arrays: Arrays, names: Mapping[str, str], rounds: int = 20
    ) -> dict[str, list[float]]:
        """Times the nodes of a file, one thread, by the node of the program that each belongs to."""
        from lobo_fx.exporters.onnxruntime.profile import node_times

        return node_times(path, arrays, names, rounds)

    def choices(self, threads: Sequence[int]) -> list[Choice]:
        """The choices that may make a file faster; see `lobo_fx.exporters.onnxruntime.tuning`."""
        from lobo_fx.exporters.onnxruntime.tuning import choices

        return choices(threads)

    def write_tuned(self, path: Path, choices: Sequence[Choice], target: Path, threads: int | None) -> None:
        """Writes a file with choices, and options of its session beside it."""
        from lobo_fx.exporters.onnxruntime.tuning import write_tuned

        write_tuned(path, choices, target, threads)

    def options_of(self, path: Path) -> str:
        """The options that stand beside a file, in words; empty where there are none."""
        return str(read_options(path) or "")

    def load(self, path: Path, threads: int | None) -> OnnxRuntimeSession:
        """Loads a file with the options beside it (see `lobo_fx.exporters.onnxruntime.session_options`).

        Args:
            path: the file.
            threads: number of threads; 0 lets ONNX Runtime choose, None takes that of the options, or else one.

        Raises:
            InvalidInput: the file, or that of its options, is missing or damaged, or holds what ONNX Runtime can't run.
        """
        return OnnxRuntimeSession(_session(path, threads))

    def load_exact(self, path: Path) -> OnnxRuntimeSession:
        """Loads a file made for another CPU; see `lobo_fx.exporters.onnxruntime.exact_products`."""
        from lobo_fx.exporters.onnxruntime.exact_products import exact_session

        return OnnxRuntimeSession(exact_session(path))


def kernels(path: Path) -> dict[str, int]:
    """How often each operator occurs in the graph that ONNX Runtime runs after its optimisations."""
    import onnx

    with temporary_folder() as folder:
        optimized = folder / "optimized.onnx"
        _session(path, 1, optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def _session(path: Path, threads: int | None, optimized: Path | None = None) -> Any:
    import onnxruntime

    if threads is not None and threads < 0:
        raise InvalidInput(f"threads is {threads}; it must be at least 0")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if (saved := read_options(path)) is not None:
        saved.apply(options)
    if threads is not None:
        options.intra_op_num_threads = threads
    options.log_severity_level = ONLY_FATAL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    check_readable(path)
    if not path.stat().st_size:
        raise InvalidInput(f"{path} is empty")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:
        raise InvalidInput(f"ONNX Runtime can't load {path}: {error}") from error
