"""OpenVINO on CPU, as `lobo_fx.plugins.protocols` wants a runtime, so that its calls can be measured in turn."""

from __future__ import annotations

import dataclasses
import functools
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lobo_fx.plugins.protocols import Arrays, ArraySpec


@dataclasses.dataclass(frozen=True)
class OpenVinoSession:
    """A compiled model and its one request."""

    request: Any

    @functools.cached_property
    def inputs(self) -> list[ArraySpec]:
        """Names, dtypes and shapes; a free dimension is None."""
        return [
            ArraySpec(
                port.get_any_name(),
                np.dtype(port.get_element_type().to_dtype()).name,
                tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape()),
            )
            for port in self.request.model_inputs
        ]

    def run(self, arrays: Arrays) -> list[np.ndarray[Any, Any]]:
        """Runs it once; arrays that the file does not take are left out."""
        found = self.request.infer({spec.name: arrays[spec.name] for spec in self.inputs}, share_inputs=True)
        return [found[port] for port in self.request.model_outputs]


@dataclasses.dataclass(frozen=True)
class OpenVino:
    """OpenVINO's CPU device, one stream, tuned for latency.

    Attributes:
        precision: what floats are computed in, `f32` or `bf16`; by default OpenVINO takes bf16 where the CPU has it.
    """

    precision: str = "f32"

    @property
    def version(self) -> str:
        """Name and version."""
        return f"openvino {metadata.version('openvino')}"

    def load(self, path: Path, threads: int) -> OpenVinoSession:
        """Compiles an .xml or .onnx file."""
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        return OpenVinoSession(openvino.compile_model(path, "CPU", settings).create_infer_request())
