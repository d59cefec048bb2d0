"""The `Program`: a traced model as a graph that is still a trainable `nn.Module`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import torch
from torch import fx, nn

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.facts import ProgramFacts
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.node_facts import facts_of, mark
from lobo_fx.graph.notes import Note
from lobo_fx.graph.operators import arguments, set_argument, training_flag
from lobo_fx.graph.randomness import seeded
from lobo_fx.graph.running import kept_buffers
from lobo_fx.graph.signature import Signature, signature_of
from lobo_fx.graph.tensors import fetch, lazy_clones, register
from lobo_fx.terminal.quiet import no_warnings

__all__ = ["Program", "ProgramModule", "mark_always_training", "seal"]


class ProgramModule(fx.GraphModule):
    """A graph as an `nn.Module`: trains, deep-copies, and takes inputs by position or by name.

    `train()` and `eval()` switch the dropout and batch-norm nodes of the graph. A node that was traced in training mode
    although the model was in inference mode (Monte-Carlo dropout) stays in it.

    Attributes:
        program_facts: facts that the graph does not hold; copies share them.
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
        known = vars(root).get("program_facts")
        self.program_facts = known if isinstance(known, ProgramFacts) else ProgramFacts()
        self.register_forward_pre_hook(_bind_call, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        with no_warnings():  # torch warns of its own pytree specifications
            return cast("ProgramModule", super().__deepcopy__(memo))

    def __copy__(self) -> ProgramModule:
        """Shares the tensors, but has its own graph: switching the mode of one does not switch the other."""
        with no_warnings():  # torch warns of its own pytree specifications
            return ProgramModule(self, copy.deepcopy(self.graph))

    def __reduce__(self) -> NoReturn:
        """Refuses pickling: torch pickles only the code of a graph, without facts of its nodes, and can't read it back.

        Raises:
            InvalidInput: says what saves a program.
        """
        raise InvalidInput(
            "a compiled module can't be pickled: save it with result.save(folder), and read it back with "
            "lobo_fx.load(folder); its state_dict() can be saved as any other"
        )

    def _deepcopy_init(self) -> Callable[..., None]:
        return ProgramModule.__init__

    def train(self, mode: bool = True) -> ProgramModule:
        """Switches to training (or inference) mode as `nn.Module.train` does, including the graph's nodes."""
        super().train(mode)
        changed = False
        for node in self.graph.nodes:
            flag = training_flag(node)
            if flag is None or facts_of(node).always_training:
                continue
            set_argument(node, flag, mode)
            changed = True
        if changed:
            self.recompile()
        return self

    def set_facts(self, **changes: Any) -> None:
        """Changes fields of `program_facts`, by name."""
        self.program_facts = dataclasses.replace(self.program_facts, **changes)

    @property
    def signature(self) -> Signature | None:
        """The signature that calls are checked against; None until tracing is done."""
        return self.program_facts.signature


def mark_always_training(module: nn.Module) -> None:
    """Marks nodes that were traced in training mode, so that `eval()` leaves them alone."""
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    for node in [node for graph in graphs for node in graph.nodes]:
        flag = training_flag(node)
        if flag is not None and arguments(node)[flag] is True:
            mark(node, always_training=True)


def _bind_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    assert isinstance(module, ProgramModule)
    if module.signature is None:
        return args, kwargs
    inputs = module.signature.bind(args, kwargs)
    return inputs.args, dict(inputs.kwargs)


@dataclasses.dataclass(frozen=True)
class Program:
    """A model under compilation: the module with its graph, and the example inputs it is checked on.

    Attributes:
        module: callable, trainable; parameters under the original names.
        example_inputs: the inputs that every pass is verified on.
        owns_tensors: whether all tensors were copied; a traced program has those of the user's model.
    """

    module: ProgramModule
    example_inputs: Inputs
    owns_tensors: bool = False

    @property
    def notes(self) -> list[Note]:
        """What tracing left as it was, one note each."""
        return list(self.module.program_facts.notes)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def signature(self) -> Signature:
        """Names, dtypes and shapes of inputs and outputs, from the last shape propagation."""
        facts = self.module.program_facts
        return signature_of(self.module, facts.free_dimensions, facts.names)

    def clone(self) -> Program:
        """An independent copy: no tensor is shared."""
        return Program(copy.deepcopy(self.module), self.example_inputs, owns_tensors=True)

    def lazy_clone(self) -> Program:
        """An independent copy whose tensors take memory of their own only once either program writes into them.

        The tensors of a user's model are copied at once: an array that was made of one (`tensor.numpy()`) would no
        longer follow what is written into it.

        Source: PyTorch's copy-on-write storages (`c10/core/impl/COW.h`).
        """
        if not self.owns_tensors:
            return self.clone()
        lazy = lazy_clones([*self.module.parameters(), *self.module.buffers()])
        return dataclasses.replace(self, module=copy.deepcopy(self.module, lazy))

    def with_graph_module(self, module: fx.GraphModule) -> Program:
        """This program with another graph, for instance the result of a library's transform."""
        if not isinstance(module, ProgramModule):
            module = ProgramModule(module, module.graph)
        lasting = self.module.state_dict(keep_vars=True).keys()
        outside = {name for name, _ in self.module.named_buffers(remove_duplicate=False)} - lasting
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if name in outside:  # a plain GraphModule does not keep which buffers are non-persistent
                register(module, name, buffer, persistent=False)
        module.program_facts = self.module.program_facts
        return dataclasses.replace(self, module=module)

    def parameter(self, node: fx.Node) -> torch.Tensor:
        """The parameter or buffer that a `get_attr` node reads."""
        return cast("torch.Tensor", fetch(self.module, str(node.target)))

    def run(self, inputs: Inputs | None = None) -> Any:
        """Calls the module in inference mode (eval, no gradients) on `inputs` (default: the examples).

        A model that draws random numbers draws the same ones in every run.
        """
        inputs = self.example_inputs if inputs is None else inputs
        with torch.no_grad(), self.inference(), kept_buffers(self.module), seeded(self.module):
            return self.module(*inputs.args, **inputs.kwargs)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Switches to eval mode within the context."""
        if not self.module.training:
            yield
            return
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()


def seal(module: ProgramModule) -> None:
    """Fixes the signature that calls of `module` are checked against."""
    facts = module.program_facts
    module.set_facts(signature=signature_of(module, facts.free_dimensions, facts.names))
