"""Options beside a file: read back, refused where they are wrong, and loaded in three lines without the package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnxruntime import session_options
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.exporters.onnxruntime.session_options import SUFFIX, SavedOptions, read_options, write_options
from lobo_fx.exporters.onnxruntime.tuning import CHOICES, Options
from lobo_fx.files import written_beside

ROWS = torch.randn(2, 4)
SAVED = SavedOptions({"graph_optimization_level": 1, "enable_cpu_mem_arena": False, "intra_op_num_threads": 2})
ENTRY = "session.disable_prepacking"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    result = lobo_fx.compile(net, [], example_inputs=ROWS, progress=False)
    return result.export(tmp_path_factory.mktemp("exported") / "model.onnx").path


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported, tmp_path / "model.onnx"))


def used(path: Path, threads: int | None = None) -> Any:
    return OnnxRuntime().load(path, threads).handle.get_session_options()


def test_options_are_read_with_the_file_unless_it_is_another_now(model: Path) -> None:
    assert read_options(model) is None
    assert used(model).enable_cpu_mem_arena
    assert used(model).intra_op_num_threads == 1
    saved = SavedOptions(SAVED.options, {ENTRY: "1"})
    assert write_options(saved, model).name == "model.onnx.session.json"
    assert read_options(model) == saved
    assert OnnxRuntime().options_of(model) == str(saved)
    options = used(model)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert not options.enable_cpu_mem_arena
    assert options.get_session_config_entry(ENTRY) == "1"
    assert options.intra_op_num_threads == 2
    assert used(model, 1).intra_op_num_threads == 1
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    assert read_options(link) == saved
    model.write_bytes(model.read_bytes() + b"\x12\x00")  # another producer name
    assert read_options(model) is None
    assert used(model).enable_cpu_mem_arena


def test_a_kill_leaves_no_options_to_another_file(
    model: Path, killed_after: Callable[[int, Callable[[], object]], bool]
) -> None:
    """Options move first; until their model does, they are nobody's."""
    old, new = SAVED, SavedOptions({"enable_mem_pattern": False})
    write_options(old, model)
    first, second = model.read_bytes(), model.read_bytes() + b"\x12\x00"
    names = [f"{model.name}{SUFFIX}"]

    def written(content: bytes, saved: SavedOptions | None) -> None:
        with written_beside(model, names) as draft:
            (draft / model.name).write_bytes(content)
            if saved is not None:
                write_options(saved, draft / model.name)

    assert killed_after(0, lambda: written(second, new))
    assert read_options(model) == old
    assert killed_after(1, lambda: written(second, new))
    assert (model.read_bytes(), read_options(model)) == (first, None)
    assert not killed_after(2, lambda: written(second, new))
    assert (model.read_bytes(), read_options(model)) == (second, new)
    written(first, None)
    assert {file.name for file in model.parent.iterdir()} == {model.name}


def test_every_choice_may_be_saved_and_read(model: Path) -> None:
    options = [choice.saved for choice in CHOICES if isinstance(choice, Options)]
    assert len(options) > 5
    for saved in options:
        write_options(saved, model)
        assert read_options(model) == saved
        used(model)
    levels = {saved.options.get("graph_optimization_level", 99) for saved in options}
    assert min(levels) == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC.value


GOOD: dict[str, Any] = {"format": 1, "model": "0" * 16, "options": {}, "entries": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "holds a list"),
        ({}, "has format None; this version reads format 1"),
        (GOOD | {"format": 2}, "has format 2; this version reads format 1"),
        (GOOD | {"code": "import os"}, "has 'code'"),
        ({"format": 1, "model": "", "options": {}}, "lacks 'entries'"),
        (GOOD | {"options": []}, "holds options that are no object"),
        (
            GOOD | {"options": {"enable_mem_patern": True}},
            "unknown option 'enable_mem_patern'; did you mean enable_mem",
        ),
        (GOOD | {"options": {"optimized_model_filepath": "/x"}}, "unknown option 'optimized_model_filepath'"),
        (GOOD | {"options": {"enable_mem_pattern": 1}}, "has enable_mem_pattern = 1, which it may not be"),
        (GOOD | {"options": {"intra_op_num_threads": True}}, "has intra_op_num_threads = True"),
        (GOOD | {"options": {"graph_optimization_level": 0}}, "has graph_optimization_level = 0"),
        (GOOD | {"entries": {"ep.library": "x.so"}}, "unknown entry 'ep.library'"),
        (GOOD | {"entries": {ENTRY: True}}, f"has {ENTRY} = True"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(content: Any, message: str, model: Path) -> None:
    file = model.with_name("model.onnx.session.json")
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidInput, match=rf"model.onnx.session.json .*{message}") as refused:
        OnnxRuntime().load(model, 1)
    assert str(refused.value).endswith("Without that file, model.onnx runs with default options")


def test_three_lines_load_both_without_the_package(model: Path) -> None:
    """The lines of the docstring, as they stand there, in a process that can't import lobo_fx."""
    saved = SavedOptions(SAVED.options, {ENTRY: "1"})
    write_options(saved, model)
    lines = re.findall(r"^    (\S.*)$", session_options.__doc__ or "", re.MULTILINE)
    assert len(lines) == 3
    np.save(model.with_name("rows.npy"), ROWS.numpy())
    code = "\n".join(
        [
            "import json, sys, numpy, onnxruntime",
            "sys.modules['lobo_fx'] = None",
            *lines,
            "session = onnxruntime.InferenceSession('model.onnx', options)",
            "used = session.get_session_options()",
            f"found = [getattr(used, name) for name in {list(saved.options)}]",
            f"print([int(value) for value in found], used.get_session_config_entry('{ENTRY}'))",
            "numpy.save('outputs.npy', session.run(None, {session.get_inputs()[0].name: numpy.load('rows.npy')})[0])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=model.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[1, 0, 2] 1"
    name = OnnxRuntime().load(model, 1).inputs[0].name
    expected = OnnxRuntime().load(model, 1).run({name: ROWS.numpy()})[0]
    np.testing.assert_allclose(np.load(model.with_name("outputs.npy")), expected, rtol=0, atol=1e-6)


def test_what_a_run_refuses_is_raised_and_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Twin: at the log level of errors, ONNX Runtime prints it in red besides."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in ("x", "y"))
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [2, 3])
    node = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])
    graph = onnx.helper.make_graph([node], "reshape", [x], [y], [shape])
    opsets = [onnx.helper.make_opsetid("", 19)]
    onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=opsets), tmp_path / "reshape.onnx")
    arrays = {"x": np.zeros(5, np.float32)}
    with pytest.raises(Exception, match="cannot be reshaped"):
        OnnxRuntime().load(tmp_path / "reshape.onnx", 1).run(arrays)
    assert capfd.readouterr() == ("", "")
    loud = onnxruntime.SessionOptions()
    loud.log_severity_level = 3
    with pytest.raises(Exception, match="cannot be reshaped"):
        onnxruntime.InferenceSession(str(tmp_path / "reshape.onnx"), loud).run(None, arrays)
    assert "cannot be reshaped" in capfd.readouterr().err
