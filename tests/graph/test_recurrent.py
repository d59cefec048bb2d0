"""Recurrent layers are never unrolled to follow shapes or to be exported, and give what PyTorch gives."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch._decomp import decomposition_table, decompositions
from torch._subclasses.fake_tensor import FakeTensorMode

import lobo_fx
from lobo_fx import ExportError, TraceError
from lobo_fx.graph import known_shapes
from lobo_fx.graph.known_shapes import shapes_known
from lobo_fx.graph.operators import RECURRENT


def _relu(*sizes: int, **settings: Any) -> nn.RNN:
    return nn.RNN(*sizes, nonlinearity="relu", **settings)


KINDS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "lstm": (nn.LSTM, "LSTM"),
    "gru": (nn.GRU, "GRU"),
    "tanh": (nn.RNN, "RNN"),
    "relu": (_relu, "RNN"),
}


@pytest.fixture
def unrolling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a recurrent layer is unrolled")

    for name in ("one_layer_lstm", "one_layer_rnn"):
        assert hasattr(decompositions, name)
        monkeypatch.setattr(decompositions, name, fails)


def _settings(layers: int, both: bool, bias: bool, first: bool) -> dict[str, Any]:
    return {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": first}


EVERY = list(itertools.product(KINDS, itertools.starmap(_settings, itertools.product((1, 2), *[(False, True)] * 3))))
QUICK = [
    ("lstm", _settings(2, True, True, False)),
    ("gru", _settings(1, True, False, True)),
    ("tanh", _settings(2, False, True, True)),
]


@pytest.mark.usefixtures("unrolling_fails")
@pytest.mark.parametrize(
    ("kind", "settings"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY)]
)
def test_a_file_has_one_node_a_layer_for_any_rows(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    make, operator = KINDS[kind]
    model = make(6, 8, **settings).eval()
    rows_at = 0 if settings["batch_first"] else 1
    x = torch.randn(*(3, 7) if rows_at == 0 else (7, 3), 6)
    free: dict[str, Any] = {} if rows_at == 0 else {"dynamic_shapes": ({1: torch.export.Dim("batch")},)}
    result = lobo_fx.compile(model, [], example_inputs=x, progress=False, **free)
    artifact = result.export(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(artifact.path).graph.node]
    assert kinds.count(operator) == settings["num_layers"]
    more = torch.cat([x, x, x], rows_at)
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    every, last = model(more)
    expected = [every, *(last if isinstance(last, tuple) else [last])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other.detach(), rtol=0, atol=1e-6)


def test_states_that_do_not_fit_are_refused() -> None:
    """Twin: shapes that the operator itself would refuse are no shapes."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(6, 8, batch_first=True)
            self.start = nn.Buffer(torch.zeros(1, 3, 8))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.gru(x, self.start, list(self.layer.parameters()), True, 1, 0.0, False, False, True)[0]

    with pytest.raises(TraceError, match="your code specialized it to be a constant"):
        lobo_fx.trace(Fixed().eval(), torch.randn(3, 5, 6), dynamic_shapes=({0: torch.export.Dim("batch")},))


def test_pytorch_is_left_as_it_was_and_other_threads_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {target: dict(target.py_kernels) for target in RECURRENT}, dict(decomposition_table)
    unrolled: list[bool] = []
    asked: list[bool] = []
    monkeypatch.setattr(known_shapes, "known_result", lambda *_: asked.append(True))
    x, state = torch.randn(4, 2, 6), torch.zeros(1, 2, 8)
    weights = [torch.randn(24, 6), torch.randn(24, 8)]

    def other_thread() -> None:
        with FakeTensorMode() as mode:
            fakes: list[torch.Tensor] = [mode.from_tensor(tensor) for tensor in (x, state, *weights)]
            made = torch.gru(fakes[0], fakes[1], fakes[2:], False, 1, 0.0, False, False, False)
        unrolled.append(made[0].shape == (4, 2, 8))

    with shapes_known():
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert unrolled == [True]
    assert not asked
    assert before == ({target: dict(target.py_kernels) for target in RECURRENT}, dict(decomposition_table))


def test_a_stack_is_taken_apart_and_computes_what_it_did() -> None:
    """States that are given, dropout between layers, and the last states of all layers."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 8, 3, bidirectional=True, dropout=0.3)

        def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
            return self.layer(x, (h, c))

    model, inputs = Stack().eval(), (torch.randn(5, 2, 6), torch.randn(6, 2, 8), torch.randn(6, 2, 8))
    program = lobo_fx.trace(model, inputs, dynamic_shapes=None)
    calls = [node for node in program.graph.nodes if node.target in RECURRENT]
    assert len(calls) == 3
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)) == 2
    (every, (h, c)), (own_every, (own_h, own_c)) = model(*inputs), program.module(*inputs)
    for expected, found in ((every, own_every), (h, own_h), (c, own_c)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    trained = program.module.train()(*inputs)[0]
    assert not torch.allclose(trained, every)


def test_outputs_are_laid_out_as_pytorch_lays_them_out() -> None:
    """A `contiguous` after a layer whose rows come first copies: it must stay in the graph."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 8, 1, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            every = self.layer(x)[0]
            return every.contiguous().view(every.shape[0], -1)

    model, x = Viewed().eval(), torch.randn(3, 5, 6)
    torch.testing.assert_close(lobo_fx.trace(model, x).module(x), model(x), rtol=0, atol=1e-6)


def test_dropout_that_is_always_on_stays_on() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 8, 2)

        def forward(self, x: torch.Tensor) -> Any:
            states = (torch.zeros(2, x.shape[1], 8),) * 2
            return torch.lstm(x, states, list(self.layer.parameters()), True, 2, 0.5, True, False, False)[0]

    x = torch.randn(4, 5, 6)
    module = lobo_fx.trace(Always().eval(), x, dynamic_shapes=None).module.eval()
    assert not torch.equal(module(x), module(x))


def test_projected_states_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.LSTM(6, 8, proj_size=4, batch_first=True).eval()
    result = lobo_fx.compile(model, [], example_inputs=torch.randn(3, 5, 6), progress=False)
    with pytest.raises(ExportError, match="projects its states"):
        result.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
