"""`lobo-fx passes`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lobo_fx.cli.app import Answer, command
from lobo_fx.cli.completion import complete_pass
from lobo_fx.errors import InvalidInput

__all__ = ["passes"]


@command
def passes(
    name: Annotated[
        str | None, typer.Argument(help="A pass, to see all there is to know of it.", autocompletion=complete_pass)
    ] = None,
) -> Answer:
    """List the passes, or show one with all its settings.

    Of each setting: type, legal values, default and meaning; and an example.
    """
    from lobo_fx.plugins.registry import PASSES
    from lobo_fx.recipe import builtin_recipes
    from lobo_fx.terminal.tables import printable, records

    if name is not None:
        key = name.replace("-", "_")
        entry = _facts(next((own for own, aliases in PASSES.names().items() if key in aliases), key))
        return Answer(lambda verbose: _one(entry), lambda: entry)
    entries, failures = [], []
    for known in PASSES:
        try:
            entries.append(_facts(known))
        except InvalidInput as error:
            failures.append(str(error))

    def text(verbose: bool) -> str:
        said = "".join(f"\n{printable(failure)}" for failure in failures)
        if verbose:
            return "\n".join(_one(entry) for entry in entries) + said
        shown = [(entry["name"], {"": entry["summary"], "needs": ", ".join(entry["needs"])}) for entry in entries]
        return (
            f"{records(shown)}{said}\n`lobo-fx passes NAME` shows the settings of one; `lobo-fx recipes` lists recipes."
        )

    return Answer(text, lambda: {"passes": entries, "recipes": builtin_recipes(), "failures": failures})


def _facts(name: str) -> dict[str, Any]:
    """The facts of a pass as plain data; if settings have no defaults, without what it needs.

    Raises:
        InvalidInput: there is no such pass, or it can't be imported or shown; names it and its package.
    """
    import dataclasses

    from lobo_fx.contracts.setting_facts import description_of, example_of, settings_of
    from lobo_fx.plugins.registry import PASSES

    kind = PASSES.get(name)
    try:
        try:
            needs = list(kind().needs)
        except TypeError:
            needs = []
        settings, example = settings_of(kind), example_of(name, kind)
    except Exception as error:  # a pass of another package may raise anything
        raise InvalidInput(
            f"the pass '{name}' ({PASSES.origin(name)}) can't be made at its defaults: {error}"
        ) from error
    description = description_of(kind)
    return {
        "name": name,
        "aliases": PASSES.names().get(name, []),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "promise": kind.promise.value,
        "needs": needs,
        "summary": description.partition("\n")[0],
        "description": description,
        "settings": [dataclasses.asdict(setting) for setting in settings],
        "example": example,
    }


def _one(entry: dict[str, Any]) -> str:
    """A pass with its settings, one below the other, as their meanings are too long for columns."""
    from lobo_fx.terminal.tables import folded, printable, records

    head = {
        "also": ", ".join(entry["aliases"]),
        "promise": entry["promise"],
        "needs": ", ".join(entry["needs"]),
        "in Python": entry["class"],
        "example": f"lobo-fx compile MODEL --pass {entry['example']}",
    }
    shown = [
        (
            setting["name"],
            {
                "type": setting["type"],
                "one of": ", ".join(setting["values"]),
                "default": setting["default"] or "none: it must be given",
                "": setting["meaning"],
            },
        )
        for setting in entry["settings"]
    ]
    return printable(f"{entry['name']}\n\n{folded(entry['description'])}\n\n{records([('', head), *shown])}")
