"""ONNX files as modules: they compute what ONNX Runtime computes, keep sizes free, and say what can't be read."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import lobo_fx
from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnx.inspection import inspect_file
from lobo_fx.exporters.onnx.reader import OnnxModule, example_inputs_of, read_onnx
from lobo_fx.exporters.onnx.reader_operators import OPERATORS
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.graph.inputs import Inputs

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool2d(self.norm(self.conv(images)).relu(), 2)
        found: torch.Tensor = self.head(self.down(x).relu().mean((2, 3)))
        return found


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(30, 16), nn.Parameter(torch.randn(64, 16))
        self.norm, self.inside, self.outside = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.places[: ids.shape[1]]
        q, k, v = self.inside(self.norm(x)).reshape(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        found: torch.Tensor = x + torch.nn.functional.gelu(self.outside(mixed.transpose(1, 2).flatten(2)))
        return found


def exported(model: nn.Module, example: torch.Tensor, path: Path, how: str) -> Path:
    """A file of ours, or one that old or new `torch.onnx` wrote, rows and lengths free."""
    if how == "ours":
        lobo_fx.compile(model, example_inputs=example, progress=False).export(path)
        return path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free = {"x": {0: "rows"} | ({1: "length"} if example.dim() == 2 else {})}
        old = {"dynamo": False, "dynamic_axes": free, "opset_version": 17}
        new = {"dynamo": True, "external_data": False, "verbose": False}
        new["dynamic_shapes"] = ({0: torch.export.Dim("rows")},) if example.dim() == 4 else None  # type: ignore[assignment]
        torch.onnx.export(model.eval(), (example,), path, input_names=["x"], **(old if how == "old" else new))
    return path


IMAGES, WORDS = torch.randn(2, 3, 12, 12), torch.randint(0, 30, (2, 7))


@pytest.mark.parametrize(
    ("make", "example", "how"),
    [
        pytest.param(Net, IMAGES, "ours", id="net-ours", marks=pytest.mark.slow),
        pytest.param(Net, IMAGES, "old", id="net-old"),
        pytest.param(Net, IMAGES, "new", id="net-new", marks=pytest.mark.slow),
        pytest.param(Words, WORDS, "ours", id="words-ours", marks=pytest.mark.slow),
        pytest.param(Words, WORDS, "old", id="words-old", marks=pytest.mark.slow),
        pytest.param(Words, WORDS, "new", id="words-new"),
    ],
)
def test_files_of_ours_and_of_torch_compute_the_same_and_keep_what_was_free(
    make: Any, example: torch.Tensor, how: str, tmp_path: Path
) -> None:
    model = make().eval()
    path = exported(model, example, tmp_path / "model.onnx", how)
    module = read_onnx(path)
    with torch.no_grad():
        torch.testing.assert_close(module(example), model(example), rtol=1e-5, atol=1e-5)
    result = lobo_fx.compile(module, example_inputs=example_inputs_of(module), progress=False)
    (spec,) = result.program.signature.inputs
    assert spec is not None
    if how != "new" or make is Net:
        assert isinstance(spec.shape[0], str)
    if make is Words and how != "new":
        assert isinstance(spec.shape[1], str)
        longer = torch.randint(0, 30, (5, 11))
        with torch.no_grad():
            torch.testing.assert_close(result.module(longer), model(longer), rtol=1e-5, atol=1e-5)


def test_a_file_is_pruned_and_written_again(tmp_path: Path) -> None:
    module = read_onnx(exported(Net(), torch.randn(2, 3, 12, 12), tmp_path / "old.onnx", "ours"))
    names = [name for name, _ in module.named_parameters()]
    assert {"conv.weight", "down.weight", "head.weight", "head.bias"} <= set(names)
    passes = ["fold_bn", lobo_fx.passes.PruneChannels(round_to=1)]
    result = lobo_fx.compile(module, passes, example_inputs=example_inputs_of(module), progress=False)
    assert result.report.rows[-1].parameters < result.report.rows[0].parameters / 1.5
    assert result.export(tmp_path / "new.onnx").parity < 1e-5


# --- operators against ONNX Runtime ---------------------------------------------------------------------------


def file_of(
    path: Path, nodes: list[Any], stored: dict[str, Any] | None = None, shape: Any = ("n", 4, 6), opset: int = 18,
    kind: int = FLOAT, out: int = FLOAT,
) -> Path:  # fmt: skip
    """A file with one input `x`, one output `y`, and opset 18."""
    arrays = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (stored or {}).items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", out, None)],
        arrays,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def node(operator: str, *inputs: str, **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), ["y"], name=operator, **attributes)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


RNG = np.random.default_rng(0)


def drawn(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


WEIGHT = RNG.standard_normal((4, 4, 3)).astype(np.float32)
IMAGE = ("n", 4, 6, 6)
CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "Conv, same": (node("Conv", "x", "w", auto_pad="SAME_UPPER", strides=[2]), {"w": WEIGHT}, None),
    "Conv, uneven pads": (node("Conv", "x", "w", pads=[2, 0]), {"w": WEIGHT}, None),
    "ConvTranspose": (node("ConvTranspose", "x", "w", strides=[2], output_padding=[1]), {"w": WEIGHT}, None),
    "MaxPool, ceil": (node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), {}, IMAGE),
    "MaxPool, uneven": (node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]), {}, IMAGE),
    "AveragePool": (node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), {}, IMAGE),
    "Gemm": (
        node("Gemm", "x", "w", "b", alpha=0.5, beta=2.0, transA=1),
        {"w": np.ones((3, 5), np.float32), "b": np.ones((1, 5), np.float32)},
        (3, 4),
    ),
    "Softmax of opset 11": (node("Softmax", "x", axis=1), {}, None),
    "ReduceMean, negative axes": (node("ReduceMean", "x", "a", keepdims=0), {"a": ints(-1, 1)}, None),
    "ReduceSum of all": (node("ReduceSum", "x"), {}, None),
    "ReduceProd": (node("ReduceProd", "x", "a"), {"a": ints(1, 2)}, None),
    "Reshape, zero": (node("Reshape", "x", "s"), {"s": ints(0, -1, 3)}, None),
    "Flatten, 2": (node("Flatten", "x", axis=2), {}, None),
    "Slice, backwards": (
        node("Slice", "x", "a", "b", "c", "d"),
        {"a": ints(-1), "b": ints(-(2**63)), "c": ints(2), "d": ints(-1)},
        None,
    ),
    "Slice, steps": (
        node("Slice", "x", "a", "b", "c", "d"),
        {"a": ints(1), "b": ints(2**62), "c": ints(2), "d": ints(2)},
        None,
    ),
    "Gather, negative": (node("Gather", "x", "i", axis=1), {"i": ints(-1, 0)}, None),
    "Gather, one": (node("Gather", "x", "i", axis=2), {"i": np.int64(-2)}, None),
    "Gather, table of places": (node("Gather", "x", "i", axis=1), {"i": np.array([[0, 3], [1, 2]])}, None),
    "Expand": (node("Expand", "x", "s"), {"s": ints(2, 1, 1, 6)}, None),
    "Tile": (node("Tile", "x", "s"), {"s": ints(1, 2, 3)}, None),
    "Pad": (node("Pad", "x", "p", "v"), {"p": ints(0, 0, 1, 0, 0, 2), "v": np.float32(2)}, None),
    "Pad, reflected": (node("Pad", "x", "p", mode="reflect"), {"p": ints(0, 0, 1, 0, 0, 2)}, None),
    "Clip": (node("Clip", "x", "a"), {"a": np.float32(-0.3)}, None),
    "Resize, doubled": (node("Resize", "x", "", "s", mode="nearest"), {"s": np.array([1, 1, 2, 2], np.float32)}, IMAGE),
    "Resize, linear": (node("Resize", "x", "", "", "s", mode="linear"), {"s": ints(2, 4, 9, 7)}, (2, 4, 6, 6)),
    "DepthToSpace": (node("DepthToSpace", "x", blocksize=2), {}, IMAGE),
    "DepthToSpace, CRD": (node("DepthToSpace", "x", blocksize=2, mode="CRD"), {}, IMAGE),
    "Trilu": (node("Trilu", "x", "k", upper=0), {"k": np.int64(1)}, None),
    "Where": (node("Where", "c", "x", "v"), {"c": np.array([True, False] * 3), "v": np.float32(9)}, None),
    "Div": (node("Div", "x", "v"), {"v": np.float32(3)}, None),
    "Pow": (node("Pow", "x", "v"), {"v": np.float32(2)}, None),
    "Max": (node("Max", "x", "v"), {"v": np.float32(0.1)}, None),
    "Pow of whole numbers": (node("Pow", "x", "v"), {"v": np.float32(2)}, None),
    "Div of whole numbers": (node("Div", "x", "v"), {"v": np.int64(2)}, None),
    "CumSum": (node("CumSum", "x", "a"), {"a": np.int64(1)}, None),
    "CumSum, others after": (node("CumSum", "x", "a", exclusive=1, reverse=1), {"a": np.int64(1)}, None),
    "Gemm, one number added": (node("Gemm", "x", "w", "b"), drawn(w=(3, 5)) | {"b": np.float32(2)}, (4, 3)),
    "Mod of a number": (node("Mod", "v", "x", fmod=1), {"v": np.float32(7)}, None),
    "Selu": (node("Selu", "x"), {}, None),
    "Selu, other numbers": (node("Selu", "x", alpha=0.5, gamma=2.0), {}, None),
    "And of truths": (node("And", "x", "v"), {"v": np.bool_(True)}, None),
    "Xor of truths": (node("Xor", "v", "x"), {"v": np.bool_(True)}, None),
    "HardSigmoid": (node("HardSigmoid", "x", alpha=0.3), {}, None),
    "PRelu": (node("PRelu", "x", "v"), {"v": np.array([0.1] * 6, np.float32)}, None),
    "LayerNormalization": (
        node("LayerNormalization", "x", "w", epsilon=1e-2, axis=1), {"w": np.ones((4, 6), np.float32)}, None,
    ),
    "InstanceNormalization": (
        node("InstanceNormalization", "x", "w", "b"),
        {"w": np.arange(4, dtype=np.float32), "b": np.ones(4, np.float32)},
        None,
    ),
    "LSTM": (
        node("LSTM", "x", "w", "r", "b", hidden_size=3, direction="bidirectional"),
        drawn(w=(2, 12, 6), r=(2, 12, 3), b=(2, 24)),
        None,
    ),
    "GRU": (
        node("GRU", "x", "w", "r", "b", hidden_size=3, linear_before_reset=1),
        drawn(w=(1, 9, 6), r=(1, 9, 3), b=(1, 18)),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_onnx_runtime_computes(name: str, tmp_path: Path) -> None:
    made, stored, shape = CASES[name]
    kind = INT if name.endswith("whole numbers") else TensorProto.BOOL if name.endswith("truths") else FLOAT
    opset = 11 if name.endswith("opset 11") else 18
    path = file_of(tmp_path / "x.onnx", [made], stored, shape or ("n", 4, 6), opset, kind, kind)
    module = read_onnx(path)  # which compares; and on other data, here:
    sizes = [size if isinstance(size, int) else 3 for size in shape or ("n", 4, 6)]
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(1))
    x = x if kind == FLOAT else (10 * x).long() if kind == INT else x > 0
    (wanted,) = OnnxRuntime().load(path, 1).run({"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "MatMul", "ReduceSum"])
def test_short_whole_numbers_keep_their_type(operator: str, tmp_path: Path) -> None:
    stored = {} if operator == "ReduceSum" else {"v": np.array([2, -3, 5, 7, -1, 4], np.int32)}
    kind = TensorProto.INT32
    path = file_of(tmp_path / "x.onnx", [node(operator, "x", *stored)], stored, kind=kind, out=kind)
    x = torch.arange(-12, 12, dtype=torch.int32).reshape(1, 4, 6)
    (wanted,) = OnnxRuntime().load(path, 1).run({"x": x.numpy()})
    found = read_onnx(path)(x).numpy()
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_an_output_that_is_left_out_is_no_input_of_others(tmp_path: Path) -> None:
    """Both have an empty name."""
    made = [
        helper.make_node("LSTM", ["x", "w", "r"], ["", "last"], hidden_size=3),
        node("Clip", "last", "", "high"),
    ]
    stored = drawn(w=(1, 12, 6), r=(1, 12, 3)) | {"high": np.float32(0.05)}
    path = file_of(tmp_path / "x.onnx", made, stored)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    (wanted,) = OnnxRuntime().load(path, 1).run({"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(read_onnx(path)(x).numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_the_mask_of_a_dropout_may_be_an_output(tmp_path: Path) -> None:
    made = [helper.make_node("Dropout", ["x"], ["z", "mask"]), node("Cast", "mask", to=FLOAT)]
    module = read_onnx(file_of(tmp_path / "x.onnx", made))
    assert torch.equal(module(torch.zeros(2, 4, 6)), torch.ones(2, 4, 6))


@pytest.mark.parametrize("name", ["..", ".", "/", "forward.weight", "x.weight"])
def test_a_weight_may_have_any_name(name: str, tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.onnx", [node("MatMul", "x", name)], {name: np.eye(6, dtype=np.float32)})
    x = torch.randn(1, 4, 6)
    assert torch.equal(read_onnx(path)(x), x)


def test_sizes_are_computed_with_and_stay_free(tmp_path: Path) -> None:
    """What exporters write for `x.view(x.shape[0] * 2, -1)`."""
    made = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Mul", ["rows", "two"], ["twice"]),
        helper.make_node("Unsqueeze", ["twice", "axis"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["wanted"], axis=0),
        node("Reshape", "x", "wanted"),
    ]
    stored = {"zero": np.int64(0), "two": np.int64(2), "axis": ints(0), "rest": ints(-1)}
    module = read_onnx(file_of(tmp_path / "x.onnx", made, stored))
    program = lobo_fx.trace(module, example_inputs_of(module), "batch")
    assert [str(spec) for spec in program.signature.inputs] == ["x: float32[batch, 4, 6]"]
    assert program.module(torch.ones(5, 4, 6)).shape == (10, 12)


# --- what is refused ------------------------------------------------------------------------------------------


def test_operators_that_can_not_be_read_are_named_with_their_counts(tmp_path: Path) -> None:
    made = [
        helper.make_node("NonZero", ["x"], ["a"]),
        helper.make_node("NonZero", ["x"], ["b"]),
        helper.make_node("FusedGelu", ["x"], ["y"], domain="com.example"),
    ]
    with pytest.raises(InvalidInput, match=r"can't be read: NonZero \(2\), com\.example\.FusedGelu \(1\)\. Compile"):
        read_onnx(file_of(tmp_path / "x.onnx", made))
    assert "NonZero" not in OPERATORS


def test_a_form_of_an_operator_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.onnx", [node("ArgMax", "x", select_last_index=1)], out=INT)
    with pytest.raises(InvalidInput, match="ArgMax 'ArgMax' can't be read: select_last_index"):
        read_onnx(path)


@pytest.mark.parametrize(
    ("made", "stored", "words"),
    [
        (helper.make_node("MaxPool", ["x"], ["y", "at"], kernel_shape=[2, 2]), {}, "the output Indices"),
        (node("AveragePool", "x", kernel_shape=[2, 2], dilations=[2, 2]), {}, "dilations"),
        (node("Resize", "x", "", "", "s", mode="linear", axes=[2, 3]), {"s": ints(9, 7)}, "axes"),
    ],
    ids=["MaxPool", "AveragePool", "Resize"],
)
def test_what_would_change_the_outputs_is_named(made: Any, stored: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.onnx", [made], stored, (2, 4, 6, 6), opset=19)
    with pytest.raises(InvalidInput, match=f"can't be read: {words}"):
        read_onnx(path)


@pytest.mark.parametrize(
    ("made", "kind", "words"),
    [
        (node("Cast", "x", to=FLOAT), TensorProto.UINT32, "the input 'x' can't be made: type uint32"),
        (node("Cast", "x", to=FLOAT), TensorProto.STRING, "the input 'x' can't be made: type string"),
        (node("Flatten", "x", axis=3), FLOAT, "Flatten 'Flatten' can't be computed in PyTorch: Dimension out of range"),
    ],
)
def test_what_pytorch_lacks_is_named(made: Any, kind: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)):
        read_onnx(file_of(tmp_path / "x.onnx", [made], kind=kind))


def test_a_constant_without_a_value_and_an_output_that_is_stored_are_refused(tmp_path: Path) -> None:
    empty = [helper.make_node("Constant", [], ["c"]), node("Add", "x", "c")]
    with pytest.raises(InvalidInput, match="the constant 'c' holds no value"):
        read_onnx(file_of(tmp_path / "x.onnx", empty))
    with pytest.raises(InvalidInput, match="the output 'y' is a stored weight"):
        read_onnx(file_of(tmp_path / "x.onnx", [helper.make_node("Relu", ["x"], ["z"])], drawn(y=(2, 2))))


@pytest.mark.parametrize("damage", ["short", "linked"])
def test_damaged_weights_beside_a_file_are_refused(damage: str, tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.onnx", [node("MatMul", "x", "w")], drawn(w=(6, 6)))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    read_onnx(path)
    weights = tmp_path / "w.data"
    if damage == "short":
        weights.write_bytes(weights.read_bytes()[:50])
    else:
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match=r"x\.onnx: the weights beside it can't be read: .*'?w'?"):
        read_onnx(path)


@pytest.mark.parametrize("name", [b"MatMul", b"x\n", b"ww"])
def test_names_that_are_no_text_are_refused(name: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path / "x.onnx", [node("MatMul", "x", "ww")], drawn(ww=(6, 6)))
    content = path.read_bytes()
    assert name in content
    path.write_bytes(content.replace(name, b"\xe5" + name[1:]))
    for use in (read_onnx, inspect_file):
        with pytest.raises(InvalidInput, match=r"x\.onnx is damaged"):
            use(path)
    with contextlib.suppress(InvalidInput):  # names of weights are nothing to it
        OnnxRuntime().load(path, 1)
    assert not capfd.readouterr().out  # where programs read JSON


def test_bfloat16_weights_of_our_own_files_are_read(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(2, 64)
    result = lobo_fx.compile(model, example_inputs=x, progress=False)
    path = result.export(tmp_path / "model.onnx", storage="packed", values="bfloat16").path
    with torch.no_grad():
        found, whole = read_onnx(path)(x), model(x)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.bfloat16())
        torch.testing.assert_close(found, model(x), rtol=0, atol=1e-6)
        assert not torch.allclose(found, whole, rtol=0, atol=1e-4)


def test_an_input_may_be_named_self(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.onnx", [node("Relu", "x")])
    model = onnx.load(path)
    model.graph.input[0].name = model.graph.node[0].input[0] = "self"
    onnx.save(model, path)
    assert read_onnx(path)(self_=torch.ones(2, 4, 6)).shape == (2, 4, 6)


def test_a_quantized_file_is_refused(tmp_path: Path) -> None:
    result = lobo_fx.compile(
        nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)),
        [lobo_fx.passes.QuantizeStatic(kernels="all")],
        example_inputs=torch.randn(2, 16),
        calibration_data=[torch.randn(8, 16)],
        progress=False,
    )
    path = result.export(tmp_path / "q.onnx").path
    with pytest.raises(InvalidInput, match="is quantized already"):
        read_onnx(path)


def test_what_differs_from_onnx_runtime_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path / "x.onnx", [node("Relu", "x")])
    read_onnx(path)
    monkeypatch.setitem(OPERATORS, "Relu", lambda given, x: x.relu() * 1.001)
    with pytest.raises(InvalidInput, match=r"differs from ONNX Runtime by 1\.0e-03 of the range of 'y'"):
        read_onnx(path)
    monkeypatch.setitem(OPERATORS, "Relu", lambda given, x: x.relu() * 1.00001)
    read_onnx(path)


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.onnx", [node("Relu", "x")])
    with pytest.raises(InvalidInput, match=r"do not fit: .*; it takes x"):
        read_onnx(path, Inputs((), {"images": torch.ones(1, 4, 6)}))
    with pytest.raises(InvalidInput, match="ONNX Runtime refuses these inputs"):
        read_onnx(path, Inputs((torch.ones(1, 4, 7),)))


def test_names_that_python_lacks_are_made_ones_it_has(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input.1", "class.forward.weight"], ["y"], name="a")],
        "g",
        [helper.make_tensor_value_info("input.1", FLOAT, ("n", 3))],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones((3, 2), np.float32), "class.forward.weight")],
    )
    path = tmp_path / "x.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    module = read_onnx(path)
    assert isinstance(module, OnnxModule)
    assert [name for name, _ in module.named_parameters()] == ["class_.forward_.weight"]
    assert lobo_fx.trace(module, {"input_1": torch.ones(2, 3)}).signature.names == ("input_1",)
