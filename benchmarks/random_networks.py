"""Random networks × passes × settings: no wrong shape, no wrong number, and no exception but our own.

    python benchmarks/random_networks.py --until 10000 [--seconds 1500] [--state out/random_networks.jsonl]
    python benchmarks/random_networks.py --only 4711          # one network again, with its traceback

A number makes a network (`network_generator`), its inputs, one to four passes with settings, and the outputs to keep.
Each is compiled with every check of the compiler, exported, and run in ONNX Runtime beside PyTorch on other rows, and
where its length is free on another length; passes that promise exactness are held to the user's own module there. What
is refused as `InvalidInput` is counted with its reason; any other exception and any wrong number is a failure.

What was run is kept in a JSON lines file: a run that is cut off goes on where it was, and `--again` runs anew what
failed. Networks run in a process of their own, so that one that hangs or dies is a failure like any other.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo.config
from network_generator import LENGTH, SIDE, WideNet
from torch.export import Dim
from torch.utils import _pytree as pytree
from torch_tables import tables_built_once

import lobo_fx
from lobo_fx import InvalidInput, Pass, Promise, Result, TraceError
from lobo_fx.axes import KINDS
from lobo_fx.contracts.passbase import exact_tolerance
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.exporters.parity import check_parity
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.sized_inputs import named_arrays
from lobo_fx.measures.fidelity import largest_error, tensor_leaves
from lobo_fx.measures.machine import products_saturate
from lobo_fx.own_operators.formats import FORMATS
from lobo_fx.passes import QuantizeStatic
from lobo_fx.passes.pruning.compensation import METHODS
from lobo_fx.passes.quantization.integers.targets import TARGETS
from lobo_fx.plugins.kernels import Cost, Kernel
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import build as build_pass
from lobo_fx.testing import assert_untouched

STATE = Path("out/random_networks.jsonl")
OK, REFUSED, FAILED = "ok", "refused", "failed"
CPU_SECONDS, HANGING, RECYCLED = 180, 1800.0, 40
"""What a network may take of the CPU's time, and of the clock's; networks for one process: torch keeps some memory."""

Settings = dict[str, Any]


class WrongNumber(AssertionError):
    """A result that is not what it must be."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What a number stands for.

    Attributes:
        network: in inference mode.
        inputs: the example inputs.
        more: inputs of other sizes.
        dynamic_shapes: as `lobo_fx.compile` takes them.
        outputs: likewise.
        passes: with their settings.
        saved: whether the result goes through a folder and back.
    """

    network: WideNet
    inputs: torch.Tensor
    more: tuple[torch.Tensor, ...]
    dynamic_shapes: Any
    outputs: list[str] | None
    passes: tuple[Pass, ...]
    saved: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a network: CPU seconds, its steps, its passes, and what was refused or failed."""

    number: int
    outcome: str
    seconds: float
    kinds: list[str]
    passes: list[str]
    reason: str = ""
    snr: float | None = None


# --- what a number stands for ------------------------------------------------------------------------------


def quantize_static(choose: random.Random) -> Settings:
    """Anything but a cost table: the costs of kernels are drawn."""
    return {
        "observer": choose.choice(["histogram", "mse", "entropy", "percentile", "min_max", "moving_average"]),
        "target": choose.choice(["auto", *TARGETS]),
        "kernels": choose.choice(["cheapest", "all"]),
        "rounding": choose.choice(["nearest", "compensated"]),
        "correct_bias": choose.random() < 0.5,
    }


def prune_channels(choose: random.Random) -> Settings:
    """A share, or a share of a cost."""
    settings: Settings = {
        "importance": choose.choice(
            ["l1", "l2", "random", "batch_norm", "geometric_median", "activation", "lamp", "second_order"]
        ),
        "scope": choose.choice(["axis", "global", "isomorphic"]),
        "round_to": choose.choice([1, 1, 2, 8]),
        "minimum": choose.choice([1, 2]),
        "steps": choose.choice([1, 1, 2]),
        "compensation": choose.choice(["auto", *METHODS]),
    }
    if choose.random() < 0.3:
        settings |= {"target": choose.choice(["macs", "parameters"]), "keep": choose.choice([0.4, 0.6, 0.8])}
    else:
        settings["ratio"] = choose.choice([0.2, 0.5, 0.8])
    if choose.random() < 0.3:
        settings["kinds"] = choose.sample(KINDS, 3)
    return settings


def quantize_weights(choose: random.Random) -> Settings:
    """Every format, most blocks, every method."""
    settings: Settings = {
        "format": choose.choice(list(FORMATS)),
        "block_size": choose.choice([16, 32, None]),
        "method": choose.choice(["auto", "round", "hqq", "gptq"]),
    }
    if settings["format"] in ("int4", "int8") and settings["block_size"] and choose.random() < 0.5:
        settings["compute"] = "int8"
    return settings


def factorize(choose: random.Random) -> Settings:
    """A share of the full rank, or decibels."""
    settings: Settings = {
        "round_to": choose.choice([1, 2, 8]),
        "compensation": choose.choice(["auto", *METHODS]),
    }
    return settings | choose.choice(
        [{"rank": choose.choice([0.1, 0.25, 0.4])}, {"decibels": choose.choice([5, 15, 30])}]
    )


DRAWS: dict[str, Callable[[random.Random], Settings]] = {
    "compute_in_float": lambda choose: {},
    "factorize": factorize,
    "equalize_layers": lambda choose: {},
    "fit_goal": lambda choose: {
        "decibels": choose.choice([5, 15, 30]),  # which the whole network keeps: any other limit may be out of reach
        "precision": choose.choice(["auto", "float"]),
        "moves": choose.choice([0, 2]),
        "seconds": 5,
    },
    "fold_batch_norm": lambda choose: {},
    "fold_weights": lambda choose: {},
    "fuse_attention": lambda choose: {},
    "mixed_precision": lambda choose: {
        "decibels": choose.choice([10, 30, 45]),
        "quantizer": QuantizeStatic(**quantize_static(choose)),
    },
    "prune_channels": prune_channels,
    "prune_weights": lambda choose: {
        "amount": choose.choice([0.2, 0.5, 0.9]),
        "criterion": choose.choice(["l1", "l2", "random"]),
        "scope": choose.choice(["layer", "global"]),
        "pattern": choose.choice([None, None, "2:4"]),
    },
    "quantize_dynamic": lambda choose: {"target": choose.choice(["auto", *TARGETS])},
    "quantize_static": quantize_static,
    "quantize_weights": quantize_weights,
    "smooth_activations": lambda choose: {"strength": choose.choice([0.3, 0.5, 0.8])},
}
"""Settings of every pass that comes with the package and trains nothing, drawn."""
SQUARE = {"shuffle", "pool"}
"""Steps whose code depends on the sides of an image."""
OUTPUTS = [None, None, ["logits"], ["found", "states.1"], ["states"], ["states.0", "logits"]]


def make_case(number: int) -> Case:
    """The same for the same number, in any process."""
    torch.manual_seed(number)
    choose = random.Random(f"passes of {number}")
    network = WideNet(number).eval()
    inputs = network.inputs(4)
    more, free = [network.inputs(3), network.inputs(1)], choose.choice(["batch", None])
    shapes: Any = free
    if free is None:
        more = [network.inputs(4)]
    elif not network.fixed and choose.random() < 0.5:
        if network.start != "image":
            shapes = {"x": {0: Dim("batch"), 1: Dim("length")}}
            more.append(network.inputs(2, LENGTH + 5))
        elif not SQUARE & set(network.kinds):
            shapes = {"x": {0: Dim("batch"), 2: Dim("height", min=SIDE), 3: Dim("width", min=SIDE)}}
            more.append(torch.randn(2, 3, SIDE + 2, SIDE + 5))
    outputs = choose.choice(OUTPUTS) if network.kinds[-1] == "head_of_several" else None
    often = [1 if name in ("mixed_precision", "fit_goal") else 4 for name in DRAWS]
    names = choose.choices(list(DRAWS), often, k=choose.choice([1, 1, 2, 2, 3, 4]))
    passes = tuple(build_pass(PASSES.get(name), DRAWS[name](choose)) for name in names)
    return Case(network, inputs, tuple(more), shapes, outputs, passes, saved=number % 4 == 0)


@contextlib.contextmanager
def drawn_costs(number: int) -> Iterator[None]:
    """Kernels cost whatever the number says, so that integer regions lie anywhere, and nothing is measured."""

    def measure(self: OnnxRuntime, kernels: Sequence[Kernel]) -> dict[Kernel, Cost]:
        dice = [random.Random(zlib.crc32(f"{number} {kernel.key}".encode())) for kernel in kernels]
        return {kernel: Cost(d.uniform(1, 9), d.uniform(0.5, 9)) for kernel, d in zip(kernels, dice, strict=True)}

    with (
        mock.patch.object(OnnxRuntime, "measure_kernels", measure),
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": os.devnull}),  # no table is kept there
    ):
        yield


# --- what must hold ----------------------------------------------------------------------------------------


def check(case: Case, number: int) -> Result:
    """Compiles, exports and compares.

    Raises:
        WrongNumber: a result that is not what it must be.
        Exception: whatever else goes wrong.
    """
    data = [case.network.inputs(4) for _ in range(4)]
    with drawn_costs(number), assert_untouched(case.network):
        result = lobo_fx.compile(
            case.network,
            case.passes,
            example_inputs=case.inputs,
            dynamic_shapes=case.dynamic_shapes,
            outputs=case.outputs,
            calibration_data=data,
            progress=False,
        )
    str(result)
    for x in (case.inputs, *case.more):
        compare_with_eager(case, result, x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        result.export(path, confirm=False)
        # integers of other CPUs saturate where this one can't sum them; the export has run the file as it is
        session = OnnxRuntime().load_exact(path) if products_saturate() else OnnxRuntime().load(path, threads=1)
        for x in case.more:
            inputs = Inputs((x,))
            check_parity(result.program, inputs, session.run(named_arrays(result.program, inputs)))
        if case.saved:
            result.save(Path(folder) / "saved")
            again = lobo_fx.load(Path(folder) / "saved").module
            for x in (case.inputs, *case.more):
                hold(result.module(x), again(x), 1e-6, "the loaded module differs")
    return result


def compare_with_eager(case: Case, result: Result, x: torch.Tensor) -> None:
    """Shapes are the user's own module's, and so are numbers where every pass promises that.

    Raises:
        WrongNumber: they are not.
    """
    with torch.no_grad():
        expected, found = only(case.network(x), case.outputs), result.module(x)
    exact = all(pass_.promise is Promise.EXACT for pass_ in case.passes)
    hold(expected, found, exact_tolerance(expected) * len(case.passes) if exact else None, "eager PyTorch differs")


def only(value: Any, names: Sequence[str] | None, path: str = "") -> Any:
    """The outputs that are named; None in the place of the others, but no entry of a dict."""
    if names is None or any(f"{path}.".startswith(f".{name}.") for name in names):
        return value
    if isinstance(value, tuple):
        parts = tuple(only(part, names, f"{path}.{place}") for place, part in enumerate(value))
        return parts if any(part is not None for part in parts) else None
    if isinstance(value, dict):
        entries = {key: only(part, names, f"{path}.{key}") for key, part in value.items()}
        return {key: part for key, part in entries.items() if part is not None} or None
    return None


def hold(expected: Any, found: Any, allowed: float | None, words: str) -> None:
    """Structure, shapes and finiteness, and numbers where a tolerance is given.

    Raises:
        WrongNumber: says what differs.
    """
    structures = [pytree.tree_structure(outputs) for outputs in (expected, found)]
    one, other = map(tensor_leaves, (expected, found))
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (one, other)]
    if structures[0] != structures[1] or shapes[0] != shapes[1]:
        raise WrongNumber(f"{words} in shape: {shapes[0]}, {shapes[1]}")
    if not all(bool(tensor.isfinite().all()) for tensor in other):
        raise WrongNumber("NaN or infinity on other rows")
    if allowed is not None and (error := largest_error(one, other)) > allowed:
        raise WrongNumber(f"{words} by {error:.1e} of the range on {len(one[0])} rows")


def run_one(number: int) -> Outcome:
    """Makes, checks and times one network."""
    start = time.process_time()
    kinds, names, snr = list[str](), list[str](), None
    outcome, reason = OK, ""
    try:
        case = make_case(number)
        kinds, names = case.network.kinds, list(map(str, case.passes))
        snr = check(case, number).report.rows[-1].snr
    except InvalidInput as error:
        outcome, reason = REFUSED, str(error)
    except TraceError as error:  # torch can't prove of a few networks that they take every length of the drawn range
        outcome, reason = REFUSED if "Constraints violated" in str(error) else FAILED, str(error)
    except Exception as error:
        outcome, reason = FAILED, f"{type(error).__name__}: {error}{_place(error)}"
    seconds = round(time.process_time() - start, 2)
    return Outcome(number, outcome, seconds, kinds, names, " ".join(reason.split())[:900], snr)


def _place(error: BaseException) -> str:
    """Where it was raised, and where what it wraps was."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    frames = [traceback.extract_tb(cause.__traceback__) for cause in causes]
    places = [f"{Path(stack[-1].filename).name}:{stack[-1].lineno}" for stack in frames if stack]
    return f" (at {', '.join(places)})"


# --- many of them ------------------------------------------------------------------------------------------


def work(numbers: Connection) -> None:
    """A process that checks the networks whose numbers it is sent.

    Without PyTorch's cache of shapes, which only costs time where networks are small, and without looking for garbage
    in what was imported.
    """
    torch.set_num_threads(1)
    torch._dynamo.config.fake_tensor_cache_enabled = False
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    with tables_built_once(), contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            number, hard = numbers.recv(), resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_SECONDS, hard))
            numbers.send(run_one(number))


def run_all(numbers: Iterable[int], seconds: float) -> Iterator[Outcome]:
    """Outcomes one by one, until the time is over."""
    context, end = multiprocessing.get_context("spawn"), time.monotonic() + seconds
    process: Any = None
    done = 0
    for number in numbers:
        if time.monotonic() > end:
            break
        if process is None:
            mine, theirs = context.Pipe()
            process, done = context.Process(target=work, args=(theirs,)), 0
            process.start()
            theirs.close()
        reason = f"not done in {HANGING} s"
        try:
            mine.send(number)
            outcome = mine.recv() if mine.poll(HANGING) else None
        except (EOFError, ConnectionError):
            process.join()
            outcome, reason = None, f"the process died with {process.exitcode} ({CPU_SECONDS} s of CPU time allowed)"
        done += 1
        if outcome is None or done == RECYCLED:
            mine.close()
            if outcome is None:
                process.kill()
            process.join()
            process = None
        yield outcome or Outcome(number, FAILED, 0.0, [], [], reason)
    if process is not None:
        mine.close()
        process.join()


def read_state(path: Path) -> dict[int, Outcome]:
    """By number, what was run before; of one that was run again, the last."""
    outcomes: dict[int, Outcome] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line may be cut off
            outcome = Outcome(**json.loads(line))
            outcomes[outcome.number] = outcome
    return outcomes


def go_on(state: Path, until: int, seconds: float, again: bool = False, limit: int | None = None) -> list[Outcome]:
    """Runs the networks below `until` that the state does not hold, and adds them to it; returns those that it ran."""
    state.parent.mkdir(parents=True, exist_ok=True)
    done = read_state(state)
    missing = [n for n in range(until) if n not in done or (again and done[n].outcome == FAILED)][:limit]
    ran = []
    with state.open("a", encoding="utf-8") as file:
        file.write("\n" if state.stat().st_size else "")
        for outcome in run_all(missing, seconds):
            ran.append(outcome)
            file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            file.flush()
            if outcome.outcome == FAILED:
                print(f"{outcome.number}: {outcome.reason}\n    {outcome.kinds} {outcome.passes}", flush=True)
    return ran


def summary(outcomes: Sequence[Outcome]) -> str:
    """Counts, time, and what was refused."""
    counts = collections.Counter(outcome.outcome for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    lines = [
        f"{len(outcomes)} networks in {seconds:.0f} s of CPU time: "
        f"{counts[OK]} ok, {counts[REFUSED]} refused in our own words, {counts[FAILED]} failed"
    ]
    refusals = collections.Counter(outcome.reason[:100] for outcome in outcomes if outcome.outcome == REFUSED)
    lines += [f"{count:5d} refused: {reason}" for reason, count in refusals.most_common(20)]
    lines += [f"{outcome.number:5d} failed: {outcome.reason}" for outcome in outcomes if outcome.outcome == FAILED]
    return "\n".join(lines)


def main() -> None:
    """Goes on, or runs one network again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", type=int, default=10_000, help="networks from 0 up to this number")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no network is begun after that")
    parser.add_argument("--state", type=Path, default=STATE, help="what was run, a line each")
    parser.add_argument("--again", action="store_true", help="run those again that failed")
    parser.add_argument("--only", type=int, help="one network, with its traceback")
    options = parser.parse_args()
    if options.only is not None:
        torch.set_num_threads(1)
        case = make_case(options.only)
        print(case.network.kinds, *case.passes, case.dynamic_shapes, case.outputs, sep="\n")
        print(check(case, options.only))
        return
    go_on(options.state, options.until, options.seconds, options.again)
    outcomes = list(read_state(options.state).values())
    print(summary(outcomes))
    raise SystemExit(any(outcome.outcome == FAILED for outcome in outcomes))


if __name__ == "__main__":
    main()
