"""Imports optional packages; if one is missing, the error says how to install it."""

from __future__ import annotations

import importlib.util
from typing import Any

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.terminal.quiet import quiet

__all__ = ["check_name", "import_package"]


def import_package(module: str, package: str, extra: str = "models") -> Any:
    """Imports a module of an optional package.

    Raises:
        InvalidInput: the package is not installed; says which of our extras installs it.
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.partition(".")[0]):
            raise
        raise InvalidInput(f"{package} is not installed; run: pip install 'lobo-fx[{extra}]'") from None


def check_name(name: str | None, known: list[str], source: str) -> None:
    if name not in known:
        raise InvalidInput(f"{source} has no model '{name}'; {suggestion(str(name), known)}")
