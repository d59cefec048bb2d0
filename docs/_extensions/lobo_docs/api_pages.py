"""A page for each public module: the names that tests/test_layout.py pins, with their docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

from lobo_docs.docstrings import as_rst

__all__ = ["pages", "public_modules"]


def public_modules(docs: Path) -> dict[str, list[str]]:
    """Names by module, from the test that pins them."""
    tree = ast.parse((docs.parent / "tests" / "test_layout.py").read_text(encoding="utf-8"))
    pinned = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["PUBLIC"]
    )
    return {module: names.split() for module, names in ast.literal_eval(pinned).items()}


def pages(docs: Path) -> dict[str, str]:
    """A page a module, and a list of them; each object is described once, where its name is shortest."""
    homes: dict[int, str] = {}
    made: dict[str, str] = {}
    modules = public_modules(docs)
    for module, names in modules.items():
        made[f"{module}.rst"] = _page(module, names, homes)
    listed = "\n".join(f"   {module}" for module in modules)
    made["index.rst"] = (
        f"{_title('Names in Python')}What stands here is public: a name that goes, or comes, is in the changelog.\n\n"
        f".. toctree::\n   :maxdepth: 1\n\n{listed}\n"
    )
    return made


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n\n"


def _page(module: str, names: list[str], homes: dict[int, str]) -> str:
    found = importlib.import_module(module)
    parts = [_title(module), f".. automodule:: {module}\n   :no-members:\n"]
    for name in names:
        value, full = getattr(found, name), f"{module}.{name}"
        if name.startswith("__"):
            continue
        if inspect.ismodule(value):
            parts.append(f"``{name}``: a module.\n")
            continue
        if (home := homes.get(id(value))) is not None:
            parts.append(f"``{name}``: see :py:obj:`{home}`.\n")
            continue
        if not inspect.isclass(value) and not inspect.isfunction(value):
            about = textwrap.indent(as_rst(_stated(module, name)), "   ")
            parts.append(f".. py:data:: {full}\n\n{about}\n")
            continue
        homes[id(value)] = full
        parts.append(f".. {'autoclass' if inspect.isclass(value) else 'autofunction'}:: {full}\n")
    return "\n".join(parts)


def _stated(module: str, name: str) -> str:
    """What stands in the source under a name that is neither class nor function, where it is given its value."""
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.analyze()
    if found := analyzer.attr_docs.get(("", name)):
        return "\n".join(found)
    imports = [node for node in ast.parse(analyzer.code).body if isinstance(node, ast.ImportFrom)]
    home = next((node.module for node in imports if name in [alias.name for alias in node.names]), None)
    if home is None:
        raise ValueError(f"{module}.{name} is public; say what it is, in a string under it")
    return _stated(home, name)
