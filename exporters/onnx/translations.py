"""ONNX forms of operators: our own, those of other packages, and given ones; and which operators have none."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from lobo_fx.errors import ExportError
from lobo_fx.exporters.onnx.placeholders import translations
from lobo_fx.exporters.onnx.recurrent import RECURRENT_TRANSLATIONS
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.plugins.registry import Registry
from lobo_fx.terminal.quiet import quiet

__all__ = [
    "TRANSLATIONS",
    "Translations",
    "decompositions",
    "is_translated",
    "no_form",
    "refuse_untranslated",
    "translation_table",
]

Translations = Mapping[Callable[..., Any], Callable[..., Any]]
"""Onnxscript functions by operator overload."""

TRANSLATIONS: Registry[Translations] = Registry(
    "table of ONNX translations",
    "lobo_fx.onnx_translations",
    named=False,
    must_be="a mapping from operators to onnxscript functions",
    fits=lambda plugin: isinstance(plugin, Mapping),
)
"""Translation tables of other packages."""


def translation_table(given: Translations | None, program: Program) -> dict[Callable[..., Any], Callable[..., Any]]:
    """All translations beside those that `torch.onnx` has; given ones override those of other packages.

    Raises:
        ExportError: several tables translate the same operator, and the program calls it.
    """
    given = given or {}
    found = {**translations(), **RECURRENT_TRANSLATIONS}
    origins = dict.fromkeys(found, "lobo-fx")
    called = {node.target for node in program.graph.nodes}
    tables, failures = _plugged()
    for failure in failures:
        warnings.warn(failure, stacklevel=2)
    for origin, table in tables.items():
        for operator, function in table.items():
            if operator in found and operator in called and operator not in given:
                other = origins[operator]
                what = f"{origin} must leave it out" if other == "lobo-fx" else "uninstall one"
                raise ExportError(f"{operator} is translated by {other} and by {origin}; {what}")
            found.setdefault(operator, function)
            origins.setdefault(operator, origin)
    return {**found, **given}


@functools.cache
def _plugged() -> tuple[dict[str, Translations], list[str]]:
    return TRANSLATIONS.loadable()


def refuse_untranslated(program: Program, table: Translations) -> None:
    """Refuses operators that nothing translates; what an operator is decomposed into is not looked at.

    Raises:
        ExportError: names the operator, the user's line, and how to give a translation.
    """
    for node in _untranslated(program, table):
        raise ExportError(no_form(describe(node), str(node.target)))


def no_form(where: str, operator: str) -> str:
    """Words for an operator that has no ONNX form."""
    return (
        f"{where} has no ONNX form. Give one with OnnxExporter(translations={{torch.ops.{operator}: function}}), "
        "where function is written with onnxscript; a package offers such a table through the entry point "
        f"'{TRANSLATIONS.group}'"
    )


def _untranslated(program: Program, table: Translations) -> Iterator[fx.Node]:
    for node in program.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target not in table and not _is_known(target):
            yield node


def _is_known(operator: torch._ops.OpOverload) -> bool:
    """Whether `torch.onnx` has a function for an operator, or replaces it, as it does operators that write in place."""
    is_replaced = operator._schema.is_mutable or operator in decompositions() or operator._can_decompose()
    return is_replaced or _registry().is_registered(operator)


def is_translated(operator: Any, table: Translations) -> bool:
    """Whether an operator has a function, in `table` or of `torch.onnx`."""
    return operator in table or bool(_registry().is_registered(operator))


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions that `torch.onnx` uses: those of PyTorch, but for operators that it has a function for."""
    known = {**torch._decomp.decomposition_table, **torch.export.default_decompositions()}
    schemas = {operator: form for operator, form in known.items() if hasattr(operator, "_schema")}
    return {operator: form for operator, form in schemas.items() if not _registry().is_registered(operator)}


@functools.cache
def _registry() -> Any:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    importlib.import_module("torch.ao.quantization.fx._decomposed")  # only operators that exist are registered
    with quiet():  # it says of every package that is not installed what it skips
        return ONNXRegistry.from_torchlib()
