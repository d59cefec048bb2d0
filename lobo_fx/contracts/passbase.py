"""The base class of passes: settings, a promise about the outputs, and `run(program, context) -> program`."""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program
from lobo_fx.measures.fidelity import float_outputs
from lobo_fx.plugins.registry import PASSES, snake_case
from lobo_fx.plugins.settings import check_settings

__all__ = ["EXACT_TOLERANCE", "Pass", "Promise", "exact_tolerance", "shown"]

EXACT_TOLERANCE = 1e-4
"""Largest error of an exact pass, as a share of the output's largest magnitude (float32 rounding)."""


def exact_tolerance(outputs: Any) -> float:
    """`EXACT_TOLERANCE`, or twice the machine epsilon of the outputs' dtype if that is coarser (half, bfloat16)."""
    steps = [torch.finfo(tensor.dtype).eps for tensor in float_outputs(outputs)]
    return max(EXACT_TOLERANCE, *(2 * step for step in steps), 0.0)


class Promise(enum.Enum):
    """What a pass promises about the program's outputs; the compiler checks it.

    Attributes:
        EXACT: they stay the same, up to rounding (as when batch norm is folded).
        MASKED: they equal those of the program with the removed channels zeroed, which the pass hands to
            `context.expect`.
        APPROXIMATE: they may change; the signal-to-noise ratio is reported.
    """

    EXACT = "exact"
    MASKED = "masked"
    APPROXIMATE = "approximate"


class Pass(abc.ABC):
    """A rewrite. Subclass it as a frozen dataclass whose fields are the settings.

    Settings are checked against their types on construction (`lobo_fx.plugins.settings`): `Literal["row", "column"]`,
    `Annotated[float, Range(above=0, most=1)]`. A subclass with its own `__post_init__` calls `super().__post_init__()`.

    A pass gets the compiler's own copy of the model and may change it freely. What it returns is
    verified before the next pass sees it: shapes, inputs, outputs, and the promise.

    Attributes:
        promise: what the pass promises about the outputs.

    Example:
        See `examples/write_a_pass.py`.
    """

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def needs(self) -> tuple[str, ...]:
        """Which of `calibration_data`, `train_data`, `loss_fn`, `evaluate` must be given."""
        return ()

    def check(self, program: Program) -> None:  # noqa: B027  most passes have nothing to refuse
        """Refuses settings that don't fit the model, such as a pattern that matches nothing.

        Called for every pass before the first one runs, with the model as traced. Must not change it, and must accept
        what an earlier pass may still make fit; `run` can refuse that later.

        Raises:
            InvalidInput: says what does not fit, and what would.
        """

    @abc.abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """Returns the rewritten program (the same object, or a new one)."""

    @property
    def name(self) -> str:
        """Name in reports and recipes: the class name in snake case."""
        return snake_case(type(self).__name__)

    @property
    def all_settings(self) -> dict[str, Any]:
        """All settings, also those at their defaults."""
        return {field.name: getattr(self, field.name) for field in _fields(self)}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        fields = _fields(self)
        made = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
        return {name: value for name, value in self.all_settings.items() if value != made[name]}

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={shown(value)}" for name, value in self.settings.items())
        return f"{type(self).__name__}({settings})"


def _is_pass(plugin: object) -> bool:
    return isinstance(plugin, type) and issubclass(plugin, Pass)


PASSES.fits = _is_pass  # set here, since the registry can't import this module


def _fields(pass_: Pass) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of the settings; empty for a pass that is no dataclass."""
    return dataclasses.fields(pass_) if dataclasses.is_dataclass(pass_) else ()


def shown(value: object) -> str:
    """A setting in one line, the same in every process; a pass by its changed settings, a function by its name."""
    if isinstance(value, (Pass, str, Path)):
        return str(value) if isinstance(value, Pass) else repr(str(value))
    if isinstance(value, functools.partial):
        given = [shown(entry) for entry in value.args] + [f"{k}={shown(v)}" for k, v in value.keywords.items()]
        return f"{shown(value.func)}({', '.join(given)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {shown(entry)}' for key, entry in value.items())}}}"
    if type(value) in (list, tuple):
        return f"[{', '.join(map(shown, value))}]"  # type: ignore[call-overload]
    if isinstance(value, nn.Module) or type(value).__repr__ is object.__repr__:  # the default repr holds an address
        return type(value).__name__
    return getattr(value, "__qualname__", None) or repr(value)
