"""Spaces: recipes in which settings, or whole passes, are choices; read and validated like recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.recipe import entries, line_of, pass_of, read_text, value_of

__all__ = ["Alternatives", "Choice", "Decide", "Interval", "Space", "read_space"]

_CHOOSE, _ONE_OF, _OPTIONAL = "choose", "one_of", "optional"
_INTERVAL = ("from", "to", "step", "log")


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """A choice of one among several settings, or among several lists of passes.

    Attributes:
        name: what it decides: `prune_channels.ratio`, `pass 2`.
        labels: the alternatives as text.
        nodes: the alternatives.
        of_passes: whether they are lists of passes.
    """

    name: str
    labels: tuple[str, ...]
    nodes: tuple[yaml.Node, ...]
    of_passes: bool

    @property
    def ends(self) -> Sequence[Any]:
        """The values to try before any work: all."""
        return range(len(self.nodes))

    def node(self, index: int) -> yaml.Node:
        """The alternative with this index."""
        return self.nodes[index]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A choice of one number between two.

    Attributes:
        name: what it decides.
        low: the smallest value.
        high: the largest value.
        step: distance between values; None for any number in between.
        log: whether orders of magnitude are equally likely.
        place: the node that it was read from.
    """

    name: str
    low: float
    high: float
    step: float | None
    log: bool
    place: yaml.Node = dataclasses.field(compare=False)

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int)

    @property
    def ends(self) -> Sequence[Any]:
        """The values to try before any work: the smallest and the largest."""
        return (self.low, self.high)

    def node(self, value: float) -> yaml.Node:
        """A node with the value, in the interval's place."""
        made = yaml.representer.SafeRepresenter().represent_data(value)
        made.start_mark, made.end_mark = self.place.start_mark, self.place.end_mark
        return made


Choice = Alternatives | Interval
Decide = Callable[[Choice], Any]
"""From a choice to the index of an alternative, or to a number in an interval."""


@dataclasses.dataclass(frozen=True)
class Space:
    """A recipe with choices.

    Attributes:
        source: the file's name, for messages.
        passes: the entries under `passes`.
        choices: choices by the identity of the node that holds them, in the order of the file. A choice that an anchor
            repeats is a single choice.
    """

    source: str
    passes: Sequence[yaml.Node]
    choices: dict[int, Choice]

    def __str__(self) -> str:
        """The space without comments: equal spaces have equal texts."""
        return _written(self.passes)

    def decided(self, decide: Decide) -> list[yaml.Node]:
        """The entries of the recipe with all choices made."""
        return _Decided(self.choices, decide).passes(self.passes)

    def recipe(self, decide: Decide) -> str:
        """The recipe with all choices made, as YAML."""
        return _written(self.decided(decide))

    def build(self, decide: Decide) -> list[Pass]:
        """The passes of the recipe with all choices made.

        Raises:
            InvalidInput: a pass refuses a combination of settings; the message starts with `source:line`.
        """
        return [pass_of(entry, self.source) for entry in self.decided(decide)]

    def variants(self) -> Iterator[list[Pass]]:
        """Lists of passes that together try each alternative of every choice, and both ends of every interval.

        Raises:
            InvalidInput: a pass refuses a value; the message starts with `source:line`.
        """
        tried: set[tuple[str, Any]] = set()
        waiting: list[dict[str, Any]] = [{}]
        while waiting:
            fixed, met = waiting.pop(), dict[str, Any]()

            def decide(choice: Choice, fixed: dict[str, Any] = fixed, met: dict[str, Any] = met) -> Any:
                value = met[choice.name] = fixed.get(choice.name, choice.ends[0])
                tried.add((choice.name, value))
                waiting.extend({**met, choice.name: end} for end in choice.ends if (choice.name, end) not in tried)
                tried.update((choice.name, end) for end in choice.ends)
                return value

            yield self.build(decide)


def read_space(space: str | Path) -> Space:
    """Reads a space: a recipe in which settings may be choices, and entries may be choices among passes.

    Args:
        space: the path of a YAML file, or its text (which has more than one line).

    Raises:
        InvalidInput: no such file, not a space, no choice in it, or a pass refuses one of the values; the message
            starts with `source:line`.

    Example:
        ```yaml
        passes:
          - optional:
              prune_channels:
                ratio: {from: 0.1, to: 0.6}
                importance: {choose: [l2, taylor]}
          - one_of:
              - quantize_static: {observer: {choose: [min_max, histogram]}}
              - quantize_dynamic
        ```
    """
    is_text = isinstance(space, str) and "\n" in space
    source = "space" if is_text else str(space)
    text = str(space) if is_text else read_text(Path(space), "space")
    reader = _Reader(source)
    try:
        found = entries(text, source, "space")
        reader.passes(found, top=True)
        made = Space(source, found, reader.choices)
        if not made.choices:
            raise InvalidInput(
                f"{source}:1: the space has no choice; write one as {{choose: [a, b]}} or {{from: 0.1, to: 0.6}} in a "
                "setting's place, or compile it as a recipe"
            )
        for passes in made.variants():
            for pass_ in passes:
                if pass_.settings.get("checkpoint_dir") is not None:
                    raise InvalidInput(
                        f"{source}:1: {pass_.name} has a checkpoint_dir, where each trial would find the checkpoints "
                        "of another; leave it out of a space"
                    )
    except RecursionError:
        raise InvalidInput(f"{source}:1: nested too deeply for a space") from None
    return made


class _Reader:
    """Finds the choices of a space and names them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.choices: dict[int, Choice] = {}
        self.names: set[str] = set()
        self.seen: set[int] = set()

    def passes(self, nodes: Sequence[yaml.Node], top: bool = False) -> None:
        for number, node in enumerate(nodes, 1):
            if id(node) in self.seen:
                continue
            self.seen.add(id(node))
            key, value = _only_entry(node)
            if key in (_ONE_OF, _OPTIONAL):
                self._passes_chosen(node, key, value, f"pass {number}" if top else f"pass of line {line_of(node)}")
            elif isinstance(value, yaml.MappingNode):
                self._setting(value, key, is_whole_pass=True)

    def _passes_chosen(self, node: yaml.Node, key: str, value: yaml.Node, name: str) -> None:
        alternatives = [_sequence([], node), value] if key == _OPTIONAL else self._several(value, key)
        lists = [
            entry if isinstance(entry, yaml.SequenceNode) else _sequence([] if _is_null(entry) else [entry], entry)
            for entry in alternatives
        ]
        self._add(node, lists, name, of_passes=True)
        for entry in lists:
            self.passes(entry.value)

    def _setting(self, node: yaml.Node, name: str, is_whole_pass: bool = False) -> None:
        if id(node) in self.seen:
            return
        self.seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for number, entry in enumerate(node.value, 1):
                self._setting(entry, f"{name}.{number}")
        if not isinstance(node, yaml.MappingNode):
            return
        keys = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        if not is_whole_pass and _CHOOSE in keys:
            key, value = _only_entry(node)
            if not key:
                raise self._refused(node, "'choose' stands alone: {choose: [a, b]}")
            alternatives = self._several(value, key)
            self._add(node, alternatives, name)
            for entry in alternatives:
                self._setting(entry, name)
        elif not is_whole_pass and ("from" in keys or (keys and keys <= {*_INTERVAL})):
            self._interval(node, name)
        else:
            for key_node, value in node.value:
                self._setting(value, f"{name}.{key_node.value}")

    def _several(self, value: yaml.Node, key: str) -> list[yaml.Node]:
        if not isinstance(value, yaml.SequenceNode) or len(value.value) < 2:
            raise self._refused(value, f"'{key}' needs a list of two or more")
        return list(value.value)

    def _add(self, node: yaml.Node, alternatives: Sequence[yaml.Node], name: str, of_passes: bool = False) -> None:
        labels = [_names(entry) if of_passes else _label(entry) for entry in alternatives]
        if len(set(labels)) < len(labels):
            labels = [_label(entry) for entry in alternatives]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise self._refused(alternatives[index], f"'{label}' is given twice")
        self.choices[id(node)] = Alternatives(self._named(name), tuple(labels), tuple(alternatives), of_passes)

    def _interval(self, node: yaml.MappingNode, name: str) -> None:
        given: dict[str, Any] = {}
        for key, value in node.value:
            if key.value not in _INTERVAL:
                raise self._refused(key, f"an interval has no '{key.value}'; {suggestion(key.value, _INTERVAL)}")
            given[key.value] = value_of(value)
        low, high, step, log = (given.get(key) for key in _INTERVAL)
        for key in ("from", "to", *(["step"] if step is not None else [])):
            if type(given.get(key)) not in (int, float):
                raise self._refused(node, f"'{key}' of an interval is {given.get(key)!r}; expected a number")
        assert low is not None
        assert high is not None
        if not -float("inf") < low < high < float("inf"):
            raise self._refused(node, f"an interval from {low} to {high} holds nothing to choose from")
        if log not in (None, True, False) or (log and (step is not None or low <= 0)):
            raise self._refused(node, "'log' is true or false, and takes no step and starts above 0")
        whole = all(isinstance(value, int) for value in (low, high, 1 if step is None else step))
        if step is not None and not 0 < step <= high - low:
            raise self._refused(node, f"steps of {step} don't fit between {low} and {high}")
        if whole and not log:
            step = 1 if step is None else step
            high -= (high - low) % step
        low, high = (low, high) if whole else (float(low), float(high))
        self.choices[id(node)] = Interval(self._named(name), low, high, step, bool(log), node)

    def _named(self, name: str) -> str:
        """The name, with a number added if another choice has it."""
        number, found = 1, name
        while found in self.names:
            number += 1
            found = f"{name} ({number})"
        self.names.add(found)
        return found

    def _refused(self, node: yaml.Node, why: str) -> InvalidInput:
        return InvalidInput(f"{self.source}:{line_of(node)}: {why}")


class _Decided:
    """Nodes with the chosen values in place of choices; nodes that an anchor repeats stay shared."""

    def __init__(self, choices: dict[int, Choice], decide: Decide) -> None:
        self.choices, self.decide = choices, decide
        self.made: dict[int, yaml.Node] = {}

    def passes(self, nodes: Sequence[yaml.Node]) -> list[yaml.Node]:
        found: list[yaml.Node] = []
        for node in nodes:
            made = self.node(node)
            found += self.passes(made.value) if id(node) in self.choices else [made]
        return found

    def node(self, node: yaml.Node) -> yaml.Node:
        if id(node) not in self.made:
            self.made[id(node)] = self._new(node)
        return self.made[id(node)]

    def _new(self, node: yaml.Node) -> yaml.Node:
        if (choice := self.choices.get(id(node))) is not None:
            picked = choice.node(self.decide(choice))
            # `passes` expands lists of passes, which may hold choices of their own
            return picked if isinstance(choice, Interval) or choice.of_passes else self.node(picked)
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, self.node(value)) for key, value in node.value]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
        if isinstance(node, yaml.SequenceNode):
            return _sequence([self.node(entry) for entry in node.value], node)
        return node


def _only_entry(node: yaml.Node) -> tuple[str, yaml.Node]:
    """Key and value of a mapping with one entry; an empty key for any other node."""
    if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        key, value = node.value[0]
        return str(key.value), value
    return "", node


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _sequence(nodes: list[yaml.Node], place: yaml.Node) -> yaml.SequenceNode:
    style = getattr(place, "flow_style", None)
    return yaml.SequenceNode("tag:yaml.org,2002:seq", nodes, place.start_mark, place.end_mark, style)


def _label(node: yaml.Node) -> str:
    """A node as one line of text."""
    text = yaml.serialize(node, Dumper=yaml.SafeDumper, width=float("inf"))
    return " ".join(text.removesuffix("...\n").split())


def _names(node: yaml.Node) -> str:
    """The names of the passes in a list."""
    return ", ".join(_only_entry(entry)[0] or _label(entry) for entry in node.value) or "nothing"


def _written(passes: Sequence[yaml.Node]) -> str:
    key = yaml.ScalarNode("tag:yaml.org,2002:str", "passes")
    value = yaml.SequenceNode("tag:yaml.org,2002:seq", list(passes), flow_style=False)
    root = yaml.MappingNode("tag:yaml.org,2002:map", [(key, value)], flow_style=False)
    return str(yaml.serialize(root, Dumper=yaml.SafeDumper, width=120))
