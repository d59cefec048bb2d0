"""`lobo-fx recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from lobo_fx.cli.app import Answer, command
from lobo_fx.cli.completion import complete_recipe
from lobo_fx.errors import InvalidInput, suggestion

__all__ = ["recipes"]


@command
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A recipe, to see its YAML.", autocompletion=complete_recipe)
    ] = None,
) -> Answer:
    """List the built-in recipes, or show one to start from."""
    from lobo_fx.recipe import builtin_recipes, recipe_text, resolve
    from lobo_fx.terminal.tables import new_table, render

    known = builtin_recipes()
    if name is not None:
        if name not in known:
            raise InvalidInput(f"no recipe is called '{name}'; {suggestion(name, known)}")
        known = [name]
    entries = [
        {
            "name": entry,
            "summary": recipe_text(entry).partition("\n")[0].removeprefix("# "),
            "passes": [str(pass_) for pass_ in resolve(entry)],
            "yaml": recipe_text(entry),
        }
        for entry in known
    ]

    def text(verbose: bool) -> str:
        if name is not None or verbose:
            return "\n".join(recipe_text(entry) for entry in known)
        table = new_table("recipes", ["name", "what it does", "passes"])
        for entry in entries:
            table.add_row(str(entry["name"]), str(entry["summary"]), ", ".join(entry["passes"]))
        return render(table)

    return Answer(text, lambda: {"recipes": entries})
