"""A program in the form of `torch.export` computes what the model does, and keeps what `torch.export` would."""

from __future__ import annotations

import io
from typing import Any, cast

import pytest
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from lobo_fx.capture.lifting import exported_program
from lobo_fx.capture.tracing import trace
from lobo_fx.errors import ExportError
from lobo_fx.terminal.quiet import quiet

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Everything(nn.Module):
    """Shared, unread and clashing weights, buffers of every kind, a constant, and a branch."""

    steps: torch.Tensor
    last: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.first_weight = nn.Parameter(torch.randn(4))
        self.unread = nn.Parameter(torch.randn(2, 2))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("scale", torch.full((4,), 0.5), persistent=False)
        self.shift = torch.ones(4)

    def forward(self, x: torch.Tensor, *, input: torch.Tensor, factor: int = 2) -> dict[str, Any]:
        self.steps.add_(1)
        hidden = self.tied(self.first(x)) * self.scale + self.shift * self.first_weight
        self.last.copy_(hidden.mean(0))
        chosen = torch.cond(hidden.sum() > 0, lambda h: h * 2, lambda h: h - 1, (hidden,))
        return {"chosen": chosen, "rest": (input * factor, None, self.steps + 0)}


def everything() -> tuple[Everything, dict[str, Any]]:
    return Everything().eval(), {"x": X, "input": X + 1, "factor": 3}


def test_it_computes_what_the_program_does_and_writes_the_same_buffers() -> None:
    module, inputs = everything()
    program = trace(module, inputs)
    exported = exported_program(program)
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    again = exported.module(check_guards=False)
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        with quiet(), torch.no_grad():
            found, expected = again(x=x, input=x, factor=3), module(x, input=x, factor=3)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(again.last, module.last, rtol=0, atol=0)
        assert again.steps == module.steps
    for name, tensor in program.module.state_dict().items():
        assert torch.equal(tensor, before[name]) or name in ("last", "steps")


def test_signature_and_stored_tensors_are_those_of_torch_export() -> None:
    module, inputs = everything()
    ours = exported_program(trace(module, inputs))
    with quiet():
        theirs = torch.export.export(module, (X,), {"input": X + 1, "factor": 3})
    assert set(ours.state_dict) == set(theirs.state_dict)
    assert set(ours.graph_signature.buffers_to_mutate.values()) == {"steps", "last"}
    assert set(ours.graph_signature.parameters) == set(theirs.graph_signature.parameters)
    assert ours.graph_signature.non_persistent_buffers == ("scale", "shift")
    assert ours.call_spec.out_spec == theirs.call_spec.out_spec
    assert ours.state_dict["first.weight"] is module.first.weight is ours.state_dict["tied.weight"]


def test_the_program_keeps_its_graph_and_its_mode() -> None:
    module, inputs = everything()
    program = trace(module, inputs)
    before = str(program.graph)
    program.module.train()
    exported_program(program)
    assert program.module.training
    assert str(program.module.eval().graph) == before


def saved_and_loaded(exported: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    return torch.export.load(file)


def test_it_can_be_saved_and_traced_again() -> None:
    module, inputs = everything()
    program = trace(module, inputs)
    again = trace(saved_and_loaded(exported_program(program)))
    assert again.signature == program.signature
    torch.testing.assert_close(again.run(), program.run(), rtol=0, atol=0)


def test_bounds_and_expressions_of_sizes_are_kept() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[::2] + x[1::2]

    half = Dim("half", min=2, max=9)
    program = trace(Halves().eval(), torch.randn(6, 4), dynamic_shapes={"x": {0: 2 * half}})
    exported = exported_program(program)
    ((symbol, bounds),) = exported.range_constraints.items()
    assert (bounds.lower, bounds.upper) == (2, 9)
    (value,) = (node.meta["val"] for node in exported.graph.find_nodes(op="placeholder"))
    assert value.shape[0].node.expr == 2 * symbol
    assert trace(saved_and_loaded(exported)).signature == program.signature


def test_a_value_written_to_two_buffers_and_an_input_written_to_one_have_names_of_their_own() -> None:
    class Twice(nn.Module):
        one: torch.Tensor
        two: torch.Tensor
        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            for name in ("one", "two", "seen"):
                self.register_buffer(name, torch.zeros(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled = x * 2
            self.one.copy_(doubled)
            self.two.copy_(doubled)
            self.seen.copy_(x)
            return doubled

    module = exported_program(trace(Twice().eval(), X, dynamic_shapes=None)).module(check_guards=False)
    assert torch.equal(module(X + 1), 2 * (X + 1))
    buffers = dict(module.named_buffers())
    assert torch.equal(buffers["one"], 2 * (X + 1))
    assert torch.equal(buffers["two"], 2 * (X + 1))
    assert torch.equal(buffers["seen"], X + 1)


def test_a_buffer_that_is_written_by_one_name_and_read_by_another_is_one_when_loaded() -> None:
    class Shared(nn.Module):
        own: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("own", torch.zeros(4))
            self.plain = self.own  # no buffer: it becomes one that no state dict holds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = x + self.plain
            self.own.add_(1)
            return before

    program = trace(Shared().eval(), X)
    assert len({str(node.target) for node in program.graph.find_nodes(op="get_attr")}) == 2
    again = trace(saved_and_loaded(exported_program(program))).module
    for times in range(3):
        assert torch.equal(again(X), X + times)
    assert torch.equal(again.state_dict()["own"], torch.full((4,), 3.0))


def test_outputs_that_are_computed_numbers_are_kept() -> None:
    class Numbers(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
            return x + 1, x.shape[0], x.shape[0] / 2, x.sum().item()

    program = trace(Numbers().eval(), X)
    exported = exported_program(program)
    assert trace(saved_and_loaded(exported)).signature == program.signature
    found = exported.module(check_guards=False)(torch.ones(5, 4))
    assert found[1:] == (5, 2.5, 20.0)


def test_a_graph_that_calls_modules_is_refused() -> None:
    program = trace(nn.Linear(4, 2), X).clone()
    program.module.add_submodule("observer", nn.Identity())
    output = program.graph.output_node()
    (value,) = cast("tuple[fx.Node]", output.args[0])
    with program.graph.inserting_before(output):
        output.args = ((program.graph.call_module("observer", (value,)),),)
    program.module.recompile()
    with pytest.raises(ExportError, match="no form that torch"):
        exported_program(program)
