"""Where the time of a file goes: ONNX Runtime's profile, by the nodes of the program that the file was written of.

The exporter names values as the program names its nodes. What else a node was translated to is found upstream of its
value, and what ONNX Runtime made of these is found by the names of values and nodes that it keeps.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from lobo_fx.files import temporary_folder
from lobo_fx.plugins.protocols import Arrays

__all__ = ["node_times"]

_ROUNDS = 20
_WARMUP = 3
_ONLY_FATAL = 4
_MADE_UP = re.compile(r"(_nchwc|_quant|_token_\d+|/.*)$")
"""What ONNX Runtime appends to the name of a node that it replaced."""


def node_times(path: Path, arrays: Arrays, names: Collection[str]) -> dict[str, list[float]]:
    """Median microseconds by node of the program, as `lobo_fx.plugins.kernels.ProfilesNodes` has it."""
    with temporary_folder() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = _ONLY_FATAL
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {given.name: arrays[given.name] for given in session.get_inputs()}
        for _ in range(_WARMUP + _ROUNDS):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimized = onnx.load(folder / "optimized.onnx", load_external_data=False).graph
    owners = _owners(onnx.load(path, load_external_data=False).graph, set(names))
    outputs = {node.name: list(node.output) for node in optimized.node}
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            spent[event["name"].removesuffix("_kernel_time")].append(float(event["dur"]))
    found: dict[str, list[float]] = defaultdict(list)
    for name, times in spent.items():
        kept = [*outputs.get(name, ()), name, _MADE_UP.sub("", name)]
        owner = next((owners[key] for key in kept if key in owners), "")
        found[owner].append(statistics.median(times[_WARMUP:]))
    return {owner: sorted(times, reverse=True) for owner, times in found.items()}


def _owners(graph: Any, names: set[str]) -> dict[str, str]:
    """By name of a value or node of a file, the node of the program that it was translated from."""
    owners = {value: value for value in names}
    for node in reversed(graph.node):
        owner = next((owners[value] for value in node.output if value in owners), None)
        if owner is not None:
            for value in node.output:
                owners.setdefault(value, owner)
            owners[node.name] = owner
            for value in node.input:
                owners.setdefault(value, owner)
    return owners
