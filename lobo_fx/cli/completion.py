"""Shell completion. It must be fast, so no model library is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["complete_model", "complete_pass", "complete_plugin", "complete_recipe"]

_LIBRARIES = ("torchvision:", "timm:", "transformers:")
_MODEL_FILES = (".py", ".pt2", ".onnx")


def complete_model(incomplete: str) -> list[str]:
    """Libraries, and files that may hold a model."""
    return [*(name for name in _LIBRARIES if name.startswith(incomplete)), *_files(incomplete, _MODEL_FILES)]


def complete_pass(incomplete: str) -> list[str]:
    """Names and aliases of passes."""
    return complete_plugin("PASSES")(incomplete)


def complete_recipe(incomplete: str) -> list[str]:
    """Built-in recipes, and YAML files."""
    from lobo_fx.recipe import builtin_recipes

    known = [name for name in builtin_recipes() if name.startswith(incomplete)]
    return [*known, *_files(incomplete, (".yaml", ".yml"))]


def complete_plugin(registry: str) -> Callable[[str], list[str]]:
    """A function that completes the names in one of the registries of `lobo_fx.plugins.registry`."""

    def complete(incomplete: str) -> list[str]:
        from lobo_fx.plugins import registry as registries

        names = getattr(registries, registry).names()
        known = sorted({*names, *(alias for aliases in names.values() for alias in aliases)})
        return [name for name in known if name.startswith(incomplete)]

    return complete


def _files(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files and folders whose paths begin with the text; Python files get a colon, for the name of a function."""
    folder, _, start = incomplete.rpartition("/")
    try:
        entries = sorted(Path(f"{folder}/" if "/" in incomplete else ".").iterdir())
    except OSError:
        return []
    before = incomplete[: len(incomplete) - len(start)]
    found = [entry for entry in entries if entry.name.startswith(start) and (start or not entry.name.startswith("."))]
    ends = {".py": ":"}
    return [
        before + entry.name + ("/" if entry.is_dir() else ends.get(entry.suffix, ""))
        for entry in found
        if entry.is_dir() or entry.suffix in suffixes
    ]
