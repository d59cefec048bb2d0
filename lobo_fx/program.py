"""The `Program`: a traced model as a graph that is still a trainable `nn.Module`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lobo_fx.errors import InvalidInput
from lobo_fx.inputs import Inputs
from lobo_fx.operators import arguments, is_inplace, set_argument, training_flag
from lobo_fx.quiet import quiet
from lobo_fx.shapes import Dimension, TensorSpec, dimension_names, output_values, tensor_specs

_ALWAYS_TRAINING = "lobo_fx_always_training"
_SIGNATURE = "lobo_fx_signature"
NOTES = "lobo_fx_notes"
ESTIMATED = "lobo_fx_estimated"
"""Set in a module's `meta` by a pass whose choices rest on estimated times: the whole file is to confirm them."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a program takes and gives: the part of it that no pass may change.

    Attributes:
        names: top-level input names as the user's `forward` has them, positional ones first.
        positional: how many of them were traced as positional.
        inputs: a specification for each flattened input, None for one that is no tensor.
        outputs: likewise for each flattened output.
        structure: how the outputs nest (tuple, dict, `ModelOutput`, ...).
        nesting: how positional and keyword inputs nest.
        constants: for each flattened input that is no tensor, the value it was traced with.
    """

    names: tuple[str, ...]
    positional: int
    inputs: tuple[TensorSpec | None, ...]
    outputs: tuple[TensorSpec | None, ...]
    structure: pytree.TreeSpec
    nesting: pytree.TreeSpec
    constants: tuple[Any, ...]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """Arranges a call's inputs as they were traced, whether passed by position or by name.

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
        inputs = Inputs(tuple(given[name] for name in by_position), {name: given[name] for name in by_name})
        self._check(inputs)
        return inputs

    def bind_batch(self, batch: object) -> Inputs:
        """Arranges what a data loader yields: a tensor, a tuple (inputs first, labels after) or a dict.

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

    def is_nested(self, batch: object) -> bool:
        """Whether a batch holds the inputs nested as its first entry, which is no nested input itself."""
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
                if leaf != constant:
                    raise InvalidInput(
                        f"{leaf!r} given where {constant!r} was traced as a constant; inputs: {', '.join(self.names)}"
                    )
                continue
            if not isinstance(leaf, torch.Tensor):
                raise InvalidInput(f"input '{spec.name}' is a {type(leaf).__name__}, expected {spec}")
            fits = leaf.dim() == len(spec.shape) and leaf.dtype == spec.dtype
            fits = fits and all(_fits(n, d, free) for n, d in zip(leaf.shape, spec.shape, strict=True))
            if not fits:
                shape = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
                raise InvalidInput(f"input '{spec.name}' is {shape}, the program takes {spec}")

    def __str__(self) -> str:
        return "; ".join(str(spec) for spec in self.inputs if spec)


def _fits(size: int, dimension: Dimension, free: dict[str, int]) -> bool:
    """Whether `size` agrees with a constant, or with what a free dimension was elsewhere in the call."""
    if isinstance(dimension, int):
        return size == dimension
    return not dimension.isidentifier() or free.setdefault(dimension, size) == size


class ProgramModule(fx.GraphModule):
    """A graph as an `nn.Module`: trains, deep-copies, and takes inputs by position or by name.

    `train()` and `eval()` switch the dropout and batch-norm nodes of the graph; a node that was in
    training mode although the model was traced for inference (Monte-Carlo dropout) stays in it.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "ProgramModule") -> None:
        super().__init__(root, graph, class_name)
        for name, parameter in root.named_parameters(remove_duplicate=False):
            register(self, name, parameter)
        persistent = root.state_dict(keep_vars=True).keys()
        for name, buffer in root.named_buffers(remove_duplicate=False):
            register(self, name, buffer, persistent=name in persistent)
        if not root.training:
            torch.nn.Module.train(self, False)
        self.register_forward_pre_hook(_bind_call, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        with quiet():  # torch warns of its own pytree specifications
            return cast("ProgramModule", super().__deepcopy__(memo))

    def _deepcopy_init(self) -> Callable[..., None]:
        return ProgramModule.__init__

    def train(self, mode: bool = True) -> ProgramModule:
        """Switches to training (or inference) as `nn.Module.train` does, the graph's nodes included."""
        super().train(mode)
        changed = False
        for node in self.graph.nodes:
            flag = training_flag(node)
            if flag is None or node.meta.get(_ALWAYS_TRAINING):
                continue
            set_argument(node, flag, mode)
            changed = True
        if changed:
            self.recompile()
        return self

    @property
    def signature(self) -> Signature | None:
        signature: Signature | None = self.meta.get(_SIGNATURE)
        return signature


def mark_always_training(graph: fx.Graph) -> None:
    """Notes which nodes train even in a graph traced for inference, so that `eval()` leaves them alone."""
    for node in graph.nodes:
        flag = training_flag(node)
        if flag is not None and arguments(node)[flag] is True:
            node.meta[_ALWAYS_TRAINING] = True


def _bind_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    assert isinstance(module, ProgramModule)
    if module.signature is None:
        return args, kwargs
    inputs = module.signature.bind(args, kwargs)
    return inputs.args, dict(inputs.kwargs)


def register(module: nn.Module, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
    """Registers a parameter or buffer under its dotted name, making plain modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
        return
    if leaf in module.__dict__:
        delattr(module, leaf)
    module.register_buffer(leaf, tensor, persistent=persistent)


@dataclasses.dataclass(frozen=True)
class Program:
    """A model under compilation: the module with its graph, and the example inputs it is checked on.

    Attributes:
        module: callable, trainable; parameters under the original names.
        example_inputs: the inputs that every pass is verified on.
    """

    module: ProgramModule
    example_inputs: Inputs

    @property
    def notes(self) -> list[str]:
        """What tracing left as it was, one sentence each."""
        notes: list[str] = self.module.meta.setdefault(NOTES, [])
        return notes

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def signature(self) -> Signature:
        """Names, dtypes and shapes of inputs and outputs, from the last shape propagation."""
        return signature_of(self.module)

    def clone(self) -> Program:
        """An independent copy: no tensor is shared."""
        return Program(copy.deepcopy(self.module), self.example_inputs)

    def with_graph_module(self, module: fx.GraphModule) -> Program:
        """This program with another graph, for instance what a library's transform returned."""
        if not isinstance(module, ProgramModule):
            module = ProgramModule(module, module.graph)
        module.meta = self.module.meta
        return dataclasses.replace(self, module=module)

    def parameter(self, node: fx.Node) -> torch.Tensor:
        """The parameter or buffer that a `get_attr` node reads."""
        return cast("torch.Tensor", fetch(self.module, str(node.target)))

    def run(self, inputs: Inputs | None = None) -> Any:
        """Calls the module in inference mode (eval, no gradients) on `inputs` (default: the examples)."""
        inputs = self.example_inputs if inputs is None else inputs
        with torch.no_grad(), self.inference(), self._kept_buffers():
            return self.module(*inputs.args, **inputs.kwargs)

    @contextlib.contextmanager
    def _kept_buffers(self) -> Iterator[None]:
        """Gives buffers that the graph writes to their values back."""
        buffers = list(self.module.buffers()) if any(map(is_inplace, self.graph.nodes)) else []
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Eval mode for a while."""
        if not self.module.training:
            yield
            return
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()


def fetch(module: nn.Module, name: str) -> Any:
    """The attribute with a dotted name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def signature_of(module: fx.GraphModule) -> Signature:
    """Reads the signature off a graph whose shapes are propagated."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    input_names = [str(node.target) for node in placeholders]  # a node's own name avoids Python's builtins
    symbols = dimension_names(graph)
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    args_spec, _ = info.in_spec.children()
    structure = info.out_spec
    outputs = output_values(graph)
    return Signature(
        names=tuple(info.orig_args),
        positional=args_spec.num_children,
        inputs=tensor_specs(input_names, [n.meta.get("val") for n in placeholders], symbols),
        outputs=tensor_specs(_output_names(structure, len(outputs), input_names), outputs, symbols),
        structure=structure,
        nesting=info.in_spec,
        constants=tuple(None if isinstance(v, torch.Tensor) else v for v in (n.meta.get("val") for n in placeholders)),
    )


def _output_names(structure: pytree.TreeSpec, count: int, taken: Iterable[str]) -> list[str]:
    """Names of flattened outputs: the keys of a dict or ModelOutput, joined by dots; else `output_0`, ...

    A name that an input or an earlier output has gets `_out` after it: a file needs them to differ.
    """
    tree = pytree.tree_unflatten(list(range(count)), structure)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    names = [".".join(_key(entry) for entry in path) for path in paths]
    if count == 1 and names[0] in ("", "0"):
        return ["output"]
    known, unique = set(taken), []
    for name in (f"output_{name}" if not name or name[0].isdigit() else name for name in names):
        while name in known:
            name += "_out"
        known.add(name)
        unique.append(name)
    return unique


def _key(entry: Any) -> str:
    return str(next(getattr(entry, field) for field in ("key", "idx", "name") if hasattr(entry, field)))


def seal(module: ProgramModule) -> None:
    """Fixes the signature that calls of `module` are checked against."""
    module.meta[_SIGNATURE] = signature_of(module)
