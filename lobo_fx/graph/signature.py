"""The inputs and outputs of a program: the part that no pass may change."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.shapes import (
    Dimension,
    FreeDimension,
    TensorSpec,
    dimension_names,
    names_in,
    output_values,
    tensor_specs,
)

__all__ = ["Signature", "signature_of"]


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a program: the part that no pass may change.

    Attributes:
        names: top-level input names of the user's `forward`, positional ones first.
        positional: how many of them were traced as positional.
        inputs: a specification for each flattened input, None for one that is no tensor.
        outputs: likewise for each flattened output.
        structure: how the outputs nest (tuple, dict, `ModelOutput`, ...).
        nesting: how positional and keyword inputs nest.
        constants: the traced value of each flattened input that is no tensor; None for tensors.
        free: what is known of the free dimensions, with the names that they have here.
    """

    names: tuple[str, ...]
    positional: int
    inputs: tuple[TensorSpec | None, ...]
    outputs: tuple[TensorSpec | None, ...]
    structure: pytree.TreeSpec
    nesting: pytree.TreeSpec
    constants: tuple[Any, ...]
    free: tuple[FreeDimension, ...] = ()

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """Arranges the inputs of a call as they were traced, whether passed by position or by name.

        Raises:
            InvalidInput: an input is missing, unknown, given twice, or of another rank, size or dtype.
        """
        if len(args) > len(self.names):
            raise InvalidInput(f"{len(args)} inputs given, the program takes {len(self.names)}: {self}")
        given = dict(zip(self.names, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            raise InvalidInput(f"input {sorted(twice)} given twice, by position and by name")
        given |= kwargs
        unknown = [name for name in given if name not in self.names]
        missing = [name for name in self.names if name not in given]
        if unknown or missing:
            words = [f"missing {missing}"] * bool(missing) + [f"unknown {unknown}"] * bool(unknown)
            raise InvalidInput(f"inputs do not fit: {', '.join(words)}. The program takes {self}")
        by_position, by_name = self.names[: self.positional], self.names[self.positional :]
        values = (tuple(given[name] for name in by_position), {name: given[name] for name in by_name})
        inputs = Inputs(*_in_order(values, self.nesting))
        self._check(inputs)
        return inputs

    def bind_batch(self, batch: object) -> Inputs:
        """Arranges a batch of a data loader: a tensor, a tuple (inputs first, labels after) or a dict.

        A tuple may hold the inputs nested as its first entry: `((image, mask), label)`, `({"ids": ...}, label)`.

        Raises:
            InvalidInput: the batch lacks an input, or has one of another rank, size or dtype.
        """
        if isinstance(batch, Inputs):
            return self.bind(batch.args, batch.kwargs)
        if isinstance(batch, torch.Tensor):
            return self.bind((batch,), {})
        if isinstance(batch, Mapping):
            return self.bind((), {name: batch[name] for name in self.names if name in batch})
        if isinstance(batch, (tuple, list)):
            return (
                self.bind_batch(batch[0]) if self.is_nested(batch) else self.bind(tuple(batch[: len(self.names)]), {})
            )
        raise InvalidInput(f"a batch is a {type(batch).__name__}; expected a tensor, a tuple or a dict")

    @property
    def batch(self) -> str | None:
        """Name of the free dimension that counts rows; None if there is none, or rows can't be separated.

        Frames of videos, of which the model takes a multiple, can't be: they are a length. Nor can what another input
        points into: words that offsets divide into bags, of which no output has as many, or nodes that edges join.
        """
        shapes = [spec.shape for spec in self.inputs if spec is not None]
        name = next((str(shape[0]) for shape in shapes if shape and isinstance(shape[0], str)), "")
        computed = [names_in(size) for shape in shapes for size in shape if not str(size).isidentifier()]
        together = {name for names in computed for name in names} | {free.name for free in self.free if free.step > 1}
        results = [spec.shape for spec in self.outputs if spec is not None and spec.shape]
        lost = bool(results) and not any(name in names_in(size) for shape in results for size in shape)
        return name if name.isidentifier() and name not in together and not lost and not self._points(name) else None

    def _points(self, batch: str) -> bool:
        """Whether an input of integers without the batch has free sizes, and none that another input has."""
        specs = [spec for spec in self.inputs if spec is not None]
        sizes = [{name for size in spec.shape for name in names_in(size)} for spec in specs]
        shared = {name for name, count in Counter(name for own in sizes for name in own).items() if count > 1}
        return any(
            own and not own & {batch, *shared} and not spec.dtype.is_floating_point
            for own, spec in zip(sizes, specs, strict=True)
        )

    @property
    def gives_loss(self) -> bool:
        """Whether one of the outputs is a loss, as in Hugging Face models whose inputs hold labels."""
        return any(spec is not None and spec.name == "loss" for spec in self.outputs)

    def count_rows(self, inputs: Inputs) -> int:
        """Number of rows in a batch; 1 for a batch whose rows can't be separated."""
        for leaf, spec in zip(inputs.leaves, self.inputs, strict=True):
            if spec is not None and self.batch in spec.shape:
                return int(leaf.shape[spec.shape.index(self.batch)])
        return 1

    def rows(self, inputs: Inputs) -> Iterator[list[torch.Tensor]]:
        """The rows of a batch one by one, each as its part of every tensor; views."""
        batched = [(leaf, spec) for leaf, spec in zip(inputs.leaves, self.inputs, strict=True) if spec is not None]
        own = [(leaf, spec.shape.index(self.batch)) for leaf, spec in batched if self.batch in spec.shape]
        if not own:
            yield [leaf for leaf, _ in batched]
            return
        for row in range(self.count_rows(inputs)):
            yield [leaf.select(dim, row) for leaf, dim in own]

    def take_rows(self, inputs: Inputs, rows: Sequence[int]) -> Inputs:
        """Selects rows of a batch by number."""
        chosen = torch.tensor(rows, dtype=torch.long)
        leaves, nesting = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
        for index, spec in enumerate(self.inputs):
            if spec is not None and self.batch in spec.shape:
                leaves[index] = leaves[index].index_select(spec.shape.index(self.batch), chosen)
        return Inputs(*pytree.tree_unflatten(leaves, nesting))

    def is_nested(self, batch: object) -> bool:
        """Whether a batch holds the inputs nested in its first entry, while the first input itself is not nested."""
        if not isinstance(batch, (tuple, list)) or not batch or not isinstance(batch[0], (tuple, list, Mapping)):
            return False
        first = self.nesting.child(0).children() + self.nesting.child(1).children()
        return all(child.is_leaf() for child in first[:1])

    def _check(self, inputs: Inputs) -> None:
        leaves, nesting = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
        if nesting != self.nesting:
            raise InvalidInput(f"the inputs nest as {nesting}, the program was traced with {self.nesting}: {self}")
        free: dict[str, int] = {}
        for leaf, spec, constant in zip(leaves, self.inputs, self.constants, strict=True):
            if spec is None:
                if isinstance(leaf, torch.Tensor) or leaf != constant:
                    said = "a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf)
                    raise InvalidInput(
                        f"{said} given where {constant!r} was traced as a constant; inputs: {', '.join(self.names)}"
                    )
                continue
            if not isinstance(leaf, torch.Tensor):
                raise InvalidInput(f"input '{spec.name}' is a {type(leaf).__name__}, expected {spec}")
            fits = leaf.dim() == len(spec.shape) and leaf.dtype == spec.dtype
            fits = fits and all(_fits(n, d, free) for n, d in zip(leaf.shape, spec.shape, strict=True))
            if not fits:
                shape = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
                raise InvalidInput(f"input '{spec.name}' is {shape}, the program takes {spec}")
        for dimension in self.free:
            if not dimension.allows(size := free.get(dimension.name, 0)) and dimension.name in free:
                raise InvalidInput(f"{dimension.name} is {size}, the program takes {dimension}: {self}")

    def __str__(self) -> str:
        return "; ".join(str(spec) for spec in self.inputs if spec)


def _in_order(value: Any, nesting: pytree.TreeSpec) -> Any:
    """A value whose dicts, also nested ones, have their keys in the order in which they were traced."""
    kind = nesting.type
    if kind is not type(value) or kind not in (tuple, list, dict) or len(value) != nesting.num_children:
        return value
    if kind is not dict:
        return kind(map(_in_order, value, nesting.children()))
    if set(value) != set(nesting.context):
        return value
    pairs = zip(nesting.context, nesting.children(), strict=True)
    return {key: _in_order(value[key], child) for key, child in pairs}


def _fits(size: int, dimension: Dimension, free: dict[str, int]) -> bool:
    """Whether `size` equals a constant, or the size of this free dimension elsewhere in the call."""
    if isinstance(dimension, int):
        return size == dimension
    return not dimension.isidentifier() or free.setdefault(dimension, size) == size


def signature_of(
    module: fx.GraphModule, known: Sequence[FreeDimension] = (), names: Mapping[str, str] | None = None
) -> Signature:
    """Reads the signature of a graph whose shapes are propagated.

    Args:
        module: holds the graph.
        known: what is known of its free dimensions, including their names.
        names: names of inputs and outputs, by their default names.
    """
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    input_names = [str(node.target) for node in placeholders]  # a node's own name avoids Python's builtins
    symbols = dimension_names(graph, known)
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    args_spec, _ = info.in_spec.children()
    structure = info.out_spec
    outputs = output_values(graph)
    output_names = _output_names(structure, len(outputs), input_names)
    given = names or {}
    return Signature(
        names=tuple(info.orig_args),
        positional=args_spec.num_children,
        inputs=tensor_specs(_named(input_names, given), [n.meta.get("val") for n in placeholders], symbols),
        outputs=tensor_specs(_named(output_names, given), outputs, symbols),
        structure=structure,
        nesting=info.in_spec,
        constants=tuple(None if isinstance(v, torch.Tensor) else v for v in (n.meta.get("val") for n in placeholders)),
        free=tuple(
            dataclasses.replace(dimension, name=str(name))
            for dimension, name in zip(known, symbols.values(), strict=False)
        ),
    )


def _named(names: Sequence[str], given: Mapping[str, str]) -> list[str]:
    return [given.get(name, name) for name in names]


def _output_names(structure: pytree.TreeSpec, count: int, taken: Iterable[str]) -> list[str]:
    """Names of flattened outputs: the keys of a dict or ModelOutput, joined by dots; else `output_0`, ...

    A name that an input or an earlier output already has gets the suffix `_out`, as names in a file must differ.
    """
    tree = pytree.tree_unflatten(list(range(count)), structure)
    names = [".".join(path) for path in _paths(tree, structure)]
    if count == 1 and names[0] in ("", "0"):
        names = ["output"]
    known, unique = set(taken), []
    for name in (f"output_{name}" if not name or name[0].isdigit() else name for name in names):
        while name in known:
            name += "_out"
        known.add(name)
        unique.append(name)
    return unique


def _paths(tree: Any, structure: pytree.TreeSpec) -> list[tuple[str, ...]]:
    """The keys that lead to each leaf; for a type registered without keys, its context if that is a list of keys."""
    if structure.is_leaf():
        return [()]
    node = pytree.SUPPORTED_NODES[structure.type]
    children, context = node.flatten_fn(tree)
    if node.flatten_with_keys_fn is not None:
        keys = [_key(key) for key, _ in node.flatten_with_keys_fn(tree)[0]]
    elif isinstance(context, (list, tuple)) and len(context) == len(children):
        keys = list(map(str, context))
    else:
        keys = list(map(str, range(len(children))))
    below = [_paths(child, spec) for child, spec in zip(children, structure.children(), strict=True)]
    return [(key, *path) for key, paths in zip(keys, below, strict=True) for path in paths]


def _key(entry: Any) -> str:
    return str(next(getattr(entry, field) for field in ("key", "idx", "name") if hasattr(entry, field)))
