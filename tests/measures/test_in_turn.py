"""Sessions in processes of their own, and files compared in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.exporters.onnxruntime.session_options import SavedOptions, write_options
from lobo_fx.measures.apart import session_apart
from lobo_fx.measures.in_turn import Comparison, Stand
from lobo_fx.plugins.protocols import ArraySpec

TINY = {name: np.full(4, 1e-20, np.float32) for name in ("a", "b")}


def product(path: Path) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "aby"]
    graph = helper.make_graph([helper.make_node("Mul", ["a", "b"], ["y"])], "product", values[:2], values[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_a_session_apart_computes_the_same_with_options_that_hold_for_a_whole_process(tmp_path: Path) -> None:
    path = product(tmp_path / "product.onnx")
    with session_apart(path, OnnxRuntime()) as session:
        assert session.inputs == [ArraySpec("a", "float32", (4,)), ArraySpec("b", "float32", (4,))]
        np.testing.assert_array_equal(session.run(TINY)[0], TINY["a"] * TINY["b"])
        assert 0 < session.seconds(3) < 1
        assert 0 < session.seconds(3, cpu=True) < 1
        with pytest.raises(RuntimeError, match="'b'"):
            session.run({"a": TINY["a"]})
        np.testing.assert_array_equal(session.run(TINY)[0], TINY["a"] * TINY["b"])
    assert session.process.returncode is not None
    write_options(SavedOptions(entries={"session.set_denormal_as_zero": "1"}), path)
    with session_apart(path, OnnxRuntime(), core=5) as session:
        assert not session.run(TINY)[0].any()
    assert (TINY["a"] * TINY["b"]).all(), "this process computes as before"


def test_a_file_that_can_not_be_loaded_says_why(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(InvalidInput, match=r"bad.onnx can't be loaded in a fresh process: .*ONNX Runtime can't load"):
        session_apart(path, OnnxRuntime()).__enter__()


def test_files_are_compared_in_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = product(tmp_path / "product.onnx")
    monkeypatch.setattr("lobo_fx.measures.in_turn._SECONDS", 0.01)
    found = Stand(OnnxRuntime(), TINY).compare(path, path, rounds=2)
    assert len(found.rounds) == 2
    assert all(ratio > 0 for ratio in found.rounds)
    with pytest.raises(InvalidInput, match="it does not run: "):
        Stand(OnnxRuntime(), {"a": TINY["a"]}).compare(path, path, rounds=1)


def test_rounds_that_can_not_turn_the_result_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([0.9, 1.1, 0.99, 0.5, 0.5])
    monkeypatch.setattr(Stand, "_round", lambda self, files, index: [1.0, next(ratios)])
    stand = Stand(OnnxRuntime(), TINY)
    assert stand.compare(Path(), Path(), rounds=3, limit=0.98).rounds == (0.9, 1.1, 0.99)
    assert stand.compare(Path(), Path(), rounds=2, limit=0.4).rounds == (0.5, 0.5)
    ratios = iter([1.0, 1.0, 0.5, 0.9, 0.9])
    assert stand.compare(Path(), Path(), rounds=3, limit=0.98).rounds == (1.0, 1.0)
    assert stand.compare(Path(), Path(), rounds=3).rounds == (0.5, 0.9, 0.9)


def test_most_rounds_decide() -> None:
    assert Comparison((0.9, 1.2, 0.95)).ratio == 0.95
    assert Comparison((0.9, 1.2, 1.01)).ratio == 1.01
    assert Comparison((0.9, 1.2, 1.01)).spread == pytest.approx(0.2)
