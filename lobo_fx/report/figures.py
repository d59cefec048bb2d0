"""The figures that runs are compared by: size, speed, score, memory; None where not measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from lobo_fx.measures.latency import Benchmark, Latency
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.report.records import Row

__all__ = [
    "METRICS",
    "ROWS",
    "Conditions",
    "Figures",
    "Metric",
    "families",
    "front",
    "quality_metric",
    "ranking_metric",
]

ROWS = "rows"
"""The default unit of rates: rows of the inputs, at the median latency."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The conditions of measurements; empty or None where not known.

    Attributes:
        machine: processor, system and Python.
        versions: versions of packages.
        seed: seed of random draws.
        runtime: runtime that ran the files.
        threads: threads of the runtime.
        batch: rows of the inputs.
    """

    machine: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    runtime: str = ""
    threads: int | None = None
    batch: int | None = None

    def __str__(self) -> str:
        packages = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        threads = None if self.threads is None else f"{self.threads} thread{'s' * (self.threads > 1)}"
        batch = None if self.batch is None else f"batch {self.batch}"
        seed = None if self.seed is None else f"seed {self.seed}"
        return "; ".join(part for part in (self.machine, packages, self.runtime, threads, batch, seed) if part)


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of one run; what was not measured is None.

    Attributes:
        name: name of the run.
        model: the compiled model.
        group: the technique; the best run of each group is shown. Empty for none.
        fault: why there is no file that agrees with the model; empty if there is one.
        bytes: size of the compiled file.
        original_bytes: size of the original's file.
        gzip_bytes: size of the compiled file after gzip.
        original_gzip_bytes: size of the original's file after gzip.
        milliseconds: median latency of the compiled file.
        original_milliseconds: median latency of the original's file, measured in turn with it.
        memory: peak memory of a process that runs the compiled file.
        original_memory: likewise for the original's file.
        added_memory: memory that loading and running the compiled file adds to that process.
        original_added_memory: likewise for the original's file.
        rate: units processed per second.
        original_rate: likewise for the original's file.
        unit: unit of the rate: rows at the median latency, or what a benchmark timed.
        score: score of the compiled model.
        original_score: score of the original.
        decibels: signal-to-noise ratio of the outputs against the original's.
        parameters: number of parameters of the compiled model.
        nonzero: how many of them are not zero.
        original_parameters: number of parameters of the original.
        seconds: time of all passes.
        conditions: conditions of the measurements.
    """

    name: str
    model: str
    group: str = ""
    fault: str = ""
    bytes: int | None = None
    original_bytes: int | None = None
    gzip_bytes: int | None = None
    original_gzip_bytes: int | None = None
    milliseconds: float | None = None
    original_milliseconds: float | None = None
    memory: int | None = None
    original_memory: int | None = None
    added_memory: int | None = None
    original_added_memory: int | None = None
    rate: float | None = None
    original_rate: float | None = None
    unit: str = ROWS
    score: float | None = None
    original_score: float | None = None
    decibels: float | None = None
    parameters: int | None = None
    nonzero: int | None = None
    original_parameters: int | None = None
    seconds: float | None = None
    conditions: Conditions = dataclasses.field(default_factory=Conditions)

    @classmethod
    def of(
        cls,
        name: str,
        model: str,
        rows: Sequence[Row],
        artifacts: Mapping[str, Artifact],
        benchmark: Benchmark | None,
        conditions: Conditions,
    ) -> Figures:
        """The figures of a report's contents."""
        sizes = {label: artifact.bytes for label, artifact in artifacts.items()}
        zipped = {label: artifact.known_gzip_bytes for label, artifact in artifacts.items()}
        known = {} if benchmark is None else benchmark.latencies
        new, old = known.get("compiled"), known.get("original")
        first, last = (rows[0], rows[-1]) if rows else (None, None)
        return cls(
            name,
            model,
            bytes=sizes.get("compiled"),
            original_bytes=sizes.get("original"),
            gzip_bytes=zipped.get("compiled"),
            original_gzip_bytes=zipped.get("original"),
            milliseconds=None if new is None else new.p50,
            original_milliseconds=None if old is None else old.p50,
            memory=None if new is None else new.memory,
            original_memory=None if old is None else old.memory,
            added_memory=_added(new),
            original_added_memory=_added(old),
            rate=None if new is None else new.throughput,
            original_rate=None if old is None else old.throughput,
            score=None if last is None else last.score,
            original_score=None if first is None else first.score,
            decibels=None if last is None or math.isnan(last.snr) else last.snr,
            parameters=None if last is None else last.parameters,
            nonzero=None if last is None else last.nonzero,
            original_parameters=None if first is None else first.parameters,
            seconds=sum(row.seconds for row in rows) if rows else None,
            conditions=conditions,
        )

    @property
    def share(self) -> float | None:
        """Size of the compiled file as a share of the original's."""
        return _quotient(self.bytes, self.original_bytes)

    @property
    def smaller(self) -> float | None:
        """How many times as small the compiled file is."""
        return _quotient(self.original_bytes, self.bytes)

    @property
    def faster(self) -> float | None:
        """How many times as fast the compiled file is."""
        return _quotient(self.original_milliseconds, self.milliseconds)

    @property
    def change(self) -> float | None:
        """Change of the score; negative where it fell."""
        return None if self.score is None or self.original_score is None else self.score - self.original_score

    @property
    def kept(self) -> float | None:
        """Share of the original's score; None also if the original's is not positive, or this one's negative."""
        if self.score is None or self.original_score is None or self.score < 0 or self.original_score <= 0:
            return None
        return self.score / self.original_score

    @property
    def removed(self) -> float | None:
        """Share of the original's parameters that are gone or zero."""
        kept = _quotient(self.nonzero, self.original_parameters)
        return None if kept is None else 1 - kept

    @property
    def gain(self) -> float | None:
        """Geometric mean of times as small and times as fast."""
        return None if self.smaller is None or self.faster is None else math.sqrt(self.smaller * self.faster)

    @property
    def efficiency(self) -> float | None:
        """The gain, times the share of the score that is kept."""
        return None if self.gain is None or self.kept is None else self.gain * self.kept


def _added(latency: Latency | None) -> int | None:
    if latency is None or latency.memory is None or latency.base_memory is None:
        return None
    return latency.memory - latency.base_memory


def _quotient(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric that runs are ranked by.

    Attributes:
        name: name in headings.
        of: gives the value of a run; None if it was not measured.
        unit: format of a value.
        is_less_better: whether lower values are better.
        meaning: its meaning, in words.
    """

    name: str
    of: Callable[[Figures], float | None]
    unit: str
    is_less_better: bool
    meaning: str

    def ranked(self, runs: Sequence[Figures]) -> list[Figures]:
        """The measured runs, best first."""
        known = [(value, run) for run in runs if (value := self.of(run)) is not None and not math.isnan(value)]
        return [run for _, run in sorted(known, key=lambda pair: pair[0] if self.is_less_better else -pair[0])]

    def shown(self, run: Figures) -> str:
        """The value of a run in words."""
        value = self.of(run)
        return "not measured" if value is None else "∞" if value == math.inf else self.unit.format(value)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("size", lambda run: run.share, "{:.1%}", True, "size of the file as a share of the original's"),
        Metric("speed", lambda run: run.faster, "{:.2f} x", False, "the original's median latency over this one's"),
        Metric(
            "memory",
            lambda run: _quotient(run.added_memory, run.original_added_memory),
            "{:.1%}",
            True,
            "memory that loading and running the file takes, as a share of the original's",
        ),
        Metric(
            "rate",
            lambda run: _quotient(run.rate, run.original_rate),
            "{:.2f} x",
            False,
            "what is processed in a second, over what the original does",
        ),
        Metric("score", lambda run: run.score, "{:.4g}", False, "what evaluate returned"),
        Metric("decibels", lambda run: run.decibels, "{:.1f} dB", False, "outputs against the original's"),
        Metric(
            "efficiency",
            lambda run: run.efficiency,
            "{:.2f}",
            False,
            "geometric mean of times as small and times as fast, times the share of the score that is kept",
        ),
        Metric("gain", lambda run: run.gain, "{:.2f}", False, "geometric mean of times as small and times as fast"),
    )
}


def front(runs: Sequence[Figures], names: Sequence[str]) -> list[Figures]:
    """Runs that no other one beats in all named metrics; runs that lack one of them are left out."""
    metrics = [METRICS[name] for name in names]
    costs = {}  # by place, as names differ only within a model
    for place, run in enumerate(runs):
        values = [metric.of(run) for metric in metrics]
        if None not in values:
            signs = (1 if metric.is_less_better else -1 for metric in metrics)
            costs[place] = tuple(s * v for s, v in zip(signs, values, strict=True) if v is not None)
    return [
        run
        for place, run in enumerate(runs)
        if place in costs
        and not any(
            other != costs[place] and all(o <= c for o, c in zip(other, costs[place], strict=True))
            for other in costs.values()
        )
    ]


def quality_metric(runs: Sequence[Figures]) -> Metric:
    """The metric of quality: the score if any run has one, else decibels."""
    return METRICS["score" if any(run.score is not None for run in runs) else "decibels"]


def ranking_metric(runs: Sequence[Figures]) -> Metric:
    """Efficiency if any run has a share of its score that is kept, else the gain in size and speed alone."""
    return METRICS["efficiency" if any(run.kept is not None for run in runs) else "gain"]


def families(runs: Sequence[Figures]) -> list[list[int]]:
    """Indices of the runs that are ranked together: those of each model, if every model has several.

    If a model has only one run, the models are what is compared, and all runs are one family.
    """
    found: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        found.setdefault(run.model, []).append(place)
    return list(found.values()) if all(len(places) > 1 for places in found.values()) else [list(range(len(runs)))]
