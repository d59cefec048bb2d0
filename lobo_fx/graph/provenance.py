"""Where a node comes from, in the user's terms: the module, the source line, and the pass that made it."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.node_facts import facts_of
from lobo_fx.graph.wording import phrase

__all__ = ["check_named", "check_patterns", "describe", "inherit", "module_name", "place", "source_line", "user_line"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)')
_LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent))
_PYTHON = f"{Path(os.__file__).parent}{os.sep}"


def module_name(node: fx.Node) -> str:
    """Dotted name of the innermost user module that `node` was traced in; empty for the model itself."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    name = next(reversed(stack.values()))[0] if stack else ""
    return str(name).removeprefix("L['self'].").removeprefix("L__self__.")


def check_patterns(patterns: Iterable[str], graph: fx.Graph) -> None:
    """Refuses patterns that match no module name.

    Raises:
        InvalidInput: names the pattern, and modules that are near.
    """
    names = {module_name(node) for node in graph.nodes} - {""}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InvalidInput(f"'{pattern}' matches no module; {suggestion(pattern, names)}")


def check_named(setting: str, patterns: Iterable[str], module: fx.GraphModule) -> None:
    """Refuses patterns that match no name of a parameter, a module, or a module above one.

    Args:
        setting: the setting that holds the patterns, for messages.
        patterns: patterns of names.
        module: the graph whose modules and parameters must match.

    Raises:
        InvalidInput: names the pattern, and names that are near.
    """
    named = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    named |= {module_name(node) for node in module.graph.nodes} - {""}
    names = {above for name in named for above in itertools.accumulate(name.split("."), "{}.{}".format)}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InvalidInput(f"{setting}: '{pattern}' matches no module or parameter; {suggestion(pattern, names)}")


def source_line(node: fx.Node) -> str:
    """`file.py:12: code` of the innermost frame outside torch, or an empty string."""
    return user_line(node.meta.get("stack_trace") or "")


def user_line(stack_trace: str) -> str:
    """The innermost frame of a formatted stack trace outside of libraries, as `file.py:12: code`."""
    frames = [match for match in _FRAME.finditer(stack_trace) if not _is_library(match["file"])]
    return "{file}:{line}: {code}".format(**frames[-1].groupdict()) if frames else ""


def _is_library(file: str) -> bool:
    """Whether a file is torch's, ours, Python's own, or generated; models of other packages count as the user's."""
    return file.startswith(("<", *_LIBRARIES)) or (file.startswith(_PYTHON) and "site-packages" not in file)


def describe(node: fx.Node) -> str:
    """One phrase for messages: operator, user's module, user's line, and the pass that made the node."""
    operator = str(node.target) if node.op == "call_function" else f"{node.op} {node.target}"
    return phrase(operator, module_name(node), source_line(node)) + _maker(node)


def place(node: fx.Node) -> str:
    """`describe` without the operator, for sentences that already name it."""
    name, line = module_name(node), source_line(node)
    found = phrase("", name, line).strip() if name else line
    return (found or "its line is not known") + _maker(node)


def _maker(node: fx.Node) -> str:
    made_by = facts_of(node).made_by
    return f" [made by {made_by}]" if made_by else ""


def inherit(new: fx.Node, old: fx.Node) -> None:
    """Gives `new` the module stack, source line and origin of the node it stands for."""
    for key in ("nn_module_stack", "stack_trace", "from_node", "source_fn_stack", "torch_fn"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
