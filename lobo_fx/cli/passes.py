"""`lobo-fx passes`."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import json

import typer

from lobo_fx.cli.app import AsJson, command

__all__ = ["passes"]


@command
def passes(as_json: AsJson = False) -> None:
    """List the passes with their settings, and the built-in recipes."""
    from lobo_fx.plugins.registry import PASSES
    from lobo_fx.recipe import builtin_recipes
    from lobo_fx.terminal.tables import new_table, render

    known = []
    for name, aliases in PASSES.names().items():
        kind = PASSES.get(name)
        fields = dataclasses.fields(kind)
        known.append(
            {
                "name": name,
                "aliases": aliases,
                "settings": {field.name: getattr(kind(), field.name) for field in fields},
                "needs": list(kind().needs),
                "promise": kind.promise.value,
                "summary": (python_inspect.getdoc(kind) or "").split("\n")[0],
            }
        )
    if as_json:
        typer.echo(json.dumps({"passes": known, "recipes": builtin_recipes()}, indent=2, default=str))
        return
    shown = new_table("passes", ["name", "also", "settings", "needs", "promise", "what it does"])
    for entry in known:
        settings = ", ".join(f"{key}={value!r}" for key, value in entry["settings"].items())
        cells = [entry["name"], ", ".join(entry["aliases"]), settings, ", ".join(entry["needs"])]
        shown.add_row(*cells, entry["promise"], entry["summary"])
    typer.echo(render(shown))
    typer.echo(f"recipes: {', '.join(builtin_recipes())}")
