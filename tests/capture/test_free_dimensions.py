"""Names and bounds of free dimensions: what the user gave comes through passes, copies, saving and exporting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

import lobo_fx
from lobo_fx import passes
from lobo_fx.graph.shapes import FreeDimension

IMAGES = torch.randn(2, 3, 8, 8)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.first(x).relu())


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Convolutions()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.layers(x) + self.layers(y)


class Pairs(nn.Module):
    """Takes two rows of `y` for each of `x`."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y.reshape(-1, 2, 3).sum(1)


class Across(nn.Module):
    """Takes the rows of `y` along its second dimension."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y.T


class Products(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y.T


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, 8, 10, 5), nn.ReLU(), nn.Conv1d(8, 4, 3, 2))

    def forward(self, audio: torch.Tensor) -> Any:
        return self.layers(audio[:, None])


ROWS = Dim("rows", min=1, max=64)
CASES: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], Any, str, list[FreeDimension]]] = {
    "height and width": (
        Convolutions(),
        (IMAGES,),
        {"x": {0: Dim("b"), 2: Dim("h", min=4, max=64), 3: Dim("w", min=5)}},
        "x: float32[b, 3, h, w]",
        [FreeDimension("b"), FreeDimension("h", 4, 64), FreeDimension("w", 5)],
    ),
    "an even width": (
        Convolutions(),
        (IMAGES,),
        {"x": {3: 2 * Dim("half", min=3, max=64)}},
        "x: float32[2, 3, 8, 2*half]",
        [FreeDimension("half", 3, 64)],
    ),
    "left to torch": (
        Sum(),
        (IMAGES, IMAGES),
        {name: {0: Dim.AUTO, 2: Dim.AUTO} for name in "xy"},
        "x: float32[batch, 3, x_2, 8]; y: float32[batch, 3, x_2, 8]",
        [FreeDimension(), FreeDimension(lowest=3)],
    ),
    "one of them called batch": (
        Convolutions(),
        (IMAGES,),
        {"x": {0: Dim.AUTO, 2: Dim("batch", min=4)}},
        "x: float32[x_0, 3, batch, 8]",
        [FreeDimension(), FreeDimension("batch", 4)],
    ),
    "twice as many rows": (
        Pairs(),
        (torch.randn(3, 3), torch.randn(6, 3)),
        {"x": {0: ROWS}, "y": {0: 2 * ROWS}},
        "x: float32[rows, 3]; y: float32[2*rows, 3]",
        [FreeDimension("rows", 1, 64)],
    ),
    "rows along the second dimension": (
        Across(),
        (torch.randn(3, 4), torch.randn(4, 3)),
        {"x": {0: ROWS}, "y": {1: ROWS}},
        "x: float32[rows, 4]; y: float32[4, rows]",
        [FreeDimension("rows", 1, 64)],
    ),
    "two kinds of rows": (
        Products(),
        (torch.randn(3, 4), torch.randn(3, 4)),
        {"x": {0: Dim("queries")}, "y": {0: Dim("keys", max=99)}},
        "x: float32[queries, 4]; y: float32[keys, 4]",
        [FreeDimension("queries"), FreeDimension("keys", None, 99)],
    ),
    "the length of audio": (
        Audio(),
        (torch.randn(2, 400),),
        {"audio": {0: Dim("b"), 1: Dim("samples", min=100)}},
        "audio: float32[b, samples]",
        [FreeDimension("b"), FreeDimension("samples", 100)],
    ),
}


SLOW = ("left to torch", "rows along the second dimension", "two kinds of rows")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_names_and_bounds_come_through_a_pass_saving_and_exporting(name: str, tmp_path: Path) -> None:
    model, inputs, shapes, signature, known = CASES[name]
    settings: dict[str, Any] = {"example_inputs": inputs, "dynamic_shapes": shapes, "progress": False}
    result = lobo_fx.compile(model.eval(), [passes.FoldWeights()], **settings)
    assert str(result.program.signature) == signature
    again = lobo_fx.load(lobo_fx.load(result.save(tmp_path / "first")).save(tmp_path / "second"))
    for program in (result.program, result.program.clone(), again.program):
        assert str(program.signature) == signature
        assert list(program.module.program_facts.free_dimensions) == known
    again.export(tmp_path / "model.onnx")
    values = onnx.load(tmp_path / "model.onnx").graph
    for value, spec in zip([*values.input, *values.output], [*again.program.signature.inputs, None], strict=True):
        sizes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        assert all(size.isidentifier() for size in sizes if isinstance(size, str))
        if spec is not None:
            stated = [size if str(size).isidentifier() else sizes[at] for at, size in enumerate(spec.shape)]
            assert [size for size in stated if isinstance(size, str)] == [s for s in sizes if isinstance(s, str)]


def test_exported_files_take_other_sizes(tmp_path: Path) -> None:
    images = torch.randn(1, 3, 5, 17)
    model, inputs, shapes, _, _ = CASES["height and width"]
    result = lobo_fx.compile(model.eval(), example_inputs=inputs, dynamic_shapes=shapes, progress=False)
    session = onnxruntime.InferenceSession(result.export(tmp_path / "model.onnx").path)
    (found,) = session.run(None, {"x": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-5, atol=1e-6)


def test_what_is_saved_bounds_sizes_as_the_user_did_and_no_more(tmp_path: Path) -> None:
    model, inputs, shapes, _, _ = CASES["height and width"]
    result = lobo_fx.compile(model.eval(), example_inputs=inputs, dynamic_shapes=shapes, progress=False)
    (archive,) = result.save(tmp_path).glob("program.*.pt2")
    saved = torch.export.load(archive)
    assert [str(bounds) for bounds in saved.range_constraints.values()] == [
        "VR[0, int_oo]",
        "VR[4, 64]",
        "VR[5, int_oo]",
    ]
    taken = saved.module()
    assert taken(torch.randn(1, 3, 64, 5)).shape == (1, 4, 62, 3)
    with pytest.raises(Exception, match="64"):
        taken(torch.randn(1, 3, 65, 5))


class Fourths(nn.Module):
    """Takes twice as many steps of `y`, and treats lengths of fours in another way."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([x, x], 1) + y
        return joined if x.shape[1] % 4 == 0 else 2 * joined


def test_multiples_of_a_size_that_goes_in_steps_are_left_to_torch(tmp_path: Path) -> None:
    inputs = torch.randn(2, 8, 3), torch.randn(2, 16, 3)
    result = lobo_fx.compile(Fourths(), example_inputs=inputs, progress=False)
    known = "x: float32[batch, length, x_2]; y: float32[batch, 2*length, x_2]"
    again = lobo_fx.load(result.save(tmp_path / "saved"))
    assert str(result.program.signature) == str(again.program.signature) == known
    assert [dimension.step for dimension in again.program.signature.free] == [1, 4, 1]
    again.export(tmp_path / "model.onnx")


def test_a_size_that_a_guard_divides_by_is_no_step() -> None:
    class Halved(Pairs):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            found = super().forward(x, y)
            return found if x.shape[0] % 4 == 0 else 2 * found

    shapes = {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}}
    program = lobo_fx.trace(Halved(), (torch.randn(8, 3), torch.randn(16, 3)), shapes)
    assert program.signature.free[0].step % 4 == 0
