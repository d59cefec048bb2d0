"""A page for each pass: what it does, promises, needs and takes, from its class; figures from `docs/figures.md`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lobo_docs.docstrings import Docstring, read
from lobo_docs.figures import paragraph
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.contracts.setting_facts import settings_of
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import build

__all__ = ["Fragment", "page", "pages"]

GIVEN = {
    "calibration_data": ("calibration_data=loader", "--calibration-data images.npz"),
    "train_data": ("train_data=labelled", "--train-data labelled.npz"),
    "loss_fn": ("loss_fn=cross_entropy", "--loss cross_entropy"),
    "evaluate": ("evaluate=accuracy", "--evaluate score.py:accuracy"),
}
"""By what a pass may need, how Python and the command line give it."""


@dataclasses.dataclass(frozen=True)
class Fragment:
    """What a person wrote about a pass: `docs/fragments/NAME.md`.

    Attributes:
        example: settings of the example.
        figures: paragraphs of `docs/figures.md` that speak of it, by their bold titles.
        text: Markdown for the end of the page.
    """

    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: tuple[str, ...] = ()
    text: str = ""

    @classmethod
    def read(cls, path: Path) -> Fragment:
        """From a file with settings in YAML between two lines of `---`; none where there is no file."""
        if not path.is_file():
            return cls()
        _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
        given = yaml.safe_load(head) or {}
        return cls(given.get("example", {}), tuple(given.get("figures", ())), text.strip())


def pages(docs: Path) -> dict[str, str]:
    """A page for each pass that comes with lobo-fx, and a list of them."""
    own = {name: kind for name in PASSES.names() if (kind := PASSES.get(name)).__module__.startswith("lobo_fx.")}
    made = {f"{name}.md": page(name, kind, docs) for name, kind in sorted(own.items())}
    return {**made, "index.md": _index(own)}


def page(name: str, kind: type[Pass], docs: Path) -> str:
    """The page of one pass."""
    doc, fragment = read(kind), Fragment.read(docs / "fragments" / f"{name}.md")
    example = build(kind, dict(fragment.example))
    aliases = PASSES.names()[name]
    parts = [
        f"# {kind.__name__}",
        doc.text,
        _facts(name, aliases, kind, example),
        "## How to ask for it",
        _asking(name, example, fragment.example),
        "## Settings",
        _settings(kind),
        *["## Figures"] * bool(fragment.figures),
        *[paragraph(docs, title) for title in fragment.figures],
        fragment.text,
        *(["## Source", _source(doc)] if "Source" in doc.sections else []),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _facts(name: str, aliases: list[str], kind: type[Pass], example: Pass) -> str:
    names = ", ".join(f"`{entry}`" for entry in (name, *aliases))
    asked = ", ".join(f"`{need}`" for need in example.needs) or "nothing beside the model"
    why = f": {inspect.getdoc(type(example).needs)}" if type(example).needs is not Pass.needs else "."
    rows = {
        "promise": f"{kind.promise.value}. Outputs: {read(Promise).entries('Attributes')[kind.promise.name]}"
        " See [promises](../../how/promises.md).",
        "needs": f"as in the example below, {asked}{why}",
        "name in recipes and on the command line": names,
        "class": f"`lobo_fx.passes.{kind.__name__}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _asking(name: str, example: Pass, settings: Mapping[str, Any]) -> str:
    """The same settings in Python, as a recipe, and as a command."""
    needs = [GIVEN[need] for need in example.needs]
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    keywords = "".join(f",\n    {python}" for python, _ in needs)
    entry = {name: dict(settings)} if settings else name
    recipe = yaml.safe_dump({"passes": [entry]}, sort_keys=False, default_flow_style=None)
    written = ",".join(f"{key}={_inline(value)}" for key, value in settings.items())
    option = f"{name}:{written}" if settings else name
    option = f"'{option}'" if re.search(r"[ {}*\[\]]", option) else option
    command = " ".join(["lobo-fx compile MODEL --pass", option, *(command for _, command in needs), "-o out"])
    return (
        f"```python\nlobo_fx.compile(\n    model,\n    [lobo_fx.passes.{type(example).__name__}({arguments})],\n"
        f"    example_inputs=images{keywords},\n)\n```\n\n```yaml\n{recipe}```\n\n```sh\n{command}\n```"
    )


def _inline(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def _settings(kind: type[Pass]) -> str:
    """A table of the class's own settings, then those that it shares with others of its kind."""
    own, found = vars(kind).get("__annotations__", {}), settings_of(kind)
    groups = {
        "": [setting for setting in found if setting.name in own],
        "Every pass that trains has these too:\n\n": [setting for setting in found if setting.name not in own],
    }
    tables: list[str] = []
    for title, settings in groups.items():
        rows = ["| setting | default | type | what it does |", "|---|---|---|---|"]
        for setting in settings:
            default, of = (text.replace("|", "\\|") for text in (setting.default or "required", setting.type))
            rows.append(f"| `{setting.name}` | `{default}` | `{of}` | {_cell(setting.meaning)} |")
        tables += [title * bool(tables) + "\n".join(rows)] if settings else []
    return "\n\n".join(tables) or "None."


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def _source(doc: Docstring) -> str:
    text = " ".join(doc.sections["Source"].split())
    return text[:1].upper() + text[1:]


def _index(own: Mapping[str, type[Pass]]) -> str:
    rows = [
        f"| [{kind.__name__}]({name}.md) | {_cell(read(kind).summary)} | {kind.promise.value} |"
        for name, kind in sorted(own.items(), key=lambda entry: entry[1].__name__)
    ]
    listed = "\n".join(sorted(own))
    return (
        "# Passes\n\nA pass is a rewrite of a model with settings and a [promise](../../how/promises.md). Each page is "
        "made from the pass itself.\n\n| pass | what it does | promise |\n|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )
