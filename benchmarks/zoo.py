"""Axis inference and surgery on whole model zoos: half of every free axis goes, and the model must still be one.

    python benchmarks/zoo.py --set transformers --output zoo.md

For each model, weights random: (1) positions are permuted along every free axis, and the outputs must not move:
axes that were inferred wrongly show; (2) a random half of every free axis is removed that equals zeroing, and
the result must equal the zeroed network; (3) a random half of every free axis is removed, the program must keep
its outputs' shapes and stay finite; (4) with --export, what is left must agree with ONNX Runtime.

With --free instead, nothing is removed: every size that the model's code allows is left free, lengths, heights and
widths beside the batch, and the ONNX file must agree with the model in eager PyTorch at three sizes.

    python benchmarks/zoo.py --free --output docs/free_sizes.md

Each model runs in a process of its own, forked from one that has imported the libraries. A model that fails is
listed with its reason. Results go to a JSON lines file beside the table; models already in it are not run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import json
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from own_models import OWN, build_own
from tiny_transformers import TINY, build_tiny
from torch import nn
from torch.utils import _pytree as pytree

from lobo_fx.axes.axis import Axis, Form
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.members import members
from lobo_fx.axes.removal import Removal
from lobo_fx.axes.surgery import remove, zero
from lobo_fx.capture.tracing import trace
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate
from lobo_fx.graph.signature import Signature
from lobo_fx.graph.sized_inputs import named_arrays, other_lengths, with_sizes
from lobo_fx.measures.fidelity import float_outputs, largest_error, signal_to_noise
from lobo_fx.measures.machine import machine
from lobo_fx.sources.known_inputs import find_inputs
from lobo_fx.sources.models import build
from lobo_fx.sources.torchvision_operators import declare_torchvision_operators
from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import new_table, to_markdown

TITLE = "Half of every free axis removed, on whole model zoos"
COMMAND = "python benchmarks/zoo.py --export --largest 7e8 --timeout 1500 --memory 20 --output docs/zoo.md"
EXACT = 1e-4
EXACT_IN_DOUBLE = 1e-9
"""Largest error of an exact comparison, as a share of the output's range: rounding, and little more."""
ALIVE, LEFT = 1e-3, 1e-5
"""Least difference between the rows of an output, as a share of its range: of the model, and of what is left of it."""
FREE_TITLE = "Models with every size free that their code allows, at three sizes"
FREE = 1e-3
"""Largest error of a file against eager PyTorch: what parity allows."""
NOT_RUN = "not run"
TOP_LOCKS = 5


@dataclasses.dataclass
class Outcome:
    """What was found of one model; what was not reached stays None.

    Attributes:
        name: of the model, as `--models` matches it.
        parameters: how many.
        nodes: of the traced graph.
        traced: seconds of CPU time that tracing took.
        free: share of the parameters that lie under a free axis.
        leaves: number of free leaves.
        kept: share of the parameters left with half of every free axis removed.
        inferred: seconds of CPU time of inference and surgery.
        permuted: error after permuting positions along every free axis.
        zeroed: error against the zeroed network, where only axes were halved whose removal equals zeroing.
        snr: decibels against the zeroed network, every axis halved.
        parity: error of ONNX Runtime against PyTorch.
        seconds: in all.
        unknown: operators without a rule.
        locks: the reasons that keep the most parameters.
        notes: what tracing left as it was.
        failure: the stage that failed and why.
        inputs: their shapes, as traced.
        sizes: with --free, how many sizes were run.
        error: with --free, the largest error of the file against eager PyTorch.
    """

    name: str
    parameters: int | None = None
    nodes: int | None = None
    traced: float | None = None
    free: float | None = None
    leaves: int | None = None
    kept: float | None = None
    inferred: float | None = None
    permuted: float | None = None
    zeroed: float | None = None
    snr: float | None = None
    parity: float | None = None
    seconds: float | None = None
    unknown: dict[str, str] = dataclasses.field(default_factory=dict)
    locks: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    failure: str = ""
    inputs: str = ""
    sizes: int | None = None
    error: float | None = None


_SMALL = {"transformers": build_tiny, "own": build_own}


def torchvision_models(module: str) -> list[str]:
    """Every model of a part of `torchvision.models`."""
    declare_torchvision_operators()
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models(module=getattr(models, module, models))]


def timm_models(cache: Path) -> list[str]:
    """The smallest model of each architecture family in timm, by parameters counted without allocating them."""
    declare_torchvision_operators()
    import timm

    if cache.is_file():
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["timm"] == timm.__version__:
            return list(known["models"])
    families = {family: timm.list_models(module=family) for family in timm.list_modules()}
    smallest = [f"timm:{min(names, key=_timm_size)}" for names in families.values() if names]
    cache.write_text(json.dumps({"timm": timm.__version__, "models": smallest}, indent=1), encoding="utf-8")
    return smallest


def _timm_size(name: str) -> float:
    import timm

    try:
        with torch.device("meta"), quiet():
            model: nn.Module = timm.create_model(name)
            return sum(parameter.numel() for parameter in model.parameters())
    except Exception:
        return math.inf  # its constructor reads values, which meta tensors lack


def build_model(name: str) -> tuple[nn.Module, Inputs]:
    """The model, its constant parameters made random, so that nothing hides behind a zero or a one."""
    torch.manual_seed(0)
    source, _, rest = name.partition(":")
    model, inputs = _SMALL[source](rest) if source in _SMALL else build(name)
    assert isinstance(model, nn.Module)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor.data += 0.2 * torch.rand_like(tensor)
    inputs = inputs or find_inputs(model)
    settle(model.eval(), inputs)
    return model, inputs


def settle(model: nn.Module, inputs: Inputs) -> None:
    """Sets running statistics to the example's: with others, signals die out and each output is but a bias."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def count_parameters(name: str) -> int:
    """Counted without allocating them where the constructor allows."""
    try:
        with torch.device("meta"):
            model, _ = build(name)
    except Exception:
        return 0
    assert isinstance(model, nn.Module)
    return sum(parameter.numel() for parameter in model.parameters())


def check(outcome: Outcome, export: bool, largest: float) -> None:
    """Fills in the outcome of one model.

    Raises:
        Exception: whatever a stage complains of; `outcome.failure` names the stage.
    """
    outcome.failure = "build"
    if outcome.name.partition(":")[0] not in _SMALL:
        outcome.parameters = count_parameters(outcome.name)
        if outcome.parameters > largest:
            raise ValueError(f"{outcome.parameters / 1e6:.0f} M parameters, allowed {largest / 1e6:.0f} M")
    model, inputs = build_model(outcome.name)
    outcome.failure = "trace"
    start = time.process_time()
    original = trace(model, inputs)
    outcome.traced = time.process_time() - start
    outcome.nodes, outcome.parameters = len(original.graph.nodes), count(original)
    outcome.notes = list(map(str, original.notes))
    expected = original.run()
    refuse_degenerate(expected, ALIVE)

    outcome.failure = "permute"
    inference, free = inferred(original.clone())
    outcome.leaves, outcome.free = len(free), share(inference, free)
    outcome.unknown, outcome.locks = inference.unknown, lock_reasons(inference)
    outcome.permuted = exact(original, permuted_outputs)
    outcome.failure = "equal zeroing"
    outcome.zeroed = exact(original, zeroed_outputs)
    outcome.failure = "remove"
    program = remove_half(outcome, original)
    if export:
        outcome.failure = "export"
        with tempfile.TemporaryDirectory() as folder:
            outcome.parity = OnnxExporter().export(program, Path(folder) / "model.onnx", {}).parity
    outcome.failure = ""


def check_free(outcome: Outcome, largest: float) -> None:
    """Fills in what becomes of one model whose sizes are all left free that may be.

    Raises:
        Exception: whatever a stage complains of; `outcome.failure` names the stage.
    """
    outcome.failure = "build"
    if outcome.name.partition(":")[0] not in _SMALL and (size := count_parameters(outcome.name)) > largest:
        raise ValueError(f"{size / 1e6:.0f} M parameters, allowed {largest / 1e6:.0f} M")
    model, inputs = build_model(outcome.name)
    outcome.failure = "trace"
    start = time.process_time()
    program = trace(model, inputs, "all")
    outcome.traced = time.process_time() - start
    outcome.parameters, outcome.inputs = count(program), str(program.signature)
    outcome.notes = list(map(str, program.notes))
    with tempfile.TemporaryDirectory() as folder:
        outcome.failure = "export"
        outcome.parity = OnnxExporter().export(program, Path(folder) / "model.onnx", {}).parity
        session = OnnxRuntime().load(Path(folder) / "model.onnx", threads=1)
    errors = []
    others = [
        {program.signature.batch or "": 1 + 2 * at} | sizes for at, sizes in enumerate(other_lengths(program, 0.25))
    ]
    for sizes in [{}, *others]:
        outcome.failure = f"run at {sizes}"
        given = with_sizes(program, program.example_inputs, sizes)
        with torch.no_grad():
            expected = model(*given.args, **given.kwargs)
        found = [torch.from_numpy(array) for array in session.run(named_arrays(program, given))]
        errors.append(largest_error(float_outputs(expected), float_outputs(found)))
        if not errors[-1] <= FREE:
            raise ValueError(f"the file differs from eager PyTorch by {errors[-1]:.1e}")
    outcome.sizes, outcome.error, outcome.failure = len(errors), max(errors), ""


def exact(original: Program, compare: Callable[[Program], tuple[Any, Any]]) -> float:
    """Error between outputs that must be equal but for rounding, which goes away in double precision.

    Raises:
        ValueError: it does not.
    """
    error = largest_error(*compare(original.clone()))
    if not error <= EXACT:
        error = largest_error(*compare(in_double(original)))
        if not error <= EXACT_IN_DOUBLE:
            raise ValueError(f"{compare.__name__.replace('_', ' ')} differ by {error:.1e} in double precision")
    return error


def in_double(program: Program) -> Program:
    """A copy that takes the same inputs and computes in double precision."""

    def wider(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    program = program.clone()
    program.module.double()
    for node in program.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(wider, (node.args, node.kwargs))
    for node in program.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].is_floating_point():
            with program.graph.inserting_after(node):
                wide = program.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float64))
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
    program.module.recompile()
    propagate(program.module)
    return program


def permuted_outputs(program: Program) -> tuple[Any, Any]:
    """Outputs as they were, and after positions along all free axes changed places."""
    expected = program.run()
    permute(*inferred(program))
    return expected, program.run()


def zeroed_outputs(program: Program) -> tuple[Any, Any]:
    """Outputs with half of each axis zeroed whose removal equals zeroing, and with it removed."""
    signature = program.signature
    inference, free = inferred(program)
    removal = halves(leaf for leaf in free if not leaf.inexact)
    zero(inference, removal)
    reference = program.run()
    remove(inference, removal)
    return reference, run_checked(program, signature)


def remove_half(outcome: Outcome, original: Program) -> Program:
    """What is left when half of every free axis is removed."""
    program = original.clone()
    start = time.process_time()
    inference, free = inferred(program)
    outcome.inferred = time.process_time() - start
    removal = halves(free)
    zero(inference, removal)
    reference = program.run()
    start = time.process_time()
    remove(inference, removal)
    outcome.inferred += time.process_time() - start
    outcome.kept = count(program) / count(original)
    outputs = run_checked(program, original.signature)
    refuse_degenerate(outputs, LEFT)
    if all(bool(tensor.isfinite().all()) for tensor in float_outputs(reference)):
        outcome.snr = signal_to_noise(reference, outputs)
    return program


def inferred(program: Program) -> tuple[Inference, list[Axis]]:
    """The axes of a program, and its free leaves."""
    inference = Inference(program).run()
    return inference, list(members(inference))


def refuse_degenerate(outputs: Any, least: float) -> None:
    """Refuses outputs that can't tell right from wrong."""
    for tensor in float_outputs(outputs):
        if not bool(tensor.isfinite().all()):
            raise ValueError("the outputs hold NaN or infinity")
        if tensor.dim() > 1 and len(tensor) > 1 and largest_error(tensor[0], tensor[1]) < least:
            raise ValueError("the outputs do not depend on the inputs")


def run_checked(program: Program, signature: Signature) -> Any:
    """Runs a rewritten program, whose shapes must fit together and whose outputs must be as they were."""
    program.graph.lint()
    propagate(program.module)
    if program.signature != signature:
        raise ValueError(f"the outputs are {program.signature.outputs}, were {signature.outputs}")
    return program.run()


def count(program: Program) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in program.module.parameters())


def share(inference: Inference, free: Iterable[Axis]) -> float:
    """Share of the parameters that lie under a free leaf."""
    chosen = set(free)
    total = under = 0
    for parameter in inference.program.module.parameters():
        axes = inference.stored.get(id(parameter), ())
        total += parameter.numel()
        under += parameter.numel() * any(leaf in chosen for axis in axes for leaf in axis.leaves())
    return under / total if total else 0.0


def lock_reasons(inference: Inference) -> dict[str, float]:
    """Why parameters keep all of their dimensions, by share of the parameters."""
    reasons: Counter[str] = Counter()
    parameters = list(inference.program.module.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        leaves = [leaf for axis in inference.stored.get(id(parameter), ()) for leaf in axis.leaves() if leaf.size != 1]
        if leaves and all(leaf.locks for leaf in leaves):
            reasons[" | ".join(dict.fromkeys(next(iter(leaf.locks)) for leaf in leaves))] += parameter.numel()
    return {reason: number / total for reason, number in reasons.most_common(TOP_LOCKS)}


def halves(leaves: Iterable[Axis]) -> Removal:
    """A random half of each leaf stays."""
    generator = torch.Generator().manual_seed(0)
    removal: Removal = {}
    for leaf in leaves:
        removal[leaf] = torch.zeros(leaf.size, dtype=torch.bool)
        removal[leaf][torch.randperm(leaf.size, generator=generator)[: max(1, leaf.size // 2)]] = True
    return removal


def permute(inference: Inference, leaves: Iterable[Axis]) -> None:
    """Permutes positions along every leaf, in every tensor that it runs through."""
    generator = torch.Generator().manual_seed(0)
    orders = {leaf: torch.randperm(leaf.size, generator=generator) for leaf in leaves}
    seen: set[int] = set()
    for node in inference.program.graph.find_nodes(op="get_attr"):
        tensor = inference.program.parameter(node)
        if id(tensor) not in seen:
            seen.add(id(tensor))
            for dim, axis in enumerate(inference.stored.get(id(tensor), ())):
                tensor.data = tensor.data.index_select(dim, permuted(axis, orders))


def permuted(axis: Axis, orders: Mapping[Axis, torch.Tensor]) -> torch.Tensor:
    """Which old position stands at each position of an axis whose leaves are permuted."""
    root = axis.find()
    if root.form is Form.LEAF:
        return orders[root] if root in orders else torch.arange(root.size)
    positions = torch.zeros(0 if root.form is Form.CONCATENATION else 1, dtype=torch.long)
    for part in root.parts:
        inner = permuted(part, orders)
        if root.form is Form.CONCATENATION:
            positions = torch.cat([positions, len(positions) + inner])
        else:
            positions = (positions[:, None] * len(inner) + inner).flatten()
    return positions


def child(sender: Connection, name: str, settings: argparse.Namespace) -> None:
    """Checks one model in a process of its own and sends what was found."""
    size = int(settings.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    torch.set_num_threads(1)
    outcome = Outcome(name)
    start = time.perf_counter()
    try:
        if settings.free:
            check_free(outcome, settings.largest)
        else:
            check(outcome, settings.export, settings.largest)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        outcome.failure += f": {' '.join(lines[:3])[:400]}"
    outcome.seconds = time.perf_counter() - start
    sender.send(dataclasses.asdict(outcome))


def run_one(name: str, settings: argparse.Namespace) -> Outcome:
    """Checks one model in a process of its own, with limits on time and memory."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, name, settings))
    process.start()
    sender.close()
    outcome = Outcome(name, failure=f"not done in {settings.timeout} s")
    try:
        if receiver.poll(settings.timeout):
            outcome = Outcome(**receiver.recv())
        else:
            process.kill()
    except EOFError:
        process.join()
        outcome.failure = f"the process died with {process.exitcode} (memory: {settings.memory} GiB allowed)"
    process.join()
    return outcome


def main() -> None:
    """Runs the chosen sets and writes the table."""
    settings = _settings()
    log = settings.output.with_suffix(".jsonl")
    done: dict[str, Outcome] = {}
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            outcome = Outcome(**json.loads(line))
            done[outcome.name] = outcome
    sets: dict[str, Callable[[], list[str]]] = {
        "torchvision": lambda: torchvision_models("classification"),
        "segmentation": lambda: torchvision_models("segmentation"),
        "video": lambda: torchvision_models("video"),
        "timm": lambda: timm_models(settings.output.with_name("timm_smallest.json")),
        "transformers": lambda: [f"transformers:{name}" for name in TINY],
        "own": lambda: [f"own:{name}" for name in OWN],
    }
    chosen = {
        set_name: [name for name in sets[set_name]() if any(fnmatch.fnmatch(name, f"*{p}") for p in settings.models)]
        for set_name in settings.set or sets
    }
    names = [name for entries in chosen.values() for name in entries][: settings.limit]
    missing = [name for name in names if name not in done or (settings.retry and done[name].failure)]
    missing = [] if settings.table else missing
    with log.open("a", encoding="utf-8") as file, concurrent.futures.ThreadPoolExecutor(settings.workers) as pool:
        for outcome in pool.map(lambda name: run_one(name, settings), missing):
            done[outcome.name] = outcome
            file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            file.flush()
            print(outcome.name, outcome.failure or "ok", f"{outcome.seconds or 0:.1f} s", flush=True)
    found = {
        set_name: [done.get(name, Outcome(name, failure=NOT_RUN)) for name in entries if name in names]
        for set_name, entries in chosen.items()
    }
    outcomes = [outcome for entries in found.values() for outcome in entries]
    explained = "\n".join((__doc__ or "").splitlines()[4:8])
    text = f"# {TITLE}\n\nMade by `{COMMAND}`.\n\n{explained}\n\n{summary(found)}\n{table(outcomes)}"
    if settings.free:
        text = f"# {FREE_TITLE}\n\n{free_summary(outcomes)}\n\n{free_table(outcomes)}"
    settings.output.write_text(text, encoding="utf-8")
    print(free_summary(outcomes) if settings.free else summary(found))
    raise SystemExit(any(outcome.failure for outcome in outcomes))


def table(outcomes: Iterable[Outcome]) -> str:
    """One row a model."""
    columns = ["model", "parameters", "traced (s)", "under a free axis", "free leaves", "kept"]
    columns += ["inference and surgery (s)", "permuted", "equals zeroing", "all halved (dB)", "ONNX parity", "failure"]
    drawn = new_table(f"Seconds of CPU time on {machine()}", columns)
    for outcome in outcomes:
        if outcome.failure == NOT_RUN:
            continue
        drawn.add_row(
            outcome.name,
            _figure(outcome.parameters, ","),
            _figure(outcome.traced, ".1f"),
            _figure(outcome.free, ".3f"),
            _figure(outcome.leaves, "d"),
            _figure(outcome.kept, ".3f"),
            _figure(outcome.inferred, ".2f"),
            _figure(outcome.permuted, ".0e"),
            _figure(outcome.zeroed, ".0e"),
            _figure(outcome.snr, ".0f"),
            _figure(outcome.parity, ".0e"),
            outcome.failure,
        )
    return to_markdown(drawn)


def free_summary(outcomes: Iterable[Outcome]) -> str:
    """How many models keep more than the batch free, and how many files agree."""
    ran = [outcome for outcome in outcomes if outcome.failure != NOT_RUN]
    passed = [outcome for outcome in ran if not outcome.failure]
    several = sum((outcome.sizes or 0) > 1 for outcome in passed)
    return (
        f"{len(ran)} models run, weights random, every size left free that their code allows; {len(passed)} files "
        f"agree with eager PyTorch, {several} of them at several sizes of text, audio or image; of the other "
        f"{len(passed) - several} the code fixes all sizes but the batch, and a note says where."
    )


def free_table(outcomes: Iterable[Outcome]) -> str:
    """One row a model."""
    drawn = new_table(
        f"Seconds of CPU time on {machine()}; error: largest, as a share of the output's range",
        ["model", "parameters", "inputs", "traced (s)", "sizes run", "error", "failure"],
    )
    for outcome in outcomes:
        if outcome.failure != NOT_RUN:
            figures = [_figure(outcome.traced, ".1f"), _figure(outcome.sizes, "d"), _figure(outcome.error, ".0e")]
            drawn.add_row(outcome.name, _figure(outcome.parameters, ","), outcome.inputs, *figures, outcome.failure)
    return to_markdown(drawn)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def summary(sets: Mapping[str, list[Outcome]]) -> str:
    """Counts and medians, one row a set of models."""
    columns = [
        "models",
        "pass",
        "not run",
        "under a free axis (median)",
        "kept (median)",
        "inference and surgery (median, s)",
    ]
    drawn = new_table("Summary", columns)
    everything = [outcome for outcomes in sets.values() for outcome in outcomes]
    for name, outcomes in {**sets, "all": everything}.items():
        passed = [outcome for outcome in outcomes if not outcome.failure]
        medians = [_median(passed, "free", ".3f"), _median(passed, "kept", ".3f"), _median(passed, "inferred", ".2f")]
        not_run = sum(outcome.failure == NOT_RUN for outcome in outcomes)
        drawn.add_row(name, f"{len(passed)} of {len(outcomes) - not_run}", str(not_run), *medians)
    return to_markdown(drawn)


def _median(outcomes: list[Outcome], name: str, form: str) -> str:
    return format(statistics.median(getattr(outcome, name) for outcome in outcomes), form) if outcomes else ""


def _settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = ["torchvision", "segmentation", "video", "timm", "transformers", "own"]
    parser.add_argument("--set", action="append", choices=sets, help="may be given again; default: all")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="as the shell matches names")
    parser.add_argument("--limit", type=int, help="no more models than that")
    parser.add_argument("--export", action="store_true", help="also write ONNX and compare it with PyTorch")
    parser.add_argument("--free", action="store_true", help="leave all sizes free instead, and run three of them")
    parser.add_argument("--retry", action="store_true", help="run those again that failed")
    parser.add_argument("--table", action="store_true", help="write the table of what was run, and run no more")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for one model")
    parser.add_argument("--memory", type=float, default=12.0, help="address space of one process, GiB")
    parser.add_argument("--largest", type=float, default=2e8, help="parameters of the largest model to build")
    parser.add_argument("--output", type=Path, default=Path("zoo.md"))
    return parser.parse_args()


if __name__ == "__mp_main__":  # the process that all others are forked from
    torch.set_num_threads(1)
    declare_torchvision_operators()
    with quiet():
        import timm  # noqa: F401
        import torchvision  # noqa: F401
        import transformers.modeling_utils  # noqa: F401

if __name__ == "__main__":
    main()
