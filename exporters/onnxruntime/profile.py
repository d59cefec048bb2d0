"""Where the time of a file goes: ONNX Runtime's profile, by the nodes of the program that the file was written of.

The exporter names values as the program names its nodes. Other nodes that a program's node was translated to are found
upstream of its value. Nodes that ONNX Runtime made of these are found by the names of values and nodes that it keeps.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from lobo_fx.exporters.onnxruntime.session_options import ONLY_FATAL
from lobo_fx.files import temporary_folder
from lobo_fx.plugins.protocols import Arrays

__all__ = ["KernelTime", "kernel_times", "node_times", "repeatedly", "typical"]

_WARMUP = 3
_MOST, _SECONDS = 60, 0.03
"""Most runs of a short model, if no more are asked for, and the seconds after which no further run is begun."""
_OPTIMIZED = "optimized.onnx"
_TYPES = {"float": "float32", "double": "float64"}
_FUSED = 4
"""Most nodes in a row that are fused into one: a convolution, a sum, an activation, and one more."""
_MADE_UP = re.compile(r"(_nchwc|_quant|_token_\d+|/[^/]*)$")
"""What ONNX Runtime appends to the name of a node that it replaced, maybe several times."""


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """The time that all nodes of one operator and element type take together.

    Attributes:
        name: name of the operator, as ONNX Runtime has it after its optimisations.
        type: element type of the first array that it reads.
        count: number of such nodes.
        microseconds: time of one call, summed over these nodes.
    """

    name: str
    type: str
    count: int
    microseconds: float


def kernel_times(path: Path, arrays: Arrays) -> list[KernelTime]:
    """Where the time of a file goes, by kernel, on one thread; the slowest first."""
    with temporary_folder() as folder:
        spent = _spent(_profiled(path, arrays, folder))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for events in spent.values():
        said = events[0]["args"]
        types = [name for entry in said.get("input_type_shape", ()) for name in entry]
        kind = (str(said.get("op_name", "unknown")), _TYPES.get(next(iter(types), ""), next(iter(types), "nothing")))
        found[kind].append(_typical(events))
    times = [KernelTime(name, kind, len(every), sum(every)) for (name, kind), every in found.items()]
    return sorted(times, key=lambda kernel: -kernel.microseconds)


def node_times(path: Path, arrays: Arrays, names: Mapping[str, str], rounds: int = 20) -> dict[str, list[float]]:
    """Typical microseconds by node of the program, as `lobo_fx.plugins.kernels.ProfilesNodes` has it."""
    with temporary_folder() as folder:
        spent = _spent(_profiled(path, arrays, folder, rounds))
        optimized = onnx.load(folder / _OPTIMIZED, load_external_data=False).graph
    written = onnx.load(path, load_external_data=False).graph
    owners = _owners(written, names)
    outputs = {node.name: list(node.output) for node in optimized.node}
    operators = {node.name: node.op_type for node in optimized.node}
    makers = {key: node for node in written.node for key in (node.name, *node.output)}
    found: dict[str, list[float]] = defaultdict(list)
    for name, events in spent.items():
        kept = [*outputs.get(name, ()), *_stripped(name)]
        key = next((key for key in kept if key in owners), "")
        if key in makers:
            key = _fused(operators.get(name, ""), makers[key], makers).name
        found[owners.get(key, "")].append(_typical(events))
    return {owner: sorted(times, reverse=True) for owner, times in found.items()}


def _stripped(name: str) -> Iterator[str]:
    """A name, then the name without endings that ONNX Runtime may have appended, one after the other."""
    shorter = ""
    while name != shorter:
        yield name
        shorter, name = name, _MADE_UP.sub("", name)


def _profiled(path: Path, arrays: Arrays, folder: Path, rounds: int = 20) -> Any:
    """The events of some calls; the graph that ran lies in the folder afterwards."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = ONLY_FATAL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(folder / _OPTIMIZED)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    feed = {given.name: arrays[given.name] for given in session.get_inputs()}
    for _ in repeatedly(_WARMUP + rounds):
        session.run(None, feed)
    return json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))


def _spent(events: Any) -> dict[str, list[dict[str, Any]]]:
    """The calls of each node, by the node's name."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            found[event["name"].removesuffix("_kernel_time")].append(event)
    return found


def repeatedly(least: int) -> Iterator[int]:
    """Counts `least` runs, and more while little time has passed: many runs tell short kernels apart."""
    start = time.perf_counter()
    for index in range(max(least, _MOST)):
        if index >= least and time.perf_counter() - start > _SECONDS:
            return
        yield index


def typical(durations: Sequence[float]) -> float:
    """The mean of the fastest three quarters, at least one.

    Profiles count whole microseconds, and so would a median, where kernels of small networks take three or four.
    """
    fastest = sorted(durations)[: max(1, 3 * len(durations) // 4)]
    return statistics.fmean(fastest)


def _typical(events: Sequence[Mapping[str, Any]]) -> float:
    return typical([float(event["dur"]) for event in events[_WARMUP:]])


def _fused(operator: str, last: Any, makers: Mapping[str, Any]) -> Any:
    """Of nodes that were fused into one, named by the last: the node whose operator the fused one has (Conv, Gemm)."""
    operator = operator.removeprefix("Fused")
    around = [last]
    for _ in range(_FUSED):
        if (same := next((node for node in around if node.op_type == operator), None)) is not None:
            return same
        around = [makers[value] for node in around for value in node.input if value in makers]
    return last


def _owners(graph: Any, names: Mapping[str, str]) -> dict[str, str]:
    """The program's node that each value and node of a file was translated from, by the value's or node's name."""
    owners = dict(names)
    for node in reversed(graph.node):
        owner = next((owners[value] for value in node.output if value in owners), None)
        if owner is not None:
            for value in node.output:
                owners.setdefault(value, owner)
            owners[node.name] = owner
            for value in node.input:
                owners.setdefault(value, owner)
    return owners
