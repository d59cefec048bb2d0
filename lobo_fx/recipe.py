"""Recipes: passes and their settings in YAML, validated with messages that point at the line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_readable
from lobo_fx.plugins.registry import PASSES
from lobo_fx.plugins.settings import check_names, named_settings

__all__ = [
    "PassSpec",
    "build",
    "builtin_recipes",
    "entries",
    "line_of",
    "pass_of",
    "read_pass",
    "read_recipe",
    "read_text",
    "read_value",
    "recipe_text",
    "resolve",
    "value_of",
]

_N_OF_M, _POWER = re.compile(r"\d+:\d+"), re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
PassSpec = Pass | type[Pass] | str | Path
"""A pass (or its class), a pass name, or a recipe: the path of a YAML file or the name of a built-in one."""


class _Values(yaml.SafeLoader):
    """Reads `1e-3` as a number; YAML 1.1 takes it for text, and only `1.0e-3` for a number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        found = super().construct_object(node, deep)
        plain = isinstance(node, yaml.ScalarNode) and not node.style
        return float(found) if plain and isinstance(found, str) and _POWER.fullmatch(found) else found


def resolve(passes: PassSpec | Iterable[PassSpec]) -> list[Pass]:
    """Turns what a user wrote into pass objects.

    Raises:
        InvalidInput: an unknown name or wrong settings.
    """
    if isinstance(passes, (str, Path, Pass, type)):
        passes = [passes]
    if not isinstance(passes, Iterable):
        raise InvalidInput(f"passes is a {type(passes).__name__}; expected a list of passes, names or recipes")
    chosen: list[Pass] = []
    for entry in passes:
        if isinstance(entry, Pass):
            chosen.append(entry)
        elif isinstance(entry, type) and issubclass(entry, Pass):
            chosen.append(build(entry, {}))
        elif isinstance(entry, (str, Path)):
            chosen.extend(_named(str(entry)))
        else:
            raise InvalidInput(f"passes holds a {type(entry).__name__}; expected a pass, a name or a recipe file")
    return chosen


def _named(name: str) -> list[Pass]:
    if name.endswith((".yaml", ".yml")):
        return read_recipe(read_text(Path(name)), name)
    if name in builtin_recipes():
        return read_recipe(recipe_text(name), f"recipe {name}")
    return [build(PASSES.get(name, builtin_recipes()), {})]


def read_text(path: Path, what: str = "recipe") -> str:
    """The text of a file of YAML.

    Raises:
        InvalidInput: there is no such file, or it can't be read, or is not UTF-8.
    """
    check_readable(path, f"no {what} file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is no text file") from None


def _folder() -> Any:
    return resources.files("lobo_fx") / "recipes"


def builtin_recipes() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML text of a built-in recipe."""
    text: str = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return text


def read_recipe(text: str, source: str) -> list[Pass]:
    """Reads a recipe.

    Args:
        text: YAML with one key, `passes`: a list of names, or of `name: {setting: value}`.
        source: the file's name, for messages.

    Raises:
        InvalidInput: not YAML, or not a recipe; the message starts with `source:line`.

    Example:
        ```yaml
        passes:
          - fold_batch_norm
          - quantize_static: {observer: histogram}
        ```
    """
    return [pass_of(entry, source) for entry in entries(text, source)]


def entries(text: str, source: str, what: str = "recipe") -> list[yaml.Node]:
    """The entries under `passes`, as YAML nodes that know their lines.

    Args:
        text: as `read_recipe` takes it.
        source: likewise.
        what: kind of the text, for messages.

    Raises:
        InvalidInput: not YAML, or no such list; the message starts with `source:line`.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise InvalidInput(f"{source}:1: nested too deeply for a {what}") from None
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else 1
        raise InvalidInput(f"{source}:{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(root, yaml.MappingNode):
        raise InvalidInput(f"{source}:1: a {what} is a mapping with the key 'passes'")
    found: list[yaml.Node] = []
    for at, (key, value) in enumerate(root.value):
        if key.value != "passes":
            raise InvalidInput(f"{source}:{line_of(key)}: unknown key '{key.value}'; a {what} has one key, 'passes'")
        if at:
            raise InvalidInput(f"{source}:{line_of(key)}: 'passes' is given twice")
        if not isinstance(value, yaml.SequenceNode):
            raise InvalidInput(f"{source}:{line_of(value)}: 'passes' must be a list")
        found = value.value
    if not found:
        raise InvalidInput(f"{source}:1: the {what} names no pass")
    return found


def read_pass(text: str) -> Pass:
    """Reads a pass as it is written on the command line: `name` or `name:setting=value,setting=value`.

    Args:
        text: the pass; values are YAML as in recipes, including `{layer1.*: 0.3, layer2.*: 0.5}` and `[a, b]`.

    Raises:
        InvalidInput: an unknown name, or a setting that can't be read or is refused.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in _split(rest):
        key, separator, value = (part.strip() for part in pair.partition("="))
        if not separator or not key:
            raise InvalidInput(f"'{text}': write settings as setting=value, separated by commas, not '{pair.strip()}'")
        if key in settings:
            raise InvalidInput(f"'{text}': '{key}' is set twice")
        try:
            # YAML 1.1 reads 2:4 as a number in base 60
            settings[key] = value if _N_OF_M.fullmatch(value) else yaml.load(value, _Values)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = getattr(error, "problem", error)
            raise InvalidInput(f"'{text}': the value of '{key}' is not YAML: {reason}") from None
    return build(PASSES.get(name.strip()), settings)


def _split(text: str) -> Iterator[str]:
    """Splits at commas that are not inside brackets or quotes."""
    pair, closing, quote = "", 0, ""
    for character in text:
        if character == "," and not closing and not quote:
            yield pair
            pair = ""
            continue
        pair += character
        if character in "\"'":
            quote = "" if quote == character else quote or character
        elif not quote:
            closing += (character in "[{") - (character in "]}")
    if text:
        yield pair


def pass_of(node: yaml.Node, source: str) -> Pass:
    """Builds the pass of one entry of a recipe.

    Raises:
        InvalidInput: an unknown name or wrong settings; the message starts with `source:line`.
    """
    settings: dict[str, Any] = {}
    lines: dict[str, int] = {}
    name = node
    if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        name, body = node.value[0]
        if not isinstance(body, yaml.MappingNode):
            raise InvalidInput(f"{source}:{line_of(body)}: settings must be 'name: value' pairs")
        for key, _ in body.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise InvalidInput(f"{source}:{line_of(key)}: the name of a setting must be text")
            if key.value in lines:
                raise InvalidInput(f"{source}:{line_of(key)}: '{key.value}' is set twice")
            lines[key.value] = line_of(key)
        try:
            settings = value_of(body)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InvalidInput(f"{source}:{line_of(body)}: {getattr(error, 'problem', error)}") from None
    if not isinstance(name, yaml.ScalarNode):
        raise InvalidInput(f"{source}:{line_of(node)}: a pass is a name, or 'name: {{setting: value}}'")
    try:
        kind = PASSES.get(name.value)
    except InvalidInput as error:
        raise InvalidInput(f"{source}:{line_of(name)}: {error}") from None
    try:
        return build(kind, settings)
    except InvalidInput as error:
        fault = str(error).removeprefix(f"{kind.__name__}: ")
        line = next((lines[s] for s in lines if f"'{s}'" in fault or fault.startswith(s)), line_of(name))
        raise InvalidInput(f"{source}:{line}: {error}") from None


def build(kind: type[Pass], settings: dict[str, Any]) -> Pass:
    """Constructs a pass, refusing settings that it does not have.

    Raises:
        InvalidInput: an unknown setting (the nearest is suggested) or a bad value; the message names the pass.
    """
    check_names(kind, settings)
    try:
        return kind(**settings)
    except (InvalidInput, TypeError) as error:
        raise InvalidInput(f"{kind.__name__}: {error}") from None


def read_value(value: object, setting: str) -> Pass:
    """Reads a pass that is given as a setting of another pass.

    Args:
        value: a pass, its name, or `{name: {setting: value}}` as in recipes.
        setting: name of the setting, for messages.

    Raises:
        InvalidInput: it is none of these, or the pass refuses its settings.
    """
    if isinstance(value, Pass):
        return value
    if isinstance(value, str):
        return read_pass(value)
    if named := named_settings(value):
        name, settings = named
        return build(PASSES.get(str(name)), settings)
    raise InvalidInput(f"{setting} is {value!r}; give a pass, its name, or {{name: {{setting: value}}}}")


def value_of(node: yaml.Node) -> Any:
    """What a node holds, as Python has it."""
    return _Values("").construct_object(node, deep=True)


def line_of(node: yaml.Node) -> int:
    """The line on which a node starts, counted from 1."""
    return int(node.start_mark.line) + 1
