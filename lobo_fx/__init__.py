"""Makes trained PyTorch models smaller and faster on CPU, and proves it.

`compile` traces a model, rewrites it with passes, checks every rewrite, and returns a `Result` that
exports to ONNX and measures itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lobo_fx.artifact import Artifact as Artifact
    from lobo_fx.compiler import compile as compile
    from lobo_fx.context import Context as Context
    from lobo_fx.errors import ContractError as ContractError
    from lobo_fx.errors import ExportError as ExportError
    from lobo_fx.errors import InvalidInput as InvalidInput
    from lobo_fx.errors import LoboError as LoboError
    from lobo_fx.errors import TraceError as TraceError
    from lobo_fx.passbase import Pass as Pass
    from lobo_fx.passbase import Promise as Promise
    from lobo_fx.program import Program as Program
    from lobo_fx.report import Report as Report
    from lobo_fx.result import Result as Result
    from lobo_fx.storage import load as load
    from lobo_fx.tracing import trace as trace

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "artifact",
    "Context": "context",
    "ContractError": "errors",
    "ExportError": "errors",
    "InvalidInput": "errors",
    "LoboError": "errors",
    "Pass": "passbase",
    "Program": "program",
    "Promise": "passbase",
    "Report": "report",
    "Result": "result",
    "TraceError": "errors",
    "compile": "compiler",
    "load": "storage",
    "trace": "tracing",
}

_MODULES = ("axes", "costs", "exporters", "models", "passes", "testing")
__all__ = [*sorted(_HOMES), *_MODULES]


def __getattr__(name: str) -> Any:
    """Imports on first use: `import lobo_fx` itself costs nothing."""
    if name in _MODULES:
        return importlib.import_module(f"lobo_fx.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"lobo_fx.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lobo_fx' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
