"""Which sizes stay free by default and on request, what the user learns of the rest, and that free ones are free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import lobo_fx
from lobo_fx import passes
from lobo_fx.capture.tracing import trace
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import DynamicShapes
from lobo_fx.graph.operators import aten
from lobo_fx.graph.shapes import FreeDimension


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(length))


class Text(nn.Module):
    """A transformer block over tokens, whose positions are as many as a table holds."""

    def __init__(self, at_most: int = 20) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(at_most, 16)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 7)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        seen = None if mask is None else mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + self.out(y)))


class Learned(nn.Module):
    """Holds a position for each of twelve words: no other length fits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 4), nn.Parameter(torch.randn(12, 4))

    def forward(self, ids: torch.Tensor) -> Any:
        return self.words(ids) + self.places


class Pyramid(nn.Module):
    """Halves an image twice and joins what it was: sizes are multiples of 4, which its code insists on."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 3, 4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        if x.shape[2] % 4 or x.shape[3] % 4:
            x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return x + self.up(self.down(x).relu())


IMAGE = torch.randn(2, 3, 16, 24)
CASES: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], DynamicShapes, str]] = {
    "tokens": (Text(), (tokens(),), "auto", "ids: int64[batch, length]"),
    "tokens and a mask": (
        Text(),
        (tokens(), torch.ones(2, 12)),
        "auto",
        "ids: int64[batch, length]; mask: float32[batch, length]",
    ),
    "a single row": (Text(), (tokens(1),), "auto", "ids: int64[batch, length]"),
    "the batch alone": (Text(), (tokens(),), "batch", "ids: int64[batch, 12]"),
    "features": (nn.Linear(4, 3), (torch.randn(2, 4),), "auto", "input: float32[batch, 4]"),
    "steps": (nn.GRU(4, 3, batch_first=True), (torch.randn(2, 6, 4),), "auto", "input: float32[batch, length, 4]"),
    "a signal": (nn.Conv1d(3, 4, 3), (torch.randn(2, 3, 9),), "auto", "input: float32[batch, 3, length]"),
    "an image": (Pyramid(), (IMAGE,), "auto", "x: float32[batch, 3, 16, 24]"),
    "an image of any size": (Pyramid(), (IMAGE,), "all", "x: float32[batch, 3, x_2, x_3]"),
    "nothing": (Text(), (tokens(),), None, "ids: int64[2, 12]"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free(name: str) -> None:
    model, inputs, dynamic_shapes, signature = CASES[name]
    assert str(trace(model.eval(), inputs, dynamic_shapes).signature) == signature


def test_a_length_that_the_code_fixes_is_noted_with_the_users_line() -> None:
    program = trace(Learned(), tokens())
    assert str(program.signature) == "ids: int64[batch, 12]"
    (note,) = program.notes
    assert note.startswith("'ids' has fixed sizes but for the batch: 12 (fixed at ")
    assert "test_freeing.py:" in note
    assert "self.words(ids) + self.places" in note


def test_a_batch_that_the_code_fixes_leaves_the_length_free() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x.unbind(0)
            return first + second

    program = trace(Pair(), torch.randn(2, 5))
    assert [spec.shape[0] for spec in program.signature.inputs if spec] == [2]
    assert [spec.shape[1] for spec in program.signature.inputs if spec] == ["length"]
    (note,) = program.notes
    assert note.startswith("the batch size is fixed: ")
    assert program.module(torch.ones(2, 9)).shape == (9,)


def test_a_batch_that_the_code_fixes_leaves_all_sizes_free_where_they_are_asked_for() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x.unbind(0)
            return first + second

    program = trace(Pair(), torch.randn(2, 3, 8, 9), "all")
    assert str(program.signature) == "x: float32[2, x_1, x_2, x_3]"
    (note,) = program.notes
    assert note.startswith("the batch size is fixed: ")
    assert program.module(torch.ones(2, 3, 5, 6)).shape == (3, 5, 6)


def test_bounds_that_the_code_sets_are_held() -> None:
    module = trace(Text(), tokens()).module
    assert module(tokens(3, 20)).shape == (3, 20, 7)
    with pytest.raises(InvalidInput, match="length is 21, the program takes to 20"):
        module(tokens(3, 21))


def test_sizes_that_take_another_way_through_the_code_are_noted_and_refused(tmp_path: Path) -> None:
    model = Pyramid().eval()
    result = lobo_fx.compile(model, example_inputs=IMAGE, dynamic_shapes="all", progress=False)
    assert result.program.module.program_facts.free_dimensions[1:] == (FreeDimension("", 4, None, 4),) * 2
    assert [note for note in result.report.notes if "in steps of 4" in note] == result.report.notes != []
    again = lobo_fx.load(result.save(tmp_path / "saved"))
    assert again.program.module.program_facts.free_dimensions == result.program.module.program_facts.free_dimensions
    assert again.program.signature == result.program.signature
    for module in (result.module, again.module):
        image = torch.randn(1, 3, 8, 36)
        torch.testing.assert_close(module(image), model(image), rtol=1e-5, atol=1e-6)
        with pytest.raises(InvalidInput, match="x_2 is 10, the program takes from 4 in steps of 4"):
            module(torch.randn(1, 3, 10, 36))
    assert again.export(tmp_path / "model.onnx").parity < 1e-5


class Clips(nn.Module):
    """Adds to each of eight frames of a video what all of them have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, frames: torch.Tensor) -> Any:
        x = self.first(frames).relu()
        clips = x.view(-1, 8, *x.shape[1:])
        x = self.second((clips + clips.mean(1, keepdim=True)).flatten(0, 1)).relu()
        return self.head(x.mean((2, 3)))


def test_frames_of_whole_videos_are_free_in_steps_after_every_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frames = torch.randn(16, 3, 9, 9)
    result = lobo_fx.compile(
        Clips().eval(),
        [passes.PruneChannels(0.5), passes.QuantizeStatic(kernels="all")],
        example_inputs=frames,
        calibration_data=[torch.randn(count, 3, 9, 9) for count in (8, 32)],
        progress=False,
    )
    signature = result.program.signature
    assert signature.free == (FreeDimension(name="batch", step=8),)
    assert signature.batch is None  # one frame is no input
    assert any("free in steps of 8" in str(note) for note in result.report.notes)
    file = result.export(tmp_path / "model.onnx", confirm=False).path
    session = onnxruntime.InferenceSession(file)
    for count in (8, 24):
        given = torch.randn(count, 3, 9, 9)
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), result.module(given), rtol=0, atol=1e-3)
    with pytest.raises(InvalidInput, match="batch is 12, the program takes in steps of 8"):
        result.module(frames[:12])


class Experts(nn.Module):
    """A weight of each of four groups of features; torch leaves the number of features free, for one value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4 * 16, 24))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.einsum("bhd,hde->bhe", x.view(-1, 4, 16), self.weight.view(4, 16, 24))


def test_a_size_whose_guards_hold_for_the_example_alone_is_fixed() -> None:
    program = trace(Experts(), torch.randn(8, 64))
    assert str(program.signature) == "x: float32[batch, 64]"
    assert program.module(torch.randn(5, 64)).shape == (5, 4, 24)
    assert aten.bmm.default in {node.target for node in program.graph.nodes}


PASSES: dict[str, list[Any]] = {
    "none": [],
    "prune": [passes.PruneChannels(0.5, round_to=1)],
    "fuse": [passes.FuseAttention()],
    "static": [passes.FuseAttention(), passes.QuantizeStatic(kernels="all")],
    "weights": [passes.QuantizeWeights()],
    "mixed": [passes.MixedPrecision(20)],
}


SLOW = ("none", "prune", "weights", "mixed", "fuse")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PASSES])
def test_a_file_takes_texts_of_any_length_after_every_pass(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = Text().eval(), (tokens(), torch.ones(2, 12))
    result = lobo_fx.compile(
        model,
        PASSES[name],
        example_inputs=given,
        calibration_data=[given, (tokens(2, 9), torch.ones(2, 9))],
        progress=False,
    )
    artifact = result.export(tmp_path / "model.onnx", confirm=False)
    named = [
        [size.dim_param for size in value.type.tensor_type.shape.dim] for value in onnx.load(artifact.path).graph.input
    ]
    assert named == [["batch", "length"]] * 2
    session = onnxruntime.InferenceSession(artifact.path)
    for rows, length in ((1, 12), (3, 7), (2, 19)):
        ids, mask = tokens(rows, length), torch.ones(rows, length)
        (found,) = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
        expected = (model if name in ("none", "fuse") else result.module)(ids, mask).detach()
        tolerance = 1e-5 if name in ("none", "fuse", "prune", "weights") else 0.1
        assert found.shape == expected.shape
        assert float((torch.from_numpy(found) - expected).abs().max()) <= tolerance * float(expected.abs().max())


WRONG: list[tuple[Any, str]] = [
    (5, "dynamic_shapes is a int"),
    (True, "dynamic_shapes is a bool"),
    (Dim.AUTO, "dynamic_shapes is a _DimHint"),
    ({"id": None}, r"speaks of 'id', which is no input; did you mean ids\?"),
    ({0: {0: Dim("b")}}, "speaks of 0, which is no input"),
    ({"ids": None}, r"says nothing of \['mask'\]"),
    (({0: Dim("b")},), "a list with an entry for each of 2 inputs"),
    ({"ids": 5, "mask": None}, r"dynamic_shapes\['ids'\] is 5; it must be a dict from dimensions"),
    ({"ids": {0: "b"}, "mask": None}, r"\['ids'\]\[0\] is 'b'; it must be a Dim"),
    ({"ids": {0: True}, "mask": None}, r"\['ids'\]\[0\] is True"),
    ({"ids": {-1: Dim("b")}, "mask": None}, "speaks of dimension -1; the input has 0 to 1"),
    ({"ids": {2: Dim("b")}, "mask": None}, "speaks of dimension 2"),
    ({"ids": {"0": Dim("b")}, "mask": None}, "speaks of dimension '0'"),
    ({"ids": (Dim("b"),), "mask": None}, "has 1 entries; the input has 2 dimensions"),
    ({"ids": {1: 3}, "mask": None}, "fixes a size of 3; the example's is 12"),
    ({"ids": {1: Dim("n", min=13)}, "mask": None}, "the example's size of 12 is not within"),
]


@pytest.mark.parametrize(("given", "complaint"), WRONG)
def test_a_specification_that_does_not_fit_is_refused_in_words(given: Any, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        trace(Text(), (tokens(), torch.ones(2, 12)), given)


def test_a_specification_that_fits_goes_through() -> None:
    length = Dim("words", min=2, max=20)
    program = trace(Text(), (tokens(), torch.ones(2, 12)), ({1: length}, [None, length]))
    assert str(program.signature) == "ids: int64[2, words]; mask: float32[2, words]"


def test_looking_for_constants_leaves_torch_as_it_was() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    before = ShapeEnv._set_replacement
    with pytest.raises(lobo_fx.TraceError):
        trace(Unfollowed(), torch.randn(2, 3))
    assert ShapeEnv._set_replacement is before


class Unfollowed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if bool(x.sum() > 0) else x
