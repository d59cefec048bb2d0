"""Makes trained PyTorch models smaller and faster on CPU, and proves it.

`compile` traces a model, rewrites it with passes, checks every rewrite, and returns a `Result` that
exports to ONNX and measures itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lobo_fx.version import __version__

if TYPE_CHECKING:
    from lobo_fx.capture.tracing import trace as trace
    from lobo_fx.compiler import compile as compile
    from lobo_fx.contracts.context import Context as Context
    from lobo_fx.contracts.passbase import Pass as Pass
    from lobo_fx.contracts.passbase import Promise as Promise
    from lobo_fx.errors import ContractError as ContractError
    from lobo_fx.errors import ExportError as ExportError
    from lobo_fx.errors import InvalidInput as InvalidInput
    from lobo_fx.errors import LoboError as LoboError
    from lobo_fx.errors import TraceError as TraceError
    from lobo_fx.goal import Goal as Goal
    from lobo_fx.graph.program import Program as Program
    from lobo_fx.plugins.artifact import Artifact as Artifact
    from lobo_fx.plugins.tuning import Tuning as Tuning
    from lobo_fx.report.report import Report as Report
    from lobo_fx.result import Result as Result
    from lobo_fx.result import load as load
    from lobo_fx.studies.searching import search as search

_HOMES = {
    "Artifact": "plugins.artifact",
    "Context": "contracts.context",
    "ContractError": "errors",
    "ExportError": "errors",
    "Goal": "goal",
    "InvalidInput": "errors",
    "LoboError": "errors",
    "Pass": "contracts.passbase",
    "Program": "graph.program",
    "Promise": "contracts.passbase",
    "Report": "report.report",
    "Result": "result",
    "TraceError": "errors",
    "Tuning": "plugins.tuning",
    "compile": "compiler",
    "load": "result",
    "search": "studies.searching",
    "trace": "capture.tracing",
}

_MODULES = ("axes", "exporters", "graph", "measures", "passes", "plugins", "sources", "testing")
__all__ = ["__version__", *sorted(_HOMES), *_MODULES]


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
