"""What `torch.onnx` has no function for is decomposed where it stands, and nothing else is traced again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import lobo_fx
from lobo_fx import ExportError
from lobo_fx.capture.lifting import exported_program
from lobo_fx.exporters.onnx.decomposing import with_translated_calls
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.graph.operators import aten

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: -x, (x,))  # type: ignore[no-any-return]


class Differences(nn.Module):
    """An operator that takes several others, of a free size, and one that gives two values."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = torch.aminmax(x, dim=1)
        return x.diff(dim=0), high - low


class DeepAttention(nn.Module):
    """What is decomposed reads what another rewriting for `torch.onnx` puts in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(x, x, x).diff(dim=-1)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that `torch.onnx` traced again."""
    found: list[ExportedProgram] = []
    whole = ExportedProgram.run_decompositions

    def noted(self: ExportedProgram, *args: object) -> ExportedProgram:
        found.append(self)
        return whole(self, *args)  # type: ignore[no-any-return]

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noted)
    return found


def program_of(module: nn.Module) -> lobo_fx.Program:
    return lobo_fx.compile(module.eval(), [], example_inputs=IMAGES, progress=False).program


def test_norms_and_pools_are_decomposed_where_they_stand(tmp_path: Path, traces: list[ExportedProgram]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    program = program_of(module)
    plain = with_translated_calls(program, {})
    targets = {node.target for node in plain.graph.nodes}
    assert aten.conv2d.default in targets
    assert not targets & {aten.batch_norm.default, aten.adaptive_avg_pool2d.default}
    assert torch.equal(plain.run(), program.run())
    assert aten.batch_norm.default in {node.target for node in program.graph.nodes}  # the program itself stays
    OnnxExporter().export(program, tmp_path / "model.onnx", {})
    assert not traces


def test_nothing_is_copied_where_everything_has_a_function() -> None:
    program = program_of(nn.Conv2d(3, 4, 3))
    assert with_translated_calls(program, {}) is program


@pytest.mark.parametrize(
    "module", [Differences(), DeepAttention(), nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Hardswish())]
)
def test_what_stands_instead_computes_the_same(module: nn.Module, tmp_path: Path) -> None:
    program = program_of(module)
    plain = with_translated_calls(program, {})
    torch.testing.assert_close(plain.run(), program.run(), rtol=0, atol=1e-6)
    assert OnnxExporter().export(program, tmp_path / "model.onnx", {}).parity < 1e-5


def test_new_calls_belong_to_the_module_and_line_of_the_old() -> None:
    program = program_of(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1)))
    (pool,) = program.graph.find_nodes(op="call_function", target=aten.adaptive_avg_pool2d.default)
    new = [node for node in with_translated_calls(program, {}).graph.nodes if node.target is aten.mean.dim]
    assert [node.meta["nn_module_stack"] for node in new] == [pool.meta["nn_module_stack"]]


def test_sizes_that_must_agree_are_not_asserted_and_trace_nothing_again(
    tmp_path: Path, traces: list[ExportedProgram]
) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    example = torch.randn(2, 5), torch.randn(2, 5)
    program = lobo_fx.compile(Sum(), [], example_inputs=example, progress=False).program
    assert aten._assert_scalar.default not in {node.target for node in exported_program(program).graph.nodes}
    assert OnnxExporter().export(program, tmp_path / "model.onnx", {}).parity == 0
    assert not traces


def test_what_decomposes_for_one_size_only_is_refused(tmp_path: Path) -> None:
    class ProductOverRows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumprod(0)

    with pytest.raises(ExportError, match="has no ONNX form"):
        OnnxExporter().export(program_of(ProductOverRows()), tmp_path / "model.onnx", {})


class Cells(nn.Module):
    """Loops over steps with cells of every kind, with and without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(8, 6), nn.GRUCell(6, 5, bias=False)
        self.tanh, self.relu = nn.RNNCell(5, 4), nn.RNNCell(4, 4, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, memory = torch.zeros(len(x), 6), torch.zeros(len(x), 6)
        gru, tanh = None, None
        for step in x.unbind(2)[:2]:
            hidden, memory = self.lstm(step.flatten(1)[:, :8], (hidden, memory))
            gru = self.gru(hidden, gru)
            tanh = self.tanh(gru, tanh)
        return self.relu(tanh), memory


def test_recurrent_cells_are_formulas_that_trace_nothing_again(tmp_path: Path, traces: list[ExportedProgram]) -> None:
    torch.manual_seed(0)
    program = program_of(Cells())
    plain = with_translated_calls(program, {})
    for found, expected in zip(plain.run(), program.run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert OnnxExporter().export(program, tmp_path / "model.onnx", {}).parity < 1e-5
    assert not traces


def test_branches_are_left_to_torch_onnx(tmp_path: Path, traces: list[ExportedProgram]) -> None:
    OnnxExporter().export(program_of(Branch()), tmp_path / "model.onnx", {})
    assert traces


class Selected(nn.Module):
    """Values chosen by a mask, of which nobody knows how many there are; and operators that are to be decomposed."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = torch.aminmax(x, dim=1)
        last = torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: -x, (x,)) if self.branch else x
        return x[x > 0], high - low, last


def test_sizes_that_only_data_decides_keep_nothing_from_being_decomposed(
    tmp_path: Path, traces: list[ExportedProgram]
) -> None:
    """Twins: `torch.onnx` traces the program with a branch again, and must not miss these sizes."""
    OnnxExporter().export(program_of(Selected(False)), tmp_path / "model.onnx", {})
    assert not traces
    OnnxExporter().export(program_of(Selected(True)), tmp_path / "branch.onnx", {})
    assert traces


class Ordered(nn.Module):
    """Order statistics, and sorts that keep the order of what is equal."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ranked = x.round()
        middle = x.median(1, keepdim=True).values, x.median(-1).indices, x.median()
        smallest = x.kthvalue(2, 1).values, x.kthvalue(3, 2, keepdim=True).values
        stable = torch.sort(ranked, dim=1, stable=True)
        return *middle, *smallest, *stable, torch.argsort(ranked, dim=2, descending=True, stable=True)


class SplitFreely(nn.Module):
    """Parts of the batch's size, as heads that stand in the batch are split."""

    def __init__(self, by_sizes: bool) -> None:
        super().__init__()
        self.by_sizes = by_sizes

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x.size(0)
        return tuple(torch.split(torch.cat([x, x.sin()]), [rows, rows] if self.by_sizes else rows))


@pytest.mark.parametrize("model", [Ordered(), SplitFreely(by_sizes=False), SplitFreely(by_sizes=True)])
def test_files_give_what_eager_pytorch_gives_at_other_sizes(model: nn.Module, tmp_path: Path) -> None:
    result = lobo_fx.compile(model, [], example_inputs=torch.cat([IMAGES, IMAGES])[:, :, 0], progress=False)
    session = OnnxRuntime().load(result.export(tmp_path / "model.onnx").path, 1)
    for rows in (3, 5):
        x = torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(rows))
        for expected, found in zip(model(x), session.run({"x": x.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-6, atol=1e-7)
