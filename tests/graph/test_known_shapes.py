"""Shapes that are known without running the operator are what it gives; shapes that did not change are kept."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import lobo_fx
from lobo_fx.graph import shapes
from lobo_fx.graph.known_shapes import known_result
from lobo_fx.graph.shapes import PropagationError, propagate
from lobo_fx.graph.tensors import fetch

aten = torch.ops.aten
LAYOUTS = {
    "dense": torch.rand(2, 3, 4, 5),
    "channels last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": torch.rand(5, 4, 3, 2).permute(3, 2, 1, 0),
    "strided": torch.rand(2, 6, 4, 5)[:, ::2],
    "expanded": torch.rand(2, 1, 4, 5).expand(2, 3, 4, 5),
    "whole numbers": torch.arange(120).reshape(2, 3, 4, 5),
    "half": torch.rand(2, 3, 4, 5).bfloat16(),
}
OTHER_ARGUMENTS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.hardtanh.default, (0, 6)),
    (aten.clamp.default, (0.5, None)),
    (aten.mul.Tensor, (2.5,)),
    (aten.mul.Tensor, (2,)),
    (aten.div.Tensor, (3,)),
    (aten.pow.Tensor_Scalar, (2,)),
]


def _same(given: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert given is not None
    assert (given.shape, given.dtype, given.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target", "others"), OTHER_ARGUMENTS, ids=str)
def test_other_arguments_decide_the_dtype(target: Any, others: tuple[Any, ...], layout: str) -> None:
    x = LAYOUTS[layout]
    _same(known_result(target, (x, *others), {}), target(x, *others))


def _of_one_tensor() -> list[tuple[Any, tuple[Any, ...]]]:
    """All operators of PyTorch that it calls element by element and that take one tensor, each with other arguments."""
    numbers: dict[str, Any] = {"number": 0.5, "float": 0.5, "int": 1, "bool": True}
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, call = name.partition("::")
        if namespace == "aten":
            packet, _, overload = call.partition(".")
            operator = getattr(getattr(aten, packet), overload or "default")
            first, *others = operator._schema.arguments or [None]
            given = [numbers.get(str(other.type)) for other in others if not other.has_default_value()]
            takes_one = first is not None and str(first.type) == "Tensor" and None not in given
            if torch.Tag.pointwise in operator.tags and takes_one:
                found.append((operator, tuple(given)))
    return found


OWN_LAYOUT = {aten.mvlgamma.default, aten.special_multigammaln.default, aten.conj_physical.default}
"""Dense, whatever its input; and the input itself, where that is real."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operator_of_one_tensor(layout: str) -> None:
    x, known = LAYOUTS[layout], 0
    for target, others in _of_one_tensor():
        try:
            expected = target(x.clone() if target._schema.is_mutable else x, *others)
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # not of this dtype
        given = known_result(target, (x, *others), {})
        if given is not None:
            assert (target, given.shape, given.dtype) == (target, expected.shape, expected.dtype)
            assert target in OWN_LAYOUT or (target, given.stride()) == (target, expected.stride())
            known += 1
    assert known > 40


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "whole numbers"])
def test_norms_and_linear_layers(layout: str) -> None:
    x = LAYOUTS[layout]

    def of(*shape: int) -> torch.Tensor:
        return torch.rand(shape).to(x.dtype)

    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.batch_norm.default, (x, of(3), None, of(3), of(3), False, 0.1, 1e-5, False)),
        (aten.layer_norm.default, (x, [5], of(5), of(5))),
        (aten.layer_norm.default, (x, [4, 5])),
        (aten.linear.default, (x, of(7, 5), of(7))),
        (aten.linear.default, (x, of(7, 5))),
        (aten.linear.default, (x[0, 0, 0], of(7, 5))),
        (aten.linear.default, (x, of(5))),
        (aten.addmm.default, (of(7), x[0, 0], of(5, 7))),
    ]
    for target, args in calls:
        _same(known_result(target, args, {}), target(*args))


def test_what_does_not_fit_together_is_refused() -> None:
    x, bad = torch.rand(2, 3, 4, 5), torch.rand(6)
    for target, args in [
        (aten.batch_norm.default, (x, bad, None, torch.rand(3), torch.rand(3), False, 0.1, 1e-5, False)),
        (aten.batch_norm.default, (x, None, None, torch.rand(3), bad, False, 0.1, 1e-5, False)),
        (aten.layer_norm.default, (x, [6])),
        (aten.layer_norm.default, (x, [5], bad)),
        (aten.linear.default, (x, torch.rand(7, 6))),
        (aten.addmm.default, (torch.rand(7), x[0, 0], torch.rand(6, 7))),
    ]:
        with pytest.raises(RuntimeError):
            target(*args)
        with pytest.raises(RuntimeError):
            known_result(target, args, {})


def test_what_is_not_known_is_asked_of_the_operator() -> None:
    x = torch.rand(2, 3)
    for target, args in [
        (aten.add.Tensor, (x, x)),  # two tensors may be broadcast
        (aten.relu_.default, (x,)),  # gives its input
        (aten.sum.default, (x,)),
        (aten.where.self, (x > 0, x, x)),
        (aten.addmm.default, (torch.rand(2, 1), x, torch.rand(3, 4))),  # the bias is broadcast
        (aten.addmm.default, (torch.rand(4, 5), x, torch.rand(3, 4, 5))),  # refuses it
        (aten.addmm.default, (torch.rand(()), x, torch.rand(3))),
    ]:
        assert known_result(target, args, {}) is None


def test_tracing_and_following_give_the_shapes_that_pytorch_gives() -> None:
    """Every operator of a network of many kinds, its values beside those that PyTorch's own fake tensors have."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())
            self.second = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(approximate="tanh"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).flatten(2).transpose(1, 2)  # [rows, pixels, 8], strided
            x = self.second(x) * 2
            return torch.where(x > 0.1, x.clamp(max=1), x.exp())

    torch.manual_seed(0)
    program = lobo_fx.trace(Net().eval(), torch.rand(2, 3, 4, 5))
    own = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "call_function"}
    exported = torch.export.export(program.module, (torch.rand(2, 3, 4, 5),), dynamic_shapes=({0: Dim.AUTO},))
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    followed = [value for value in own.values() if isinstance(value, torch.Tensor)]
    expected = [node.meta["val"] for node in calls if isinstance(node.meta["val"], torch.Tensor)]
    assert len(followed) == len(expected) > 10
    for value, other in zip(followed, expected, strict=True):
        sizes = [[size if isinstance(size, int) else "free" for size in tensor.shape] for tensor in (value, other)]
        assert sizes[0] == sizes[1]
        assert value.dtype == other.dtype


def test_only_what_changed_is_computed_again() -> None:
    program = lobo_fx.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh()), torch.rand(2, 4))
    first = {node.name: node.meta["val"] for node in program.graph.nodes}
    program.module.get_submodule("2").weight = nn.Parameter(torch.rand(5, 8))
    program.module.get_submodule("2").bias = nn.Parameter(torch.rand(5))
    propagate(program.module)
    kept = {node.name for node in program.graph.nodes if node.meta["val"] is first[node.name]}
    assert {"linear", "relu"} <= kept
    assert not {"linear_1", "tanh"} & kept
    assert program.graph.output_node().meta["val"][0].shape[1] == 5
    assert not isinstance(program.graph.output_node().meta["val"][0].shape[0], int)


def test_a_size_that_a_copy_fixed_is_free_in_the_original() -> None:
    program = lobo_fx.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.rand(3, 4))
    copy = program.clone()
    relu = next(node for node in copy.graph.nodes if node.name == "relu")
    with copy.graph.inserting_after(relu):
        fixed = copy.graph.call_function(aten.view.default, (relu, [3, 8]))
    relu.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)
    copy.module.recompile()
    with pytest.raises(PropagationError, match="a free dimension became 3"):
        propagate(copy.module)
    for each in program, program.clone():
        propagate(each.module)
        assert not any(isinstance(node.meta["val"].shape[0], int) for node in each.graph.find_nodes(op="placeholder"))


def test_what_is_refused_prints_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The handlers of PyTorch's log hold the stream that stood when it was imported. Twin: not silenced, it is told."""
    request.addfinalizer(functools.partial(logging.disable, logging.root.manager.disable))
    logging.disable(logging.NOTSET)
    printed = io.StringIO()
    for logger in map(logging.getLogger, logging.root.manager.loggerDict):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                monkeypatch.setattr(handler, "stream", printed)
    program = lobo_fx.trace(nn.ReLU(), torch.rand(3, 4))
    relu = next(node for node in program.graph.nodes if node.op == "call_function")
    with program.graph.inserting_after(relu):
        fixed = program.graph.call_function(aten.view.default, (relu, [3, 4]))
    relu.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)
    with pytest.raises(PropagationError, match=r"^a free dimension became 3\n"):
        propagate(program.module)
    assert (printed.getvalue(), *capfd.readouterr()) == ("", "", "")
    monkeypatch.setattr(shapes, "quiet", contextlib.nullcontext)
    with pytest.raises(PropagationError, match=r"^a free dimension became 3\n"):
        propagate(program.module)
    assert "failed during evaluate_expr" in printed.getvalue()


@pytest.mark.parametrize("shape", [(1,), (), (1, 7)])
def test_a_bias_is_broadcast(shape: tuple[int, ...]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(7, 5)), nn.Parameter(torch.rand(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return aten.linear.default(x, self.weight, self.bias)  # type: ignore[no-any-return]

    model, x = Net().eval(), torch.rand(2, 5)
    torch.testing.assert_close(lobo_fx.trace(model, x).module(x), model(x))


def test_the_default_dtype_counts() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sigmoid() * 2

    x = torch.ones(2, 3, dtype=torch.int64)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            program = lobo_fx.trace(Net(), x)
            assert program.signature.outputs[0].dtype == program.module(x).dtype == dtype  # type: ignore[union-attr]
    finally:
        torch.set_default_dtype(before)


def changed_argument(program: lobo_fx.Program) -> None:
    next(node for node in program.graph.nodes if node.target == aten.flatten.using_ints).args = (
        next(node for node in program.graph.nodes if node.target == aten.relu.default),
        2,
    )


def changed_dtype(program: lobo_fx.Program) -> None:
    for name, parameter in list(program.module.named_parameters()):
        fetch(program.module, name).data = parameter.data.double()
    program.graph.find_nodes(op="placeholder")[0].meta["val"] = (
        program.graph.find_nodes(op="placeholder")[0].meta["val"].double()
    )


def changed_value(program: lobo_fx.Program) -> None:
    node = next(node for node in program.graph.nodes if node.target == aten.relu.default)
    node.meta["val"] = node.meta["val"].double()


def changed_input(program: lobo_fx.Program) -> None:
    node = program.graph.find_nodes(op="placeholder")[0]
    node.meta["val"] = node.meta["val"].new_empty((node.meta["val"].shape[0], 3, 6, 6))


@pytest.mark.parametrize("change", [changed_argument, changed_dtype, changed_value, changed_input])
def test_no_shape_is_stale(change: Callable[[lobo_fx.Program], None]) -> None:
    """Beside a copy in which everything is computed anew."""
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Softmax(-1)
    program = lobo_fx.trace(nn.Sequential(*layers), torch.rand(2, 3, 8, 8))
    change(program)
    anew = program.clone()
    propagate(anew.module, lambda node, value: None)
    propagate(program.module)
    for node, other in zip(program.graph.nodes, anew.graph.nodes, strict=True):
        value, expected = node.meta["val"], other.meta["val"]
        if isinstance(value, torch.Tensor):
            assert value.dtype == expected.dtype
            assert [str(size) for size in value.shape][1:] == [str(size) for size in expected.shape][1:]
