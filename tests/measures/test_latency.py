"""Latency: what is counted, in which order, and what the figures are; with fake clocks, never real ones."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lobo_fx
import lobo_fx.measures.latency
from lobo_fx import InvalidInput, LoboError
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime, kernels
from lobo_fx.measures.latency import Benchmark, Latency, benchmark, benchmark_table, interleave, random_arrays
from lobo_fx.measures.memory import peak_memory
from lobo_fx.plugins.protocols import ArraySpec
from lobo_fx.plugins.registry import RUNTIMES

Array = npt.NDArray[Any]


def write_product(path: Path, sizes: tuple[int, int] = (4, 3), name: str = "x", rows: str | int = "batch") -> Path:
    """An ONNX file that multiplies its input by random weights."""
    weight = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", [name, "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, sizes[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, sizes[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {"first": write_product(tmp_path / "a.onnx"), "second": write_product(tmp_path / "b.onnx")}


class Clock:
    """Stands in for the module `time`: moves only when a fake session runs."""

    def __init__(self) -> None:
        self.wall = self.cpu = 100.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu


class FakeSession:
    """Takes a given time a call, and notes who was called with what."""

    def __init__(self, label: str, times: Iterator[float], clock: Clock, calls: list[tuple[str, Any]]) -> None:
        self.label, self.times, self.clock, self.calls = label, times, clock, calls
        self.inputs = [ArraySpec("x", "float32", (None, 4)), ArraySpec("tokens", "int64", (None, 2))]

    def run(self, arrays: Mapping[str, Array]) -> list[Array]:
        self.calls.append((self.label, arrays))
        seconds = next(self.times)
        self.clock.wall += seconds
        self.clock.cpu += 2 * seconds
        return [arrays["x"]]


class FakeRuntime:
    """Every file's name says how many milliseconds each of its calls takes."""

    version = "fake 1.0"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.calls: list[tuple[str, Any]] = []
        self.loaded: list[tuple[str, int]] = []

    def load(self, path: Path, threads: int) -> Any:
        self.loaded.append((path.name, threads))
        times = (1e-3 * float(text) for text in path.read_text().split())
        return FakeSession(path.stem, times, self.clock, self.calls)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lobo_fx.measures.latency, "time", made)
    return made


def timed(tmp_path: Path, **times: list[float]) -> dict[str, Path]:
    """A file for the fake runtime per label."""
    for label, values in times.items():
        (tmp_path / f"{label}.times").write_text(" ".join(map(str, values)))
    return {label: tmp_path / f"{label}.times" for label in times}


def test_files_run_in_turn_and_warm_up_is_not_counted(clock: Clock, tmp_path: Path) -> None:
    runtime = FakeRuntime(clock)
    slow, fast = [900.0, 800.0, 6.0, 2.0, 4.0, 8.0], [700.0, 600.0, 3.0, 1.0, 1.0, 1.0]
    found = benchmark(
        timed(tmp_path, slow=slow, fast=fast),
        runtime,
        threads=3,
        batch=5,
        rounds=4,
        warmup=2,
        memory=False,
        progress=False,
    )
    assert [label for label, _ in runtime.calls] == ["slow", "fast"] * 6
    assert runtime.loaded == [("slow.times", 3), ("fast.times", 3)]
    assert (found.runtime, found.threads, found.batch, found.rounds) == ("fake 1.0", 3, 5, 4)
    assert list(found.latencies) == ["slow", "fast"]
    for label, counted in (("slow", slow[2:]), ("fast", fast[2:])):
        latency = found.latencies[label]
        assert latency.p50 == pytest.approx(statistics.median(counted), rel=1e-9)
        assert latency.cpu == pytest.approx(2 * statistics.median(counted), rel=1e-9)
        assert latency.p5 == pytest.approx(np.quantile(counted, 0.05), rel=1e-9)
        assert latency.p95 == pytest.approx(np.quantile(counted, 0.95), rel=1e-9)
        assert latency.throughput == pytest.approx(5 / (1e-3 * statistics.median(counted)), rel=1e-9)
        assert latency.memory is None
        assert latency.base_memory is None
    assert found.ratio("slow") == 1
    assert found.ratio("fast") == pytest.approx(statistics.median([3 / 6, 1 / 2, 1 / 4, 1 / 8]), rel=1e-9)


def test_no_warm_up_counts_from_the_first_call(clock: Clock, tmp_path: Path) -> None:
    runtime = FakeRuntime(clock)
    found = benchmark(
        timed(tmp_path, only=[8.0, 2.0]), runtime, rounds=2, warmup=0, memory=False, progress=False
    ).latencies["only"]
    assert found.p50 == pytest.approx(5)
    assert len(runtime.calls) == 2


def test_all_files_get_the_same_inputs(clock: Clock, tmp_path: Path) -> None:
    paths = timed(tmp_path, one=[1.0] * 4, other=[1.0] * 4)
    runtime = FakeRuntime(clock)
    benchmark(paths, runtime, batch=3, rounds=3, warmup=1, memory=False, progress=False)
    fed = [arrays for _, arrays in runtime.calls]
    assert all(arrays is fed[0] for arrays in fed)
    assert {name: (array.shape, str(array.dtype)) for name, array in fed[0].items()} == {
        "x": ((3, 4), "float32"),
        "tokens": ((3, 2), "int64"),
    }
    mine: dict[str, Array] = {"x": np.ones((3, 4), np.float32), "tokens": np.zeros((3, 2), np.int64)}
    runtime = FakeRuntime(clock)
    benchmark(paths, runtime, arrays=mine, batch=3, rounds=1, warmup=0, memory=False, progress=False)
    assert all(arrays is mine for _, arrays in runtime.calls)


def test_rows_of_a_fixed_batch_count(clock: Clock, tmp_path: Path) -> None:
    class Fixed(FakeRuntime):
        def load(self, path: Path, threads: int) -> Any:
            session = super().load(path, threads)
            session.inputs = [ArraySpec("x", "float32", (8, 4))]
            return session

    found = benchmark(timed(tmp_path, fixed=[4.0] * 3), Fixed(clock), rounds=2, warmup=1, memory=False, progress=False)
    assert found.batch == 8
    assert found.latencies["fixed"].throughput == pytest.approx(8 / 4e-3)


def test_rows_are_those_of_the_arrays_that_were_given(clock: Clock, tmp_path: Path) -> None:
    mine: dict[str, Array] = {"tokens": np.zeros((6, 2), np.int64), "x": np.ones((6, 4), np.float32)}
    found = benchmark(
        timed(tmp_path, only=[2.0]), FakeRuntime(clock), arrays=mine, rounds=1, warmup=0, memory=False, progress=False
    )
    assert found.batch == 6
    assert found.latencies["only"].throughput == pytest.approx(6 / 2e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": None}, "lacks the input 'x'; it has: tokens"),
        ({"x": np.ones((2, 5), np.float32)}, r"'x' is float32 \[2, 5\]; the file takes float32 \[any, 4\]"),
        ({"x": np.ones(4, np.float32)}, r"'x' is float32 \[4\]"),
        ({"x": np.ones((2, 4))}, r"'x' is float64 \[2, 4\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], words: str, clock: Clock, tmp_path: Path) -> None:
    given: dict[str, Any] = {"tokens": np.zeros((2, 2), np.int64), "x": np.ones((2, 4), np.float32)} | changes
    arrays = {name: array for name, array in given.items() if array is not None}
    runtime = FakeRuntime(clock)
    with pytest.raises(InvalidInput, match=words):
        benchmark(timed(tmp_path, only=[2.0]), runtime, arrays=arrays, memory=False, progress=False)
    assert runtime.calls == []


def test_ratios_are_those_of_the_latencies() -> None:
    one = Latency(p5=1.0, p50=2.0, p95=8.0, cpu=5.0, throughput=500.0, memory=100, base_memory=10)
    two = Latency(p5=3.0, p50=1.0, p95=4.0, cpu=20.0, throughput=1000.0, memory=50, base_memory=20)
    found = Benchmark("runtime", 1, 1, 10, {"one": one, "two": two})
    for name in ("p5", "p50", "p95", "cpu", "throughput", "memory", "base_memory"):
        assert found.ratio("two", name) == pytest.approx(getattr(two, name) / getattr(one, name))
        assert found.ratio("one", name) == 1
    assert found.ratio("two") == found.ratio("two", "cpu") == 4
    shown = str(found)
    assert "one" in shown
    assert "4.00" in shown


def test_functions_alone_can_be_timed(clock: Clock) -> None:
    order = []

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            clock.wall += seconds

        return run

    found = interleave({"a": call("a", 0.0004), "b": call("b", 0.004)}, rounds=3, warmup=1, rows=2)
    assert order == ["a", "a", "a", "b"] * 4  # a turn is a millisecond, or one call
    assert found["a"].p50 == pytest.approx(0.4)
    assert found["b"].throughput == pytest.approx(500)
    assert found["b"].cpu == 0


def test_ratios_of_processor_time_are_taken_round_by_round(clock: Clock) -> None:
    spent: dict[str, list[list[float]]] = {"long": [], "short": []}  # of each call, by round
    draw = np.random.default_rng(0)

    def call(name: str, milliseconds: float) -> Any:
        def run() -> None:
            taken = 1e-3 * milliseconds * float(draw.uniform(1, 4))
            if name == "long":
                spent["short"].append([])
                spent["long"].append([])
            spent[name][-1].append(taken)
            clock.wall += taken
            clock.cpu += taken

        return run

    calls = {"long": call("long", 2), "short": call("short", 0.2)}
    latencies = interleave(calls, rounds=11, warmup=1, rows=1)
    rounds = list(zip(spent["short"][1:], spent["long"][1:], strict=True))
    assert max(len(short) for short, _ in rounds) > 1
    expected = float(np.median([np.mean(short) / np.mean(long) for short, long in rounds]))
    found = Benchmark("none", 1, 1, 11, latencies)
    assert found.ratio("short") == pytest.approx(expected)
    assert found.ratio("long") == 1
    medians = latencies["short"].p50 / latencies["long"].p50
    assert found.ratio("short", "p50") == medians
    assert abs(medians / expected - 1) > 0.01


# ONNX Runtime.


def test_two_files_are_measured_in_one_run(files: dict[str, Path]) -> None:
    found = benchmark(files, OnnxRuntime(), batch=2, rounds=5, warmup=1, memory=False, progress=False)
    assert found.runtime.startswith("onnxruntime ")
    assert list(found.latencies) == ["first", "second"]
    for latency in found.latencies.values():
        assert 0 < latency.p5 <= latency.p50 <= latency.p95
        assert latency.cpu > 0
        assert latency.throughput == pytest.approx(2 / (1e-3 * latency.p50))
    assert found.ratio("second", "p50") == found.latencies["second"].p50 / found.latencies["first"].p50


def test_a_session_says_what_it_takes_and_runs_it(files: dict[str, Path]) -> None:
    session = OnnxRuntime().load(files["first"], 1)
    assert session.inputs == [ArraySpec("x", "float32", (None, 4))]
    weight = numpy_helper.to_array(onnx.load(files["first"]).graph.initializer[0])
    x = np.ones((2, 4), np.float32)
    (y,) = session.run({"x": x, "more": x})
    np.testing.assert_allclose(y, x @ weight, rtol=1e-5)
    assert kernels(files["first"]) == {"MatMul": 1}


@pytest.mark.parametrize(
    "numbers",
    [
        {"threads": 0},
        {"threads": -1},
        {"rounds": 1.5},
        {"batch": 0},
        {"rounds": 0},
        {"rounds": -5},
        {"batch": -1},
        {"warmup": -1},
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers: dict[str, int], files: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"rounds": 2, "warmup": 0, "memory": False, "progress": False, **numbers}
    with pytest.raises(InvalidInput, match=f"{next(iter(numbers))} is {next(iter(numbers.values()))}"):
        benchmark(files, OnnxRuntime(), **settings)


def test_a_result_refuses_them_before_it_writes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    result = lobo_fx.compile(nn.Linear(4, 3), example_inputs=torch.randn(2, 4), progress=False)
    monkeypatch.setattr(lobo_fx.Result, "_write", pytest.fail)
    wrong: list[dict[str, Any]] = [{"threads": 0}, {"batch": 0}, {"rounds": 0}, {"warmup": -1}]
    for numbers in wrong:
        with pytest.raises(InvalidInput, match=f"{next(iter(numbers))} is"):
            result.benchmark(**numbers)


def test_a_session_refuses_less_than_no_threads(files: dict[str, Path]) -> None:
    with pytest.raises(InvalidInput, match="threads is -1"):
        OnnxRuntime().load(files["first"], -1)


@pytest.mark.parametrize("content", [b"", b"hello", "half"])
def test_a_damaged_file_is_named(content: bytes | str, files: dict[str, Path]) -> None:
    path = files["first"]
    path.write_bytes(path.read_bytes()[:-20] if isinstance(content, str) else content)
    with pytest.raises(InvalidInput, match=r"a\.onnx"):
        benchmark(files, OnnxRuntime(), memory=False, progress=False)


def test_a_model_of_fixed_rows_says_how_many() -> None:
    result = lobo_fx.compile(nn.Linear(4, 3), example_inputs=torch.randn(5, 4), dynamic_shapes=None, progress=False)
    found = result.benchmark(batch=1, rounds=2, warmup=0, memory=False)
    assert found.batch == 5
    latency = found.latencies["compiled"]
    assert latency.throughput == pytest.approx(5 / (1e-3 * latency.p50))


def test_no_files_are_refused() -> None:
    with pytest.raises(InvalidInput, match="file"):
        benchmark({}, OnnxRuntime(), memory=False, progress=False)


def test_a_missing_file_is_refused_before_anything_is_loaded(clock: Clock, tmp_path: Path) -> None:
    runtime = FakeRuntime(clock)
    paths = timed(tmp_path, there=[1.0])
    with pytest.raises(InvalidInput, match=r"no file .*missing\.onnx"):
        benchmark({**paths, "missing": tmp_path / "missing.onnx"}, runtime, memory=False, progress=False)
    assert runtime.loaded == []


def test_a_file_that_is_none_of_the_runtimes_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(LoboError, match=r"text\.onnx"):
        benchmark({"text": tmp_path / "text.onnx"}, OnnxRuntime(), memory=False, progress=False)


@pytest.mark.parametrize("other", [{"name": "z"}, {"sizes": (5, 3)}, {"rows": 2}], ids=["name", "size", "fixed"])
def test_files_that_take_different_inputs_are_refused(
    other: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    files["other"] = write_product(tmp_path / "other.onnx", **other)
    with pytest.raises(InvalidInput, match=r"'[^']+' takes x: float32\[any, 4\], 'other' "):
        benchmark(files, OnnxRuntime(), memory=False, progress=False)


def test_random_inputs_are_seeded_and_of_the_right_kind() -> None:
    specs = [
        ArraySpec("x", "float32", (None, 2000)),
        ArraySpec("half", "float16", (3,)),
        ArraySpec("tokens", "int64", (None, 7)),
        ArraySpec("mask", "bool", (None,)),
        ArraySpec("audio", "float32", (None, 1, None)),
    ]
    one, same, other = random_arrays(specs, 4), random_arrays(specs, 4), random_arrays(specs, 4, seed=1)
    assert {name: (a.shape, str(a.dtype)) for name, a in one.items()} == {
        "x": ((4, 2000), "float32"),
        "half": ((3,), "float16"),
        "tokens": ((4, 7), "int64"),
        "mask": ((4,), "bool"),
        "audio": ((4, 1, 64), "float32"),
    }
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["x"], other["x"])
    assert abs(one["x"].std() - 1) < 0.05
    assert not one["tokens"].any()


@pytest.mark.parametrize("batch", [10**12, 10**18])
def test_sizes_beyond_the_memory_are_refused_by_input(batch: int) -> None:
    with pytest.raises(InvalidInput, match=r"the input 'x' can't be made with sizes \[10+, 2000\]"):
        random_arrays([ArraySpec("x", "float32", (None, 2000))], batch)


def test_sizes_that_a_file_can_not_run_on_are_told_with_the_options_that_set_them(tmp_path: Path) -> None:
    path = write_product(tmp_path / "a.onnx")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    onnx.save(model, path)
    settings: dict[str, Any] = {"rounds": 1, "warmup": 0, "memory": False, "progress": False}
    with pytest.raises(InvalidInput, match=r"a\.onnx does not run on inputs of x \[1, 64\]; .*--length"):
        benchmark({"first": path}, OnnxRuntime(), **settings)
    assert benchmark({"first": path}, OnnxRuntime(), length=4, **settings).batch == 1


# Memory.


def test_memory_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    """It grows with the file's weights, and not with what this process holds."""
    held = np.ones(300_000_000 // 8)
    small, large = write_product(tmp_path / "s.onnx"), write_product(tmp_path / "l.onnx", (3000, 3000))
    found = benchmark({"small": small}, OnnxRuntime(), rounds=1, warmup=0, progress=False).latencies["small"]
    assert found.memory is not None
    assert found.base_memory is not None
    assert 0 < found.base_memory < found.memory < held.nbytes
    base, peak = peak_memory(
        large, "lobo_fx.exporters.onnxruntime.runtime:OnnxRuntime", 1, {"x": np.ones((1, 3000), "f")}
    )
    weights = 4 * 3000 * 3000
    assert weights < peak - base < 6 * weights
    assert peak - base > found.memory - found.base_memory + weights // 2
    assert held[-1] == 1


def test_a_process_that_fails_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InvalidInput, match=r"text\.onnx does not run in a fresh process: .*Protobuf"):
        peak_memory(tmp_path / "text.onnx", "lobo_fx.exporters.onnxruntime.runtime:OnnxRuntime", 1, {})


def test_the_fresh_process_runs_on_the_same_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random arrays of the file's free dimensions would not do: this model's inputs belong together."""
    (tmp_path / "strict_runtime.py").write_text(
        "from lobo_fx.plugins.protocols import ArraySpec\n"
        "class Session:\n"
        "    inputs = [ArraySpec('file', 'float32', (None, None)), ArraySpec('b', 'int64', (None,))]\n"
        "    def run(self, arrays):\n"
        "        assert list(arrays) == ['file', 'b'], list(arrays)\n"
        "        assert arrays['file'].tolist() == [[0, 1, 2], [3, 4, 5]], 'other values'\n"
        "        assert arrays['b'].tolist() == [7, 8] and arrays['b'].dtype == 'int64', 'other values'\n"
        "        return []\n"
        "class Strict:\n"
        "    version = 'strict'\n"
        "    def load(self, path, threads):\n"
        "        return Session()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arrays: dict[str, Array] = {"file": np.arange(6, dtype="f").reshape(2, 3), "b": np.array([7, 8])}
    base, peak = peak_memory(tmp_path / "any", "strict_runtime:Strict", 1, arrays)
    assert 0 < base <= peak


# Another runtime.


class TorchSession:
    """Runs the ONNX file's weights with PyTorch, as a second runtime might."""

    inputs = [ArraySpec("input", "float32", (None, 4))]  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        stored = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
        self.weights = [torch.from_numpy(array.copy()) for array in stored.values()]
        self.rows: list[int] = []

    def run(self, arrays: Mapping[str, Array]) -> list[Array]:
        self.rows += [len(array) for array in arrays.values()]
        return [np.zeros(1)]


class TorchRuntime:
    """Knows what was loaded; a plug-in from another package would look like this."""

    sessions: list[TorchSession] = []  # noqa: RUF012
    version = "torch-runtime 0.1"

    def load(self, path: Path, threads: int) -> TorchSession:
        assert threads == 2
        self.sessions.append(TorchSession(path))
        return self.sessions[-1]


def test_a_second_runtime_can_be_plugged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(RUNTIMES, "added", {})
    monkeypatch.setattr(TorchRuntime, "sessions", [])
    RUNTIMES.register("torch-runtime", TorchRuntime)
    with pytest.raises(InvalidInput, match="registered already"):
        RUNTIMES.register("torch-runtime", TorchRuntime)
    with pytest.raises(InvalidInput, match="registered already"):
        RUNTIMES.register("onnxruntime", TorchRuntime)
    result = lobo_fx.compile(nn.Linear(4, 3), example_inputs=torch.randn(2, 4), progress=False)
    result.export(tmp_path / "model.onnx")
    found = result.benchmark(runtime="torch-runtime", threads=2, batch=6, rounds=3, warmup=1, memory=False)
    assert found.runtime == "torch-runtime 0.1"
    assert list(found.latencies) == ["original", "compiled"]
    assert all(set(session.rows) == {6} and len(session.rows) >= 4 for session in TorchRuntime.sessions)
    assert len(TorchRuntime.sessions) == 2
    assert all(len(session.weights) == 2 for session in TorchRuntime.sessions)
    assert result.report.benchmark is found
    with pytest.raises(InvalidInput, match="no runtime is called 'tensorrt'"):
        result.benchmark(runtime="tensorrt")


@pytest.mark.slow
def test_memory_of_a_second_runtime_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugged_runtime.py").write_text(
        "from lobo_fx.plugins.protocols import ArraySpec\n"
        "class Session:\n"
        "    inputs = [ArraySpec('x', 'float32', (None, 4))]\n"
        "    def run(self, arrays):\n"
        "        self.held = bytearray(90_000_000)\n"
        "        return []\n"
        "class Plugged:\n"
        "    version = 'plugged'\n"
        "    def load(self, path, threads):\n"
        "        return Session()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import plugged_runtime  # type: ignore[import-not-found]

    try:
        found = benchmark(
            {"file": write_product(tmp_path / "a.onnx")},
            plugged_runtime.Plugged(),
            rounds=1,
            warmup=0,
            progress=False,
        ).latencies["file"]
    finally:
        del sys.modules["plugged_runtime"]
    assert found.memory is not None
    assert found.base_memory is not None
    assert found.memory - found.base_memory > 80_000_000


def test_a_loaded_result_measures_the_compiled_model_alone(tmp_path: Path) -> None:
    lobo_fx.compile(nn.Linear(4, 3), example_inputs=torch.randn(2, 4), progress=False).save(tmp_path / "saved")
    found = lobo_fx.load(tmp_path / "saved").benchmark(rounds=2, warmup=0, memory=False)
    assert list(found.latencies) == ["compiled"]
    assert found.ratio("compiled") == 1


@pytest.mark.parametrize(("ratio", "noted"), [(1.004, False), (1.02, True)])
def test_a_difference_too_small_to_be_said_is_not_called_slower(
    ratio: float, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    latencies = {"original": Latency(1, 1, 1, 1, 1), "compiled": Latency(ratio, ratio, ratio, ratio, 1)}
    monkeypatch.setattr("lobo_fx.result.benchmark", lambda *given, **settings: Benchmark("test", 1, 1, 1, latencies))
    result = lobo_fx.compile(nn.Linear(4, 3), example_inputs=torch.randn(2, 4), progress=False)
    result.benchmark()
    assert any("slower than the original" in note for note in result.report.notes) == noted


# --- a busy machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "signs"),
    [
        ((9.0, 10.0, 17.9, 9.9), ()),
        ((9.0, 10.0, 17.9, 38.0), ()),  # four threads
        ((9.0, 10.0, 12.0, 7.9), ("79% of its wall time was on the processor",)),
        ((9.0, 10.0, 18.1, 9.9), ("p95 is 2.0 times p5",)),
        ((1.0, 10.0, 30.0, 5.0), ("50% of its wall time", "p95 is 30.0 times p5")),
    ],
)
def test_a_busy_machine_is_said(times: tuple[float, float, float, float], signs: tuple[str, ...]) -> None:
    """Times are p5, p50, p95 and CPU."""
    quiet = Latency(9.0, 10.0, 11.0, 10.0, 100.0)
    found = Benchmark("rt", 1, 1, 30, {"original": quiet, "compiled": Latency(*times, 100.0)})
    assert len(found.busy) == bool(signs)
    for sign in signs:
        assert sign in found.busy[0]
        assert "while compiled was measured" in found.busy[0]
        assert f"note: {found.busy[0]}\n" in str(found)


def test_processor_time_heads_the_ratios() -> None:
    found = Benchmark("rt", 1, 1, 30, {"original": Latency(1.0, 1.0, 1.0, 1.0, 1.0)})
    assert [str(column.header) for column in benchmark_table(found).columns][:3] == ["file", "CPU ratio", "p50 ratio"]


def test_a_clock_that_ticks_more_slowly_than_a_call_takes_is_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    tick, fine = 1e-3, time.process_time
    monkeypatch.setattr(time, "process_time", lambda: fine() // tick * tick)
    found = interleave({"sum": lambda: sum(range(5_000))}, rounds=40, warmup=1, rows=1)["sum"]
    assert 0.2 * found.p50 < found.cpu < 5 * found.p50
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    calls = {name: lambda: sum(range(50)) for name in ("first", "other")}
    latencies = interleave(calls, rounds=3, warmup=0, rows=1)
    compared = Benchmark("none", 1, 1, 3, latencies).ratio("other")
    assert latencies["first"].cpu == 0
    assert compared == latencies["other"].p50 / latencies["first"].p50
    assert latencies["other"].cpu_ratio is None


def test_where_one_of_two_files_is_shorter_than_a_tick_means_are_compared(clock: Clock) -> None:
    calls = itertools.count()

    def short() -> None:
        clock.wall += 2e-3
        clock.cpu += 1e-2 if next(calls) % 5 == 0 else 0.0

    def long() -> None:
        clock.wall += 2e-2
        clock.cpu += 2e-2

    latencies = interleave({"long": long, "short": short}, rounds=10, warmup=0, rows=1)
    assert latencies["short"].cpu_ratio is None
    assert Benchmark("none", 1, 1, 10, latencies).ratio("short") == pytest.approx(0.1)
