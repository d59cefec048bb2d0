"""The ONNX file: what it takes and gives, what is in it, and that a failed export leaves nothing behind."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lobo_fx
from lobo_fx import Artifact, ExportError, InvalidInput, Result
from lobo_fx.exporters.onnx.cleanup import clean
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime, OnnxRuntimeSession, kernels
from lobo_fx.passes import FoldBatchNorm, PruneChannels, PruneWeights, QuantizeStatic

Array = npt.NDArray[Any]
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(5))


class Function(nn.Module):
    """A model around a function; its input is called `x`."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def compiled(model: nn.Module, inputs: Any = ROWS, passes: Any = (), **settings: Any) -> Result:
    return lobo_fx.compile(model.eval(), passes, example_inputs=inputs, progress=False, **settings)


def run_file(artifact: Artifact, **inputs: torch.Tensor) -> list[Array]:
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def shape(value: Any) -> list[int | str]:
    return [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


def listing(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Artifact, Any]:
    """A small compiled network, its file, and the file's content."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    result = compiled(Function(model), IMAGES, [FoldBatchNorm()])
    artifact = result.export(tmp_path_factory.mktemp("exported") / "model.onnx")
    return result, artifact, onnx.load(artifact.path)


# What it takes and gives.


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_stays_free(exported: tuple[Result, Artifact, Any], rows: int) -> None:
    result, artifact, content = exported
    x = torch.randn(rows, 3, 8, 8)
    (found,) = run_file(artifact, x=x)
    expected = result.module(x).detach().numpy()
    assert found.shape == (rows, 5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert shape(content.graph.input[0]) == ["batch", 3, 8, 8]
    assert shape(content.graph.output[0]) == ["batch", 5]


def test_sizes_are_fixed_on_request(tmp_path: Path) -> None:
    result = compiled(nn.Linear(4, 3), dynamic_shapes=None)
    artifact = result.export(tmp_path / "model.onnx")
    content = onnx.load(artifact.path)
    assert shape(content.graph.input[0]) == [2, 4]
    assert shape(content.graph.output[0]) == [2, 3]
    (found,) = run_file(artifact, **{content.graph.input[0].name: ROWS})
    np.testing.assert_allclose(found, result.module(ROWS).detach().numpy(), rtol=0, atol=1e-6)
    with pytest.raises(Exception, match="invalid dimensions"):
        run_file(artifact, **{content.graph.input[0].name: ROWS[:1]})


def test_inputs_are_called_what_forward_calls_them() -> None:
    assert [spec.name for spec in compiled(nn.Linear(4, 3)).program.signature.inputs if spec] == ["input"]


@pytest.mark.parametrize("taken", ["x", "output"])
def test_a_parameter_gives_way_to_an_input_or_output_of_its_name(taken: str, tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(taken, nn.Parameter(torch.randn(4, 3)))

        def forward(self, x: torch.Tensor) -> Any:
            return x @ self.get_parameter(taken)

    result = compiled(Named())
    artifact = result.export(tmp_path / "model.onnx")
    graph = onnx.load(artifact.path).graph
    assert [*names(graph.input), *names(graph.output), *names(graph.initializer)] == ["x", "output", f"{taken}_1"]
    (found,) = run_file(artifact, x=ROWS)
    np.testing.assert_allclose(found, result.module(ROWS).detach().numpy(), rtol=0, atol=1e-6)


def test_a_parameter_that_gives_way_takes_no_inputs_name(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Parameter(torch.randn(4, 3))

        def forward(self, output_1: torch.Tensor) -> Any:
            return output_1 @ self.output

    graph = onnx.load(compiled(Named()).export(tmp_path / "model.onnx").path).graph
    assert [*names(graph.input), *names(graph.output), *names(graph.initializer)] == ["output_1", "output", "output_2"]


def test_positional_and_keyword_inputs_keep_their_order_and_names(tmp_path: Path) -> None:
    class Several(nn.Module):
        def forward(
            self, tokens: torch.Tensor, mask: torch.Tensor | None = None, *, scale: torch.Tensor
        ) -> dict[str, Any]:
            assert mask is not None
            values = (tokens * mask).float() * scale
            return {"logits": values, "states": {"first": values + 1, "others": [values + 2, tokens]}}

    tokens, mask, scale = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.int64), torch.tensor([0.5, 1, 2])
    result = compiled(Several(), {"tokens": tokens, "mask": mask, "scale": scale})
    artifact = result.export(tmp_path / "model.onnx")
    graph = onnx.load(artifact.path).graph
    assert names(graph.input) == ["tokens", "mask", "scale"]
    assert [value.type.tensor_type.elem_type for value in graph.input] == [
        TensorProto.INT64,
        TensorProto.INT64,
        TensorProto.FLOAT,
    ]
    assert names(graph.output) == ["logits", "states.first", "states.others.0", "states.others.1"]
    logits, first, second, back = run_file(artifact, tokens=tokens, mask=mask, scale=scale)
    np.testing.assert_array_equal(logits, (tokens * scale).numpy())
    np.testing.assert_array_equal(first, logits + 1)
    np.testing.assert_array_equal(second, logits + 2)
    np.testing.assert_array_equal(back, tokens.numpy())


def test_fields_of_a_model_output_become_names(tmp_path: Path) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Encoder(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return outputs.BaseModelOutput(last_hidden_state=2 * x, hidden_states=(x, x + 1))

    artifact = compiled(Encoder()).export(tmp_path / "model.onnx")
    assert names(onnx.load(artifact.path).graph.output) == [
        "last_hidden_state",
        "hidden_states.0",
        "hidden_states.1",
    ]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: {"x": 2 * x, "y": x + 1}, ["x_out", "y"]),
        (lambda x: (x, x), ["output_0", "output_1"]),
        (lambda x: (2 * x, None), ["output_0"]),
    ],
    ids=["named_as_the_input", "the_input_twice", "none"],
)
def test_any_structure_of_outputs_is_written(
    function: Callable[[torch.Tensor], Any], expected: list[str], tmp_path: Path
) -> None:
    artifact = compiled(Function(function)).export(tmp_path / "model.onnx")
    assert names(onnx.load(artifact.path).graph.output) == expected
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(function(ROWS)) if leaf is not None]
    for one, other in zip(run_file(artifact, x=ROWS), leaves, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_the_runtime_has_no_kernels_for_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    result = compiled(nn.Linear(4, 3).to(dtype), ROWS.to(dtype))
    with pytest.raises(ExportError, match=f"'weight' is {str(dtype)[6:]}.*model.float()"):
        result.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16])
def test_inputs_of_any_type_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    x = (4 * ROWS.abs()).to(dtype)
    artifact = compiled(Function(lambda x: x.float() + 1), x).export(tmp_path / "model.onnx")
    np.testing.assert_array_equal(run_file(artifact, x=x)[0], x.float().numpy() + 1)


# What is in it.


def test_metadata_say_what_was_done(exported: tuple[Result, Artifact, Any]) -> None:
    _, _, content = exported
    found = {entry.key: entry.value for entry in content.metadata_props}
    assert found["lobo_fx.version"] == lobo_fx.__version__
    assert found["lobo_fx.model"] == "Function"
    assert json.loads(found["lobo_fx.passes"]) == [["fold_batch_norm", {}]]
    assert found["torch.version"] == torch.__version__
    assert json.loads(found["lobo_fx.signature"]) == {
        "inputs": ["x: float32[batch, 3, 8, 8]"],
        "outputs": ["output: float32[batch, 5]"],
    }
    assert content.producer_name == "lobo-fx"
    assert content.producer_version == lobo_fx.__version__


def test_settings_of_passes_are_in_the_metadata() -> None:
    result = compiled(nn.Linear(4, 3), passes=[PruneWeights(0.25, scope="global")])
    settings = {"amount": 0.25, "scope": "global"}
    assert json.loads(result.metadata()["lobo_fx.passes"]) == [["prune_weights", settings]]


def test_nothing_of_the_machine_it_was_made_on_is_left_in_it(exported: tuple[Result, Artifact, Any]) -> None:
    _, artifact, content = exported
    data = artifact.path.read_bytes()
    for trace in (b"File ", b".py", b"site-packages", os.fsencode(Path(__file__).parent), b"pkg.torch", b"Traceback"):
        assert trace not in data, trace
    assert not any(node.doc_string for node in content.graph.node)
    assert {entry.key for node in content.graph.node for entry in node.metadata_props} <= {"namespace"}
    weights = 4 * (3 * 4 * 9 + 4 + 144 * 5 + 5)
    assert len(data) < weights + 4000


def test_parameters_keep_their_names(exported: tuple[Result, Artifact, Any]) -> None:
    result, _, content = exported
    stored = {entry.name: numpy_helper.to_array(entry) for entry in content.graph.initializer}
    for name, tensor in result.module.state_dict().items():
        np.testing.assert_array_equal(stored[name], tensor.numpy())


def test_the_artifact_describes_the_file(exported: tuple[Result, Artifact, Any]) -> None:
    result, artifact, content = exported
    assert artifact.files == (artifact.path,)
    assert artifact.path.is_absolute()
    assert artifact.bytes == artifact.path.stat().st_size
    assert artifact.details["opset"] == next(entry.version for entry in content.opset_import if not entry.domain)
    assert 0 <= artifact.parity < 1e-5
    assert result.report.artifacts == {"compiled": artifact}
    assert listing(artifact.path.parent) == {"model.onnx"}
    onnx.checker.check_model(content, full_check=True)


def test_the_opset_is_the_one_that_was_chosen(tmp_path: Path) -> None:
    artifact = compiled(nn.Linear(4, 3)).export(tmp_path / "model.onnx", OnnxExporter(opset=23))
    content = onnx.load(artifact.path)
    assert [entry.version for entry in content.opset_import if not entry.domain] == [23]
    assert artifact.details["opset"] == 23


@pytest.mark.parametrize("opset", [13, 99])
def test_an_opset_that_can_not_be_written_is_an_error(opset: int, tmp_path: Path) -> None:
    with pytest.raises(lobo_fx.LoboError, match="opset"):
        compiled(nn.Linear(4, 3)).export(tmp_path / "model.onnx", OnnxExporter(opset=opset))
    assert listing(tmp_path) == set()


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 32)
        self.lm_head = nn.Linear(32, 200, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.lm_head(torch.tanh(self.embedding(tokens)))


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    tokens = torch.arange(6).view(2, 3)
    model = Tied()
    artifact = compiled(model, tokens).export(tmp_path / "model.onnx")
    stored = onnx.load(artifact.path).graph.initializer
    assert sum(int(np.prod(entry.dims)) == 200 * 32 for entry in stored) == 1
    assert artifact.bytes < 1.2 * 4 * 200 * 32
    np.testing.assert_allclose(run_file(artifact, tokens=tokens)[0], model(tokens).detach().numpy(), atol=1e-5)


def test_weights_go_to_a_file_beside_on_request(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 3))
    result = compiled(Function(model))
    artifact = result.export(tmp_path / "big.onnx", OnnxExporter(external_data=True))
    (weights,) = tmp_path.glob("big.onnx.*.data")
    assert listing(tmp_path) == {"big.onnx", weights.name}
    assert set(artifact.files) == {tmp_path / "big.onnx", weights}
    assert artifact.path == tmp_path / "big.onnx"
    assert artifact.bytes == sum((tmp_path / name).stat().st_size for name in listing(tmp_path))
    assert weights.stat().st_size >= 4 * (4 * 300 + 300 * 3)
    assert (tmp_path / "big.onnx").stat().st_size < 4000
    content = onnx.load(artifact.path, load_external_data=False)
    places = {e.value for w in content.graph.initializer for e in w.external_data if e.key == "location"}
    assert places == {weights.name}
    expected = result.module(ROWS).detach().numpy()
    np.testing.assert_allclose(run_file(artifact, x=ROWS)[0], expected, rtol=0, atol=1e-5)
    together = result.export(tmp_path / "small.onnx")
    assert together.files == (tmp_path / "small.onnx",)
    # without its weights the file is worth nothing
    weights.unlink()
    with pytest.raises(Exception, match=weights.name):
        run_file(artifact, x=ROWS)


def test_a_kill_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, killed_after: Callable[[int, Callable[[], object]], bool]
) -> None:
    """One structure, two sets of weights: a mixture would load and compute nonsense."""
    apart = OnnxExporter(external_data=True)
    old, new = (compiled(Function(nn.Linear(4, 300))) for _ in range(2))
    artifact = old.export(tmp_path / "model.onnx", apart)
    killed, steps = True, 0
    while killed:
        killed = killed_after(steps, lambda: new.export(artifact.path, apart))
        expected = (old if killed else new).module(ROWS).detach().numpy()
        np.testing.assert_allclose(run_file(artifact, x=ROWS)[0], expected, rtol=0, atol=1e-5)
        steps += killed
    assert steps >= 2, "it was killed before the weights moved, and between them and the model"
    assert len(listing(tmp_path)) == 2, "weights that nothing refers to are left"


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link.onnx").symlink_to("store/real.onnx")
    artifact = compiled(nn.Linear(4, 3)).export(tmp_path / "link.onnx", OnnxExporter(external_data=True))
    assert (tmp_path / "link.onnx").is_symlink()
    assert artifact.path == tmp_path / "store" / "real.onnx"
    assert artifact.path.is_file()


# Operators that ONNX does not have.


@torch.library.custom_op("lobo_fx_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


@triple.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class UsesTriple(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return triple(x) + 1  # the line that the error must show


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), UsesTriple())

    def forward(self, x: torch.Tensor) -> Any:
        return self.encoder(x)


def times_three(x: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Mul(x, op.Constant(value_float=3.0))


def times_four(x: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Mul(x, op.Constant(value_float=4.0))


def test_an_operator_without_an_onnx_form_is_named_with_module_and_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        compiled(Outer()).export(tmp_path / "model.onnx")
    message = str(caught.value)
    assert "lobo_fx_tests.triple.default" in message
    assert "'encoder.1'" in message
    assert "test_exporter.py" in message
    assert "the line that the error must show" in message
    assert "translations=" in message
    assert listing(tmp_path) == set()


def test_a_translation_makes_the_operator_known(tmp_path: Path) -> None:
    result = compiled(Outer())
    exporter = OnnxExporter(translations={torch.ops.lobo_fx_tests.triple.default: times_three})
    artifact = result.export(tmp_path / "model.onnx", exporter)
    for rows in (1, 3):
        x = torch.randn(rows, 4)
        np.testing.assert_allclose(run_file(artifact, x=x)[0], result.module(x).detach().numpy(), atol=1e-6)


def test_a_wrong_translation_is_caught_and_leaves_nothing(tmp_path: Path) -> None:
    exporter = OnnxExporter(translations={torch.ops.lobo_fx_tests.triple.default: times_four})
    with pytest.raises(ExportError, match="differ from PyTorch's"):
        compiled(Outer()).export(tmp_path / "model.onnx", exporter)
    assert listing(tmp_path) == set()


# What goes wrong leaves nothing.


def test_a_wrong_runtime_leaves_nothing_and_an_old_file_in_peace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compiled(Function(nn.Linear(4, 3)))
    path = tmp_path / "model.onnx"
    first = result.export(path, OnnxExporter(external_data=True))
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    right = OnnxRuntimeSession.run

    def slightly_wrong(session: OnnxRuntimeSession, feed: Any) -> list[Array]:
        return [1.01 * output for output in right(session, feed)]

    monkeypatch.setattr(OnnxRuntimeSession, "run", slightly_wrong)
    with pytest.raises(ExportError, match="differ"):
        result.export(path, OnnxExporter(external_data=True))
    with pytest.raises(ExportError, match="differ"):
        result.export(tmp_path / "other.onnx")
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before
    assert result.report.artifacts == {"compiled": first}


def test_a_row_more_than_the_example_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is right for the rows it was traced with alone is not let through."""
    right = OnnxRuntimeSession.run
    seen = []

    def wrong_for_three(session: OnnxRuntimeSession, feed: Any) -> list[Array]:
        rows = len(next(iter(feed.values())))
        seen.append(rows)
        return [output + (rows == 3) for output in right(session, feed)]

    monkeypatch.setattr(OnnxRuntimeSession, "run", wrong_for_three)
    with pytest.raises(ExportError, match="differ"):
        compiled(nn.Linear(4, 3)).export(tmp_path / "model.onnx")
    assert seen == [2, 3]


def test_a_file_that_does_not_load_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(model: Any) -> None:
        model.graph[0].op_type = "NoSuchOperator"

    monkeypatch.setattr("lobo_fx.exporters.onnx.exporter.clean", corrupt)
    with pytest.raises(ExportError, match="not valid for ONNX Runtime"):
        compiled(nn.Linear(4, 3)).export(tmp_path / "model.onnx")
    assert listing(tmp_path) == set()


def test_a_path_that_can_not_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compiled(nn.Linear(4, 3))

    def no_work(*args: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(OnnxExporter, "_translate", no_work)
    with pytest.raises(InvalidInput, match="does not exist"):
        result.export(tmp_path / "missing" / "model.onnx")
    with pytest.raises(InvalidInput, match="is a folder"):
        result.export(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InvalidInput, match="not writable"):
        result.export(tmp_path / "model.onnx")
    assert listing(tmp_path) == set()
    assert result.report.artifacts == {}


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="did you mean onnx"):
        compiled(nn.Linear(4, 3)).export(tmp_path / "model.onnx", "onxx")


def test_the_original_is_exported_beside_the_compiled_model(tmp_path: Path) -> None:
    model = Function(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    result = compiled(model, passes=[FoldBatchNorm()])
    compiled_file = result.export(tmp_path / "compiled.onnx")
    original_file = result.export_original(tmp_path / "original.onnx")
    assert list(result.report.artifacts) == ["original", "compiled"]
    assert result.report.artifacts["original"] is original_file
    for artifact in (compiled_file, original_file):
        np.testing.assert_allclose(run_file(artifact, x=ROWS)[0], model(ROWS).detach().numpy(), atol=1e-5)


# Transposes of quantized weights.


def weight_graph(*, axis: int | None = 0, perm: list[int] | None = None, uses: str = "") -> tuple[Any, Array]:
    """`x @ transpose(dequantize(W))`, as `torch.onnx` writes a linear layer; and what it must give for x = 1."""
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (5, 4), dtype=np.int8)
    per_channel = axis is not None
    scale = generator.uniform(0.01, 0.1, weight.shape[axis or 0] if per_channel else ()).astype(np.float32)
    zero = np.zeros(scale.shape, np.int8)
    settings: dict[str, Any] = {"axis": axis} if per_channel else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["W", "scale", "zero"], ["D"], **settings),
        helper.make_node("Transpose", ["D"], ["T"], perm=perm or [1, 0]),
        helper.make_node("MatMul", ["x", "T"], ["y"]),
    ]
    more: dict[str, list[int]] = {}
    if uses == "read_twice":
        nodes.append(helper.make_node("ReduceSum", ["D"], ["z"], keepdims=0))
        more = {"z": []}
    elif uses == "weight_read_twice":
        nodes.append(helper.make_node("DequantizeLinear", ["W", "scale", "zero"], ["z"], **settings))
        more = {"z": [5, 4]}
    elif uses == "given_out":
        more = {"D": [5, 4]}
    elif uses == "transposed_given_out":
        more = {"T": [4, 5]}
    elif uses == "default_order":
        del nodes[1].attribute[:]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in more.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]
    stored = [numpy_helper.from_array(array, name) for array, name in ((weight, "W"), (scale, "scale"), (zero, "zero"))]
    if uses == "computed":
        stored = stored[1:]
        inputs.append(helper.make_tensor_value_info("W", TensorProto.INT8, [5, 4]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model, weight


def run_model(model: Any, weight: Array | None) -> list[Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed: dict[str, Array] = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    if weight is not None:
        feed["W"] = weight
    return [np.asarray(output) for output in session.run(None, feed)]


def cleaned(model: Any) -> Any:
    intermediate = ir.from_proto(model)
    clean(intermediate)
    content = ir.to_proto(intermediate)
    onnx.checker.check_model(content)
    return content


@pytest.mark.parametrize(("axis", "uses"), [(0, ""), (1, ""), (-1, ""), (-2, ""), (None, ""), (0, "default_order")])
def test_a_transposed_weight_is_stored_transposed(axis: int | None, uses: str) -> None:
    model, weight = weight_graph(axis=axis, uses=uses)
    content = cleaned(model)
    assert [node.op_type for node in content.graph.node] == ["DequantizeLinear", "MatMul"]
    stored = {entry.name: numpy_helper.to_array(entry) for entry in content.graph.initializer}
    np.testing.assert_array_equal(stored["W"], weight.T)
    # the order spelled out: ONNX Runtime multiplies integers only where it sees which transpose it is
    reference, _ = weight_graph(axis=axis)
    for one, other in zip(run_model(content, None), run_model(reference, None), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("uses", ["read_twice", "weight_read_twice", "given_out", "transposed_given_out", "computed"])
def test_other_readers_of_the_weight_see_what_they_saw(uses: str) -> None:
    model, weight = weight_graph(uses=uses)
    content = cleaned(model)
    fed = weight if uses == "computed" else None
    found, expected = run_model(content, fed), run_model(model, fed)
    assert [one.shape for one in found] == [other.shape for other in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    if uses != "transposed_given_out":
        assert [node.op_type for node in content.graph.node].count("Transpose") == 1


def test_a_permutation_that_is_no_transposition_is_folded_right() -> None:
    model, _ = weight_graph(perm=[0, 1])
    model.graph.node[2].input[0] = "x5"
    model.graph.input[0].name = "x5"
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    content = cleaned(model)
    x = {"x5": np.arange(10, dtype=np.float32).reshape(2, 5)}
    found, expected = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, x)[0]
        for m in (content, model)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_linear_layers_of_quantized_programs_need_no_transpose(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    result = compiled(model, passes=[QuantizeStatic(kernels="all")], calibration_data=[ROWS])
    content = onnx.load(result.export(tmp_path / "model.onnx").path)
    assert "Transpose" not in [node.op_type for node in content.graph.node]


def test_integer_layers_cost_nine_bytes_a_channel_beside_their_weights(tmp_path: Path) -> None:
    """A bias, a scale, and a byte for the weights' zero point; of a bias, neither scales nor zero points."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 40, 3))
    images = torch.randn(2, 3, 8, 8)
    result = compiled(model, images, passes=[QuantizeStatic(kernels="all")], calibration_data=[images])
    content = onnx.load(result.export(tmp_path / "model.onnx").path)
    vectors = [numpy_helper.to_array(tensor) for tensor in content.graph.initializer if len(tensor.dims) == 1]
    assert sum(vector.nbytes for vector in vectors) == 9 * (16 + 40)
    stored = {tensor.name for tensor in content.graph.initializer}
    assert not stored & {value.name for value in content.graph.value_info}


def test_constants_that_are_not_listed_are() -> None:
    """As `torch.onnx` leaves them when it fuses clamps."""
    x, low = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in (("x", [2]), ("low", []))
    )
    low.const_value = ir.tensor(np.float32(0.5), name="low")
    clip = ir.node("Clip", [x, low])
    clip.outputs[0].name = "y"
    model = ir.Model(ir.Graph([x], clip.outputs, nodes=[clip], opset_imports={"": 20}), ir_version=10)
    clean(model)
    assert list(model.graph.initializers) == ["low"]


@pytest.mark.parametrize(
    ("shape", "masked"),
    [
        ((6, 5, 8), False),
        ((2, 3, 4, 5, 8), True),
        pytest.param((6, 5, 8), True, marks=pytest.mark.slow),
        pytest.param((2, 3, 5, 8), False, marks=pytest.mark.slow),
        pytest.param((2, 3, 5, 8), True, marks=pytest.mark.slow),
        pytest.param((2, 3, 4, 5, 8), False, marks=pytest.mark.slow),
    ],
)
def test_attention_over_any_number_of_dimensions(shape: tuple[int, ...], masked: bool, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            mask = x @ x.mT if masked else None
            return nn.functional.scaled_dot_product_attention(x, x.flip(0), x + 1, attn_mask=mask)

    result = lobo_fx.compile(Attention(), example_inputs=torch.randn(shape), progress=False)
    assert result.export(tmp_path / "model.onnx").parity < 1e-5


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((6, 5, 8), (5, 5)),
        pytest.param((6, 5, 8), (1, 5, 5), marks=pytest.mark.slow),
        ((2, 3, 4, 5, 8), (5, 5)),
        pytest.param((2, 3, 4, 5, 8), (4, 5, 5), marks=pytest.mark.slow),
        pytest.param((2, 3, 4, 5, 8), (1, 4, 5, 5), marks=pytest.mark.slow),
        ((2, 3, 4, 5, 8), (1, 1, 4, 5, 5)),
    ],
)
def test_attention_under_a_mask_that_is_broadcast(
    shape: tuple[int, ...], mask: tuple[int, ...], tmp_path: Path
) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.randn(mask))
            self.mask: torch.Tensor

        def forward(self, x: torch.Tensor) -> Any:
            return nn.functional.scaled_dot_product_attention(x, x.flip(-1), x + 1, attn_mask=self.mask)

    result = lobo_fx.compile(Attention(), example_inputs=torch.randn(shape), progress=False)
    assert result.export(tmp_path / "model.onnx").parity < 1e-5


def test_a_matrix_and_its_transposed_of_another_type_are_both_stored(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low: torch.Tensor
            self.high: torch.Tensor
            self.register_buffer("low", torch.ones(8, 8).tril())
            self.register_buffer("high", torch.ones(8, 8, dtype=torch.bool).triu())

        def forward(self, x: torch.Tensor) -> Any:
            return torch.where(self.high, x @ self.low, x)

    result = lobo_fx.compile(Masked(), example_inputs=torch.randn(3, 8, 8), progress=False)
    assert result.export(tmp_path / "model.onnx").parity < 1e-5


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: (2 * x, 3), "output 1 is 3, no tensor"),
        (lambda x: (2 * x, x.shape[0]), "output 1 is"),
        (lambda x: None, "returns no tensor"),
    ],
    ids=["constant", "size", "nothing"],
)
def test_outputs_that_a_file_can_not_hold_are_refused(
    function: Callable[[torch.Tensor], Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(lobo_fx.LoboError, match=words):
        compiled(Function(function)).export(tmp_path / "model.onnx")
    assert listing(tmp_path) == set()


@pytest.mark.slow
def test_a_package_that_is_not_installed_is_no_warning() -> None:
    script = """
        import importlib.util, sys

        import torch

        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: None if name == "torchvision" else find(name, *args)

        from lobo_fx.exporters.onnx.translations import is_translated

        assert is_translated(torch.ops.aten.relu.default, {})
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert not subprocess.run(command, check=True, capture_output=True, text=True).stderr


def test_a_file_that_is_only_measured_need_not_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = lobo_fx.trace(nn.Linear(4, 3).eval(), torch.randn(2, 4))
    whole = OnnxExporter().export(program, tmp_path / "whole.onnx", {})
    monkeypatch.setattr("lobo_fx.exporters.onnx.exporter._check", None)
    quick = OnnxExporter(compare=False).export(program, tmp_path / "quick.onnx", {})
    assert not math.isnan(whole.parity)
    assert math.isnan(quick.parity)
    assert onnx.load(tmp_path / "quick.onnx").graph == onnx.load(tmp_path / "whole.onnx").graph


def uneven(kind: str, after: nn.Module) -> nn.Module:
    """Three layers; the channels of the second's weight are of very different sizes, which one scale can't tell."""
    torch.manual_seed(0)
    middle = nn.Conv2d(3, 3, 3, padding=1) if kind == "Conv" else nn.ConvTranspose2d(3, 3, 3, padding=1)
    with torch.no_grad():
        middle.weight *= torch.tensor([1e-3, 3e-2, 1.0]).view((-1, 1, 1, 1) if kind == "Conv" else (1, -1, 1, 1))
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), middle, after, nn.Conv2d(3, 3, 3, padding=1)).eval()


@pytest.mark.parametrize(
    ("kind", "after"),
    [("Conv", nn.Identity()), ("Conv", nn.ReLU()), ("Conv", nn.MaxPool2d(2)), ("ConvTranspose", nn.Identity())],
)
def test_a_float_layer_between_integer_ones_stays_float(
    kind: str, after: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime quantizes such weights by itself, with one scale. Twin: where it sees the layer, it does."""
    quantizing = QuantizeStatic(kernels="all", overrides={"1": "float"})
    given: dict[str, Any] = {"example_inputs": IMAGES, "calibration_data": [IMAGES], "progress": False}
    result = lobo_fx.compile(uneven(kind, after), [quantizing], **given)
    kept = result.export(tmp_path / "kept.onnx", confirm=False)
    assert kept.parity < 1e-6
    assert kernels(kept.path)[kind] == 1
    monkeypatch.setattr("lobo_fx.exporters.onnx.cleanup.keep_float", lambda model: None)
    OnnxExporter(compare=False).export(result.program, tmp_path / "seen.onnx", {})
    (spec,) = result.program.signature.inputs
    assert spec is not None
    arrays = {spec.name: IMAGES.numpy()}
    (float_one,), (integer,) = (
        OnnxRuntime().load(tmp_path / f"{name}.onnx", 1).run(arrays) for name in ("kept", "seen")
    )
    assert np.abs(float_one - integer).max() > 1e-3 * np.abs(float_one).max()


class Modulated(nn.Module):
    """Weights of each sample's own: the batch becomes the groups of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(10, 8, 3, 3)), nn.Conv2d(10, 3, 1)

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> Any:
        rows, channels, height, width = x.shape
        weight = (self.weight * style[:, None, :, None, None]).view(rows * 10, channels, 3, 3)
        mixed = nn.functional.conv2d(x.reshape(1, rows * channels, height, width), weight, padding=1, groups=rows)
        return self.last(mixed.view(rows, 10, height, width))


def test_a_free_number_of_groups_is_refused_by_name_and_locks_with_a_reason(tmp_path: Path) -> None:
    inputs = torch.randn(3, 8, 6, 6), torch.randn(3, 8)
    compiled = functools.partial(
        lobo_fx.compile, Modulated(), [PruneChannels(0.5)], example_inputs=inputs, progress=False
    )
    free = compiled()
    assert any("aten.conv2d.default: its axis rule fails (its groups is a size" in note for note in free.report.notes)
    with pytest.raises(ExportError, match=r"conv2d.* has a free number of groups, .* dynamic_shapes=None"):
        free.export(tmp_path / "free.onnx")
    fixed = compiled(dynamic_shapes=None)
    assert fixed.report.rows[-1].parameters < fixed.report.rows[0].parameters
    fixed.export(tmp_path / "fixed.onnx")
