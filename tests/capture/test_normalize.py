"""Writes in place become new values: eager PyTorch, which has the aliasing for real, is the oracle."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import lobo_fx
from lobo_fx.capture.tracing import trace
from lobo_fx.graph.program import Program

Body = Callable[["Model", torch.Tensor], Any]


class Model(nn.Module):
    """Runs a function on its input; the buffer and the layer are there for functions that want them."""

    state: torch.Tensor

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("state", torch.arange(4.0))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def example(rows: int = 3) -> torch.Tensor:
    """Integers of both signs, so that every sum and product below is exact."""
    return torch.arange(4.0 * rows).view(rows, 4) - 5


def writes(program: Program) -> list[str]:
    """Operators of the graph that write into an argument, but for the saving of buffers at its end."""
    nodes = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    written = [node for node in nodes if node.target._schema.is_mutable]
    last = [node for node in written if node.target == torch.ops.aten.copy_.default and node.args[0].op == "get_attr"]
    after_all = set(nodes[len(nodes) - len(last) :])
    return [str(node.target) for node in written if node not in after_all]


def same(expected: Any, found: Any) -> None:
    """Asserts equal nesting, dtypes, shapes and bits."""
    old, old_structure = pytree.tree_flatten(expected)
    new, new_structure = pytree.tree_flatten(found)
    assert old_structure == new_structure
    for a, b in zip(old, new, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b), f"{a} became {b}"


def check(body: Body, *, removed: bool | None = True, x: torch.Tensor | None = None, calls: int = 2) -> Program:
    """Traces `body` and compares call after call with eager, the buffer between calls included.

    Args:
        body: what the model computes.
        removed: whether every write must be gone; False: some must be left, and said so; None: either.
        x: the input.
        calls: how often both are called.
    """
    x = example() if x is None else x
    eager = Model(body).eval()
    program = trace(copy.deepcopy(eager), x.clone())
    for _ in range(calls):
        expected = copy.deepcopy(eager(x.clone()))  # a later call may write into what it returned
        same(expected, copy.deepcopy(program.module(x.clone())))
        assert torch.equal(eager.state, program.module.get_buffer("state")), "the buffer was not kept"
    left = [note for note in program.notes if "in place" in note]
    if removed is not None:
        assert (not writes(program)) == removed
    assert bool(writes(program)) == bool(left)
    return program


# --- values that own their memory ------------------------------------------------------------------------


def test_relu_in_place() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y.relu_()
        return y

    check(body)


def test_inplace_module() -> None:
    check(lambda model, x: nn.ReLU(inplace=True)(x * 2) + 1)


def test_the_result_of_a_write_is_the_written_value() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        a = y.add_(1)
        b = a.mul_(2)
        return y, a, b

    check(body)


def test_a_value_read_before_the_write_keeps_its_old_content() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        before = y + 0
        y.add_(1)
        return before, y

    program = check(body)
    before, after = program.module(example())
    assert torch.equal(after - before, torch.ones(3, 4))


def test_a_written_input_reads_as_written_and_the_callers_tensor_stays() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x.mul_(2)
        column = x[:, 1]
        x.add_(1)
        return x, column

    program = check(body)
    given_by_caller = example()
    program.module(given_by_caller)
    assert torch.equal(given_by_caller, example())


def test_operators_with_assignment() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y += 1
        y -= x
        y *= 3
        y /= 2
        y[0] += y[1]
        y[:, ::2] = y[:, 1::2]
        return y

    check(body)


def test_bitwise_assignment() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x > 0
        y |= x < -2
        y &= x < 4
        y ^= x == 1
        return y

    check(body)


def test_fill_zero_copy_and_masked_fill() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c, d = x * 1, x * 1, x * 1, x * 1
        a.fill_(7)
        b.zero_()
        c.copy_(x[:1])
        d.masked_fill_(x > 0, -1.5)
        return a, b, c, d

    check(body)


def test_copy_keeps_the_targets_dtype() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x, dtype=torch.int32)
        y.copy_(x * 1.5)
        return y

    assert check(body).module(example()).dtype == torch.int32


def test_index_put() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, z = x * 1, x * 1
        y[torch.tensor([0, 1]), torch.tensor([1, 2])] = 7
        z[z > 0] = 0
        y.index_put_((torch.tensor([2]),), torch.ones(4), accumulate=True)
        return y, z

    check(body)


def test_indexed_writes() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y.index_fill_(1, torch.tensor([0, 2]), -1.0)
        y.scatter_(1, torch.zeros(3, 1, dtype=torch.long), 5.0)
        y.index_add_(1, torch.tensor([1]), x[:, :1])
        y.index_copy_(1, torch.tensor([3]), x[:, :1])
        return y

    check(body)


def test_an_integer_stays_an_integer() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, z = (x * 3).to(torch.int32), (x * 3).to(torch.uint8)
        y.add_(torch.ones(4, dtype=torch.int64))
        y.mul_(2)
        z += 1
        return y, z

    y, z = check(body).module(example())
    assert (y.dtype, z.dtype) == (torch.int32, torch.uint8)


def test_a_half_float_stays_one() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x.half()
        y.add_(x)
        y.mul_(1.1)
        return y

    assert check(body).module(example()).dtype == torch.float16


WITHOUT_CAST: dict[str, Body] = {
    "add_": lambda model, x: (x * 1).add_(x),
    "masked_fill_": lambda model, x: (x * 1).masked_fill_(x > 0, 3),
    "index_put_": lambda model, x: (x * 1).index_put_((torch.tensor([0]),), torch.tensor(3.0)),
}


@pytest.mark.parametrize("name", WITHOUT_CAST)
def test_no_cast_where_the_value_keeps_the_dtype_anyway(name: str) -> None:
    program = check(WITHOUT_CAST[name])
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)


# --- writes through views --------------------------------------------------------------------------------


def test_a_write_to_a_slice_reaches_its_base() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[:, 1:3].mul_(2)
        return y

    check(body)


def test_a_write_to_the_base_reaches_its_views() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        row, columns = y[0], y[:, 1:]
        part = columns[:, :2]
        y.add_(1)
        return row, columns + 0, part * 2

    check(body)


def test_a_write_to_a_view_reaches_an_overlapping_one_and_not_its_neighbour() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        left, middle, right = y[:, :2], y[:, 1:3], y[:, 2:]
        left.fill_(100)
        return left + 0, middle + 0, right + 0

    _, middle, right = check(body).module(example())
    assert middle[:, 0].tolist() == [100.0] * 3
    assert 100.0 not in right


def test_a_transposed_view() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        turned = y.transpose(0, 1)
        turned[0] = 3
        turned.t().add_(1)
        y.permute(1, 0)[1:3] = -1
        return y, turned

    check(body)


def test_a_permutation_that_is_not_its_own_inverse() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = (x * 1).view(-1, 2, 2) + torch.tensor([0.0, 1.0])
        y.permute(1, 2, 0).add_(torch.arange(x.shape[0]))
        y.permute(-1, 0, 1)[0] = 9
        return y

    check(body)


def test_reshaped_views() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y.view(-1)[2:5] = 0
        torch.unflatten(y, 1, (2, 2))[:, 0] = 9
        y.flatten().mul_(2)
        y.unsqueeze(1).add_(1)
        y.unsqueeze(0).squeeze(0).sub_(3)
        y.view(-1, 2, 2).select(-1, -1).neg_()
        return y

    check(body)


def test_reshape_that_copies_does_not_alias() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        copied = y.t().reshape(-1)
        copied.mul_(2)
        y.t().contiguous().mul_(5)
        y.to(torch.float64).mul_(7)
        return y, copied

    y, _ = check(body).module(example())
    assert torch.equal(y, example())


def test_reshape_that_does_not_copy_aliases() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y.reshape(-1).mul_(2)
        y.contiguous().add_(1)
        return y

    y = check(body).module(example())
    assert torch.equal(y, example() * 2 + 1)


def test_dropout_in_inference_is_an_alias() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        F.dropout(y, 0.5, training=False).add_(1)
        F.dropout(y, 0.5, training=False, inplace=True)
        return y

    assert torch.equal(check(body).module(example()), example() + 1)


def test_a_view_of_a_view_written_between_writes_to_the_base() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        outer = y[:, :2]
        inner = outer[:1]
        F.relu(inner, inplace=True)
        y.mul_(2)
        inner.add_(1)
        return outer + 0, y

    check(body)


def test_slices_by_step_and_from_the_end() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[-1].add_(1)
        y[:, -2:].mul_(3)
        y[::2, 1::2] = 8
        y[1:100, 3] = -8
        return y

    check(body)


def test_columns_written_in_a_loop() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for column in range(4):
            y[:, column] = x[:, column] * column
        return y

    check(body)


def test_copy_between_parts_of_one_tensor() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[:, 0].copy_(y[:, 1])
        y[:, 1:].add_(y[:, :-1].clone())
        return y

    check(body)


def test_detached_view() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y.detach()[:, 0].mul_(3)
        return y

    check(body)


@pytest.mark.parametrize("cut", ["chunk", "split", "unbind", "tensor_split"])
def test_views_that_come_several_at_once(cut: str) -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        parts = y.unbind(1) if cut == "unbind" else getattr(y, cut)(2, 1)
        parts[0].add_(parts[1])
        y.mul_(2)
        y[:, 0].sub_(1)
        return y, parts[0] + 0, parts[1] + 0

    check(body, removed=None)


def test_cut_views_that_are_only_read_before_the_write() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        a, b = y.chunk(2, 1)
        total = a + b
        y.add_(1)
        return y + total.repeat(1, 2)

    check(body)


def test_unsqueeze_in_place_under_a_view() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        part = y[:, 1:3]
        y.unsqueeze_(0)
        part.mul_(2)
        return y + 0, part + 0

    check(body, removed=None)


def test_squeeze_in_place_under_a_view() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.unsqueeze(0) * 1
        inner = y[0]
        y.squeeze_(0)
        inner.mul_(2)
        return y + 0, inner + 0

    check(body, removed=None)


def test_transpose_in_place_under_a_view() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        part = y[:, 1:3]
        y.transpose_(0, 1)
        part.mul_(2)
        y[0] = 5
        return y + 0, part + 0

    check(body, removed=None)


# --- writes that stay ------------------------------------------------------------------------------------


def test_a_write_through_expand_is_left_alone_and_noted() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x[:1] * 1
        wide = y.expand(3, 4)
        wide[0].add_(1)
        return y + x

    program = check(body, removed=False)
    assert writes(program) == ["aten.add_.Tensor"]
    (note,) = program.notes
    assert note.startswith("aten.add_.Tensor")
    assert "test_normalize.py" in note


def test_an_expanded_view_that_is_only_read_does_not_stop_the_write() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x[:1] * 1
        wide = y.expand(2, 4)
        y.add_(1)
        return wide + 1

    check(body)


def test_a_diagonal_is_left_alone_and_what_follows_still_right() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        y.add_(1)
        y.diagonal().fill_(50)
        row = y[0]
        y.mul_(2)
        return y, row + 0

    program = check(body, removed=False)
    assert sum("aten.fill_" in note for note in program.notes) == 1


def test_out_argument_is_left_alone() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        torch.add(y, 1, out=y)
        return y

    check(body, removed=False)


# --- buffers ---------------------------------------------------------------------------------------------


def test_a_buffer_counts_across_calls() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        model.state.add_(1)
        return x + model.state

    program = check(body, calls=3)
    assert torch.equal(program.module.get_buffer("state"), torch.arange(4.0) + 3)


def test_a_buffer_that_is_only_read_is_not_saved() -> None:
    program = check(lambda model, x: (x * 1).add_(model.state))
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)


def test_a_buffer_written_twice_in_one_call() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        model.state.add_(1)
        model.state.mul_(2)
        return x + model.state

    check(body, calls=3)


def test_a_buffer_written_in_parts() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        middle = model.state[1:3]
        model.state[1:3] = x[0, 1:3]
        model.state[0] += 1
        middle.mul_(2)
        return model.state * x, middle + 1

    check(body, calls=3)


@pytest.mark.parametrize("cut", ["chunk", "unbind"])
def test_a_buffer_written_through_one_of_several_views(cut: str) -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        part = model.state.unbind()[0] if cut == "unbind" else model.state.chunk(2)[1]
        part.add_(1)
        return x + part.sum()

    check(body, removed=None, calls=3)


def test_a_write_to_a_constant_does_not_outlive_the_call() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        square = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        square.diagonal().add_(1)
        row = torch.tensor([1.0, 2.0])
        row.add_(x[0, 0])
        return x[:2, :2] @ square + row

    check(body, removed=None, calls=3)


def test_a_buffer_read_before_and_after_its_write() -> None:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        old = model.state * 1
        model.state.copy_(x[0])
        return old, model.state.view(2, 2)

    check(body, calls=3)


def test_a_running_average() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model.state.mul_(0.5).add_(x.sum(0), alpha=0.5)
        return x - model.state

    check(body, calls=3)


# --- gradients -------------------------------------------------------------------------------------------


def gradients(body: Body) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None], Program]:
    """Gradients of the layer's parameters: eager, and of the traced program."""
    eager = Model(body)
    program = trace(copy.deepcopy(eager).eval(), example())
    found: list[list[torch.Tensor | None]] = []
    for module in (eager, program.module):
        module.zero_grad()
        total = module(example()).sum()
        if total.requires_grad:
            torch.autograd.backward(total)
        found.append([parameter.grad for _, parameter in sorted(module.named_parameters())])
    return found[0], found[1], program


def assert_same_gradients(body: Body) -> None:
    expected, found, _ = gradients(body)
    assert any(gradient is not None for gradient in expected)
    for old, new in zip(expected, found, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


def test_gradients_pass_through_removed_writes() -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        y = model.layer(x)
        y[:, 0] = 0
        y[:, 1:3].mul_(2)
        y.relu_()
        return y

    assert_same_gradients(body)


def _decoded(model: Model, y: torch.Tensor) -> None:
    y[..., 2:4] = y[..., 2:4] * 4  # as boxes are decoded


def _one_for_several(model: Model, y: torch.Tensor) -> None:
    y[:, :3] = y[:, 3:].exp()


def _number(model: Model, y: torch.Tensor) -> None:
    y[:, 1].copy_(y.sum())


def _other_dtype(model: Model, y: torch.Tensor) -> None:
    y[:, 0] = (y[:, 1].double() * 3).tanh()


@pytest.mark.parametrize("write", [_decoded, _one_for_several, _number, _other_dtype])
def test_gradients_pass_through_what_is_copied_into_a_part(write: Callable[[Model, torch.Tensor], None]) -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        y = model.layer(x).sigmoid().clone()
        write(model, y)
        return y

    assert_same_gradients(body)
    with torch.no_grad():
        check(body)


def test_what_leaves_a_region_without_gradients_is_detached() -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        with torch.no_grad():
            target = model.layer(x)
            scale = target + 1
        return (target + scale) * model.layer(x)

    assert_same_gradients(body)


def test_an_activation_is_detached_in_a_region_without_gradients() -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        y = model.layer(x)
        with torch.no_grad():
            scaled = y * 2
        return scaled * y

    assert_same_gradients(body)


def test_what_does_not_depend_on_parameters_is_not_detached() -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        with torch.no_grad():
            scale = x.abs() + model.state
        return model.layer(x * scale)

    assert_same_gradients(body)
    assert not gradients(body)[2].graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default)


def test_a_region_without_gradients_changes_no_number() -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        with torch.no_grad():
            scale = model.layer(x).abs().sum()
            scale += 1
        return x / scale

    program = check(body)
    assert not [node for node in program.graph.nodes if node.op in ("get_attr", "call_module") and "sub" in node.name]


def test_the_same_without_a_region_is_not_detached() -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        y = model.layer(x)
        return (y + y + 1) * model.layer(x)

    assert_same_gradients(body)
    assert not gradients(body)[2].graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default)


def test_detach_stays() -> None:
    assert_same_gradients(lambda model, x: model.layer(x).detach() * model.layer(x))


def test_gradients_enabled_inside_a_region_without() -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = model.layer(x) * 2
            with torch.enable_grad():
                z = model.layer(y)
        return y + z

    assert_same_gradients(body)


def test_a_write_without_gradients_that_loses_the_gradient_is_noted() -> None:
    def body(model: Model, x: torch.Tensor) -> Any:
        y = model.layer(x)
        with torch.no_grad():
            y.mul_(2)
        return y

    expected, found, program = gradients(body)
    assert all(gradient is not None for gradient in expected)
    assert not any(gradient is not None and gradient.any() for gradient in found)
    (note,) = program.notes
    assert "aten.mul_.Tensor" in note
    assert "writes where gradients are off: in training its gradient is lost" in note


# --- autocast --------------------------------------------------------------------------------------------


def wrappers(program: Program) -> list[str]:
    """Operators that run a region of the graph under some mode."""
    return [str(node.target) for node in program.graph.nodes if "wrap_with" in str(node.target)]


def test_autocast_that_is_off_is_inlined() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            y = x.float() * 2
            y += 1
        return y

    assert wrappers(check(body)) == []


def test_autocast_that_is_on_keeps_its_dtypes() -> None:
    def body(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.t()

    program = check(body)
    assert program.module(example()).dtype == torch.bfloat16


# --- random programs -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a random program: `kind` of step, what it is applied to, and its arguments."""

    kind: str
    name: str
    source: int
    other: int = 0
    at: tuple[int, ...] = ()


VIEWS: dict[str, Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]] = {
    "slice": lambda t, at: t.narrow(at[0] % t.dim(), at[1] % 2, 1) if at[3] else t[:, at[1] % 2 :: at[2] % 2 + 1],
    "rows": lambda t, at: t[at[1] % 2 : at[2] + 1],
    "select": lambda t, at: t.select(at[0] % t.dim(), -(at[1] % 2)),
    "transpose": lambda t, at: t.transpose(at[0] % t.dim(), at[1] % t.dim()),
    "permute": lambda t, at: t.permute([(d + at[0]) % t.dim() for d in range(t.dim())]),
    "flatten": lambda t, at: t.reshape(-1) if at[0] else t.view(-1),
    "fold": lambda t, at: t.view(*t.shape[:-1], 2, t.shape[-1] // 2),
    "unsqueeze": lambda t, at: t.unsqueeze(at[0] % (t.dim() + 1)),
    "squeeze": lambda t, at: t.squeeze() if at[0] else t.squeeze(at[1] % t.dim()),
    "chunk": lambda t, at: t.chunk(2, at[0] % t.dim())[at[1] % 2],
    "unbind": lambda t, at: t.unbind(at[0] % t.dim())[at[1] % 2],
    "split": lambda t, at: torch.split(t, [1, t.shape[-1] - 1], -1)[at[0]],
    "expand": lambda t, at: t.unsqueeze(0).expand(2, *t.shape),
    "diagonal": lambda t, at: t.diagonal(0, 0, 1),
    "contiguous": lambda t, at: t.contiguous(),
    "detach": lambda t, at: t.detach(),
    "same": lambda t, at: t.to(torch.float32) if at[0] else t,
}
READS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "copy": lambda t, other: t.clone(),
    "next": lambda t, other: t + 1,
    "sum": lambda t, other: t.sum(-1, keepdim=True) + t,
    "add": lambda t, other: t + other,
    "cat": lambda t, other: torch.cat([t, t * 2]),
}
WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "relu_": lambda t, other: t.relu_(),
    "add_1": lambda t, other: t.add_(1),
    "add_": lambda t, other: t.add_(other, alpha=2),
    "neg_": lambda t, other: t.neg_(),
    "mul_": lambda t, other: t.mul_(-2),
    "fill_": lambda t, other: t.fill_(7),
    "zero_": lambda t, other: t.zero_(),
    "copy_": lambda t, other: t.copy_(other),
    "clamp_": lambda t, other: t.clamp_(-3, 5),
    "masked_fill_": lambda t, other: t.masked_fill_(t > 2, -4),
    "index_put_": lambda t, other: t.index_put_((torch.tensor([0, -1]),), torch.tensor(3.0)),
    "set_first": lambda t, other: t.__setitem__(0, 11),
}


NAMES = {"view": sorted(VIEWS), "read": sorted(READS), "write": sorted(WRITES)}


def run_step(step: Step, values: list[torch.Tensor]) -> None:
    """Runs one line on the values so far; views and reads add a value."""
    source, other = values[step.source], values[step.other]
    if step.kind == "view":
        values.append(VIEWS[step.name](source, step.at))
    elif step.kind == "read":
        values.append(READS[step.name](source, other))
    else:
        WRITES[step.name](source, other)


def start(model: Model, x: torch.Tensor, with_buffer: bool) -> list[torch.Tensor]:
    return [x * 1, x + 1, model.state] if with_buffer else [x * 1, x + 1]


@st.composite
def programs(draw: st.DrawFn, with_buffer: bool) -> tuple[list[Step], list[int]]:
    """A program that eager accepts, and which of its values it returns; about half of the lines write."""
    values = start(Model(lambda model, x: x), example(), with_buffer)
    steps: list[Step] = []
    small = st.integers(0, 1)
    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(["view", "view", "write", "write", "read"]))
        names = NAMES[kind]
        last = len(values) - 1
        step = Step(
            kind,
            draw(st.sampled_from(names)),
            draw(st.integers(0, last)),
            draw(st.integers(0, last)),
            (draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(small)),
        )
        if kind == "write" and 0 in values[step.source].stride():
            continue  # memory that overlaps itself: eager refuses or warns
        try:
            run_step(step, values)
        except (RuntimeError, IndexError, ZeroDivisionError):
            continue  # a shape that does not fit
        steps.append(step)
    returned = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=5, unique=True))
    return steps, returned


def body_of(steps: list[Step], returned: list[int], with_buffer: bool) -> Body:
    def body(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = start(model, x, with_buffer)
        for step in steps:
            run_step(step, values)
        return tuple(values[index] * 1 for index in returned)

    return body


RANDOM = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


MORE = settings(RANDOM, max_examples=25)


def check_random(steps: list[Step], returned: list[int], with_buffer: bool) -> None:
    body = body_of(steps, returned, with_buffer)
    eager = Model(body).eval()
    program = trace(copy.deepcopy(eager), example(), dynamic_shapes=None)
    for call in range(2):
        x = example() + call
        same(eager(x.clone()), program.module(x.clone()))
        assert torch.equal(eager.state, program.module.get_buffer("state"))
    assert bool(writes(program)) == any("in place" in note for note in program.notes)


@RANDOM
@given(programs(with_buffer=False))
def test_random_programs(program: tuple[list[Step], list[int]]) -> None:
    check_random(*program, with_buffer=False)


@RANDOM
@given(programs(with_buffer=True))
def test_random_programs_with_a_buffer(program: tuple[list[Step], list[int]]) -> None:
    check_random(*program, with_buffer=True)


@pytest.mark.slow
@MORE
@given(programs(with_buffer=False))
def test_more_random_programs(program: tuple[list[Step], list[int]]) -> None:
    check_random(*program, with_buffer=False)


@pytest.mark.slow
@MORE
@given(programs(with_buffer=True))
def test_more_random_programs_with_a_buffer(program: tuple[list[Step], list[int]]) -> None:
    check_random(*program, with_buffer=True)


def test_a_branch_in_a_branch_keeps_its_graphs(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            def inner(hidden: torch.Tensor) -> Any:
                return torch.cond(hidden.mean() > 0, lambda h: h * 3, lambda h: h - 2, (hidden,))

            return torch.cond(x.sum() > 0, inner, lambda hidden: hidden + 1, (self.layer(x),))

    torch.manual_seed(0)
    model = Nested().eval()
    x = torch.randn(3, 4)
    result = lobo_fx.compile(model, [], example_inputs=x, progress=False)
    assert result.export(tmp_path / "model.onnx").parity < 1e-5
    for inputs in (x.abs(), -x.abs(), x.abs() - 0.5):
        hidden = model.layer(inputs)
        positive = hidden * 3 if hidden.mean() > 0 else hidden - 2
        torch.testing.assert_close(result.module(inputs), positive if inputs.sum() > 0 else hidden + 1)
