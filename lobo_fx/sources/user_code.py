"""Calls functions in the user's own Python files."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.files import check_readable

__all__ = ["call_from_file", "function_from_file"]


def call_from_file(path: Path, function: str) -> Any:
    """Runs a Python file of the user and calls one of its functions without arguments.

    As when Python itself runs a file, it can import what lies beside it, also later; but nothing there hides a module.

    Raises:
        InvalidInput: no such file or function (similar ones are suggested), or its code fails; names the line.
    """
    return _with_function(path, function, lambda found: found())


def function_from_file(spec: str) -> Callable[..., Any]:
    """A function in the user's file, to be called later: `path/to/file.py:function`.

    Raises:
        InvalidInput: wrong syntax, no such file or function (similar ones are suggested), or the file fails.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise InvalidInput(f"'{spec}' names no function; write path/to/file.py:function")
    found: Callable[..., Any] = _with_function(Path(file), name, lambda function: function)
    return found


def _with_function(path: Path, function: str, use: Callable[[Callable[..., Any]], Any]) -> Any:
    check_readable(path)
    name = f"lobo_fx_file_{path.stem}"  # prefixed, as the plain name could hide an imported module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _importable(path.absolute().parent):
        try:
            spec.loader.exec_module(module)
            made = getattr(module, function, None)
            if callable(made):
                return use(made)
        except (Exception, SystemExit) as error:
            raise InvalidInput(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    raise InvalidInput(f"{path} has no function '{function}'; {suggestion(function, names)}")


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Puts a folder first in the search for modules; afterwards last, for what a function imports when it is called."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _place(path: Path, error: BaseException) -> str:
    """The last line of the user's file that an exception passed through."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    return f"{path}:{lines[-1]}" if lines else str(path)
