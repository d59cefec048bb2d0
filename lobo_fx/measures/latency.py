"""Latency: sessions of any runtime run in turn in one process, so that ratios are meaningful."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_readable
from lobo_fx.measures.memory import peak_memory
from lobo_fx.plugins.protocols import Arrays, ArraySpec, Runtime, Session
from lobo_fx.terminal.progress import track
from lobo_fx.terminal.tables import decimals, new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "LENGTH",
    "MEGABYTE",
    "Benchmark",
    "Latency",
    "benchmark",
    "benchmark_table",
    "check_counts",
    "interleave",
    "random_arrays",
    "random_shape",
]

MEGABYTE = 1e6

LENGTH = 64
"""Size of a free dimension of random inputs that does not count rows: of a sequence, or of an image's sides."""

_OWN_SHARE = 0.8
"""Least share of the wall time that is CPU time on a quiet machine. Kernels compute and never wait, so the rest went to
other programs; clocks and the scheduler explain a few hundredths."""
_TURN, _MOST_CALLS = 1e-3, 100
"""Seconds that a function runs before the next one does, and most calls in that time."""
_SPREAD = 2.0
"""Largest ratio of p95 to p5 on a quiet machine: every call computes the same, and clock changes explain less."""


def benchmark_table(benchmark: Benchmark) -> Table:
    """A line per file measured."""
    title = (
        f"{benchmark.runtime}, {benchmark.threads} thread{'s' * (benchmark.threads > 1)}, "
        f"batch {benchmark.batch}, {benchmark.rounds} rounds in turn"
    )
    table = new_table(
        title,
        ["file", "CPU ratio", "p50 ratio", "CPU ms", "p5 ms", "p50 ms", "p95 ms", "rows/s", "peak MB", "model MB"],
    )
    for label, latency in benchmark.latencies.items():
        known = latency.memory is not None and latency.base_memory is not None
        table.add_row(
            label,
            f"{benchmark.ratio(label):.2f}",
            f"{benchmark.ratio(label, 'p50'):.2f}",
            *(decimals(value) for value in (latency.cpu, latency.p5, latency.p50, latency.p95)),
            f"{latency.throughput:.1f}",
            f"{(latency.memory or 0) / MEGABYTE:.0f}" if known else "not measured",
            f"{((latency.memory or 0) - (latency.base_memory or 0)) / MEGABYTE:.0f}" if known else "not measured",
        )
    return table


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of one call, in milliseconds.

    Attributes:
        p5: wall time that 5 % of the calls stay under.
        p50: median wall time.
        p95: wall time that 95 % of the calls stay under.
        cpu: median process CPU time, all threads together.
        throughput: rows a second at the median.
        memory: peak memory of a fresh process that loads and runs the file, in bytes; None if not measured.
        base_memory: peak memory of that process before it loads the file, in bytes.
        cpu_ratio: median over the rounds of the mean CPU time of a call, divided by that of the first file in the same
            round; None if the clock ticks too slowly, and in records of earlier versions.
    """

    p5: float
    p50: float
    p95: float
    cpu: float
    throughput: float
    memory: int | None = None
    base_memory: int | None = None
    cpu_ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Files measured in turn, in one run.

    Attributes:
        runtime: name and version.
        threads: threads of the runtime.
        batch: rows of the inputs.
        rounds: how often each file had its turn.
        latencies: by label, the reference first.
    """

    runtime: str
    threads: int
    batch: int
    rounds: int
    latencies: Mapping[str, Latency]

    def ratio(self, label: str, measure: str = "cpu") -> float:
        """`label` divided by the reference, in one measure of `Latency`; under 1 is faster.

        CPU time is compared round by round: other work slows the files of a round alike. If the reference's CPU time is
        0, as calls are shorter than a tick of the CPU clock, median wall times are compared.
        """
        reference, found = next(iter(self.latencies.values())), self.latencies[label]
        if measure == "cpu" and found.cpu_ratio is not None:
            return found.cpu_ratio
        measure = measure if getattr(reference, measure) else "p50"
        return float(getattr(found, measure) / getattr(reference, measure))

    @property
    def busy(self) -> list[str]:
        """Signs that the machine did other work meanwhile, one sentence each; empty if it was quiet."""
        said = []
        for label, latency in self.latencies.items():
            signs = []
            if latency.cpu < _OWN_SHARE * latency.p50:
                signs.append(f"{latency.cpu / latency.p50:.0%} of its wall time was on the processor")
            if latency.p95 > _SPREAD * latency.p5:
                signs.append(f"p95 is {latency.p95 / latency.p5:.1f} times p5")
            if signs:
                said.append(
                    f"the machine was busy while {label} was measured ({', '.join(signs)}): trust the CPU ratio, "
                    "and measure again when it is quiet"
                )
        return said

    def __str__(self) -> str:
        from lobo_fx.terminal.tables import printable, render

        return render(benchmark_table(self)) + "".join(f"note: {printable(sign)}\n" for sign in self.busy)


def benchmark(
    files: Mapping[str, Path],
    runtime: Runtime,
    *,
    arrays: Arrays | None = None,
    threads: int = 1,
    batch: int = 1,
    length: int = LENGTH,
    rounds: int = 30,
    warmup: int = 3,
    memory: bool = True,
    progress: bool = True,
) -> Benchmark:
    """Measures files in turn: one call of each, or a millisecond of short ones, so that a slow moment hits all alike.

    Args:
        files: by label, the reference first.
        runtime: the runtime that runs them.
        arrays: inputs, the same for all; random data of the first file's input shapes by default.
        threads: threads of the runtime.
        batch: rows of the inputs, where the batch is free; the result holds the actual number.
        length: size of every other free dimension of random inputs.
        rounds: how many turns each file has.
        warmup: turns of each file that are not counted.
        memory: also measure peak memory, in a fresh process for each file.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInput: a number makes no sense, a file is missing or damaged or does not run on the inputs, or the files
            take different inputs.
    """
    check_counts(threads, batch, rounds, warmup, length)
    if not files:
        raise InvalidInput("there is no file to measure")
    for path in files.values():
        check_readable(path)
    sessions = {label: runtime.load(path, threads) for label, path in files.items()}
    specs = next(iter(sessions.values())).inputs
    for label, session in sessions.items():
        if session.inputs != specs:
            first, theirs, own = next(iter(sessions)), _names(specs), _names(session.inputs)
            raise InvalidInput(f"files in turn get the same inputs; '{first}' takes {theirs}, '{label}' {own}")
    feed = random_arrays(specs, batch, length) if arrays is None else arrays
    advice = "give other inputs" if arrays else "give other sizes with batch= and length= (--batch and --length)"
    _check_arrays(specs, feed)
    rows = _rows(specs, feed)
    calls = {label: _call(session, feed, f"{files[label]} does not run", advice) for label, session in sessions.items()}
    latencies = interleave(calls, rounds=rounds, warmup=warmup, rows=rows, progress=progress)
    if memory:
        kind = type(runtime)
        for label, path in files.items():
            base, peak = peak_memory(path, f"{kind.__module__}:{kind.__qualname__}", threads, feed)
            latencies[label] = dataclasses.replace(latencies[label], memory=peak, base_memory=base)
    return Benchmark(runtime.version, threads, rows, rounds, latencies)


def check_counts(threads: int = 1, batch: int = 1, rounds: int = 1, warmup: int = 0, length: int = 1) -> None:
    """Refuses settings of a benchmark that make no sense, before any work.

    Raises:
        InvalidInput: one is no whole number, or too small.
    """
    counts = {"threads": (threads, 1), "batch": (batch, 1), "length": (length, 1)}
    counts |= {"rounds": (rounds, 1), "warmup": (warmup, 0)}
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInput(f"{name} is {value!r}; it must be a whole number, at least {least}")


def _names(specs: list[ArraySpec]) -> str:
    return " and ".join(map(str, specs)) or "nothing"


def _check_arrays(specs: list[ArraySpec], arrays: Arrays) -> None:
    for spec in specs:
        if spec.name not in arrays:
            raise InvalidInput(f"arrays lacks the input '{spec.name}'; it has: {', '.join(arrays) or 'none'}")
        array = arrays[spec.name]
        fits = len(array.shape) == len(spec.shape) and all(
            want in (None, have) for want, have in zip(spec.shape, array.shape, strict=True)
        )
        if array.dtype != spec.dtype or not fits:
            shape = ", ".join("any" if size is None else str(size) for size in spec.shape)
            raise InvalidInput(
                f"the input '{spec.name}' is {array.dtype} {list(array.shape)}; the file takes {spec.dtype} [{shape}]"
            )


def _rows(specs: list[ArraySpec], arrays: Arrays) -> int:
    """Rows of one call: of the first input with free rows, else of the first input with dimensions."""
    ranked = [spec for spec in specs if spec.shape]
    chosen = next((spec for spec in ranked if spec.shape[0] is None), ranked[0] if ranked else None)
    return len(arrays[chosen.name]) if chosen else 1


def _call(session: Session, arrays: Arrays, fault: str, advice: str) -> Callable[[], object]:
    def run() -> object:
        try:
            return session.run(arrays)
        except Exception as error:
            sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            reason = " ".join(str(error).split())
            raise InvalidInput(f"{fault} on inputs of {sizes or 'no size'}; {advice}: {reason}") from error

    return run


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, rows: int, progress: bool = False
) -> dict[str, Latency]:
    """Times functions in turn, `rounds` turns each after `warmup` uncounted ones.

    A turn is one call, or as many as fill a millisecond: otherwise a short function would find the data of the others
    in the caches instead of its own. Every call is timed separately. The first function is the reference of ratios.
    """
    wall: dict[str, list[list[float]]] = {label: [] for label in calls}  # by round, of each call
    cpu: dict[str, list[list[float]]] = {label: [] for label in calls}
    for index in track(range(-warmup, rounds), "benchmark", progress):
        for label, call in calls.items():
            found = list(_turn(call))
            if index >= 0:
                wall[label].append([1e3 * seconds for seconds, _ in found])
                cpu[label].append([1e3 * seconds for _, seconds in found])
    first = next(iter(calls))
    latencies = {}
    for label in calls:
        every, on_cpu = ([time for turn in turns for time in turn] for turns in (wall[label], cpu[label]))
        p5, p50, p95 = (float(value) for value in np.percentile(every, [5, 50, 95]))
        latencies[label] = Latency(
            p5,
            p50,
            p95,
            # If the CPU clock ticks more slowly than a call takes, most times are 0, but their mean is right.
            statistics.median(on_cpu) or statistics.fmean(on_cpu),
            1e3 * rows / p50,
            cpu_ratio=_by_round(cpu[label], cpu[first]),
        )
    return latencies


def _turn(call: Callable[[], object]) -> Iterator[tuple[float, float]]:
    """Wall and CPU seconds of each call of a turn."""
    until = time.perf_counter() + _TURN
    for _ in range(_MOST_CALLS):
        cpu_start, start = time.process_time(), time.perf_counter()
        call()
        end, cpu_end = time.perf_counter(), time.process_time()
        yield end - start, cpu_end - cpu_start
        if end >= until:
            break


def _by_round(times: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> float | None:
    """The median, over the rounds, of the mean time of a call divided by the reference's; None if any mean is 0."""
    means = [(statistics.fmean(own), statistics.fmean(its)) for own, its in zip(times, reference, strict=True)]
    return statistics.median(own / its for own, its in means) if all(map(all, means)) else None


def random_shape(spec: ArraySpec, batch: int, length: int = LENGTH) -> list[int]:
    """The shape of a random input: `batch` for a free first dimension, `length` for every other free one."""
    return [(length if at else batch) if size is None else size for at, size in enumerate(spec.shape)]


def random_arrays(
    specs: list[ArraySpec], batch: int, length: int = LENGTH, seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs: normal floats, zero integers (a token that every vocabulary has).

    Args:
        specs: the inputs of a file.
        batch: size of a free first dimension.
        length: size of every other free dimension.
        seed: seed of the floats.

    Raises:
        InvalidInput: there is no memory for arrays of these sizes.
    """
    generator = np.random.default_rng(seed)
    arrays = {}
    for spec in specs:
        shape = random_shape(spec, batch, length)
        floats = np.issubdtype(np.dtype(spec.dtype), np.floating)
        try:
            values = generator.standard_normal(shape) if floats else np.zeros(shape)
            arrays[spec.name] = values.astype(spec.dtype)
        except (MemoryError, ValueError) as error:  # a ValueError where a size is beyond what an array may have
            raise InvalidInput(f"the input '{spec.name}' can't be made with sizes {shape}: {error}") from error
    return arrays
