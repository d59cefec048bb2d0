"""Recommendations in plain language, computed from the figures of runs, each with the figures it rests on."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from lobo_fx.report.figures import METRICS, Figures, front, quality_metric, ranking_metric

__all__ = ["Advice", "advise"]

_LOSSLESS = 0.99
"""Least share of the original's score that counts as without loss."""

_LITTLE = 1.05
"""A step along the front that makes files less than this many times as small or fast gains little."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """One recommendation.

    Attributes:
        text: the sentence.
        rests_on: the figures that it was computed from, in words.
    """

    text: str
    rests_on: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.text} (rests on: {'; '.join(self.rests_on)})"


def advise(runs: Sequence[Figures]) -> list[Advice]:
    """Recommendations from the figures; empty if none follows."""
    return [*_one_alone(runs), *_without_loss(runs), *_best(runs), *_steps(runs), *_beaten(runs), *_slow(runs),
            *_unmeasured(runs)]  # fmt: skip


def _said(run: Figures, *names: str) -> tuple[str, ...]:
    return tuple(f"{name} of {run.name}: {METRICS[name].shown(run)}" for name in names)


def _times(value: float) -> str:
    return f"{value:.2f} times"


def _one_alone(runs: Sequence[Figures]) -> Iterator[Advice]:
    """One run is best in everything."""
    quality = quality_metric(runs).name
    if len(runs) < 2:
        return
    ranked = [METRICS[name].ranked(runs) for name in ("size", "speed", quality)]
    if any(len(found) < sum(not run.fault for run in runs) for found in ranked):
        return  # a run that was not measured may be the best
    if all(found[0] is ranked[0][0] for found in ranked):
        best = ranked[0][0]
        yield Advice(
            f"Take {best.name}: it is the smallest, the fastest and the best in {quality} of the {len(runs)} runs.",
            _said(best, "size", "speed", quality),
        )


def _without_loss(runs: Sequence[Figures]) -> Iterator[Advice]:
    """The fastest and the smallest run that keep the score."""
    keeping = [run for run in runs if run.kept is not None and run.kept >= _LOSSLESS]
    for name, word in (("speed", "fastest"), ("size", "smallest")):
        for best in METRICS[name].ranked(keeping)[:1]:
            yield Advice(
                f"Where no more than {1 - _LOSSLESS:.0%} of the score may be lost, {best.name} is the {word} "
                f"of {len(keeping)} run{'s' * (len(keeping) > 1)}: {best.kept:.2%} of the original's score is kept.",
                (*_said(best, name, "score"), f"score of the original: {best.original_score:.4g}"),
            )


def _best(runs: Sequence[Figures]) -> Iterator[Advice]:
    """The best runs in size, in speed and in both together, each run once."""
    if len(runs) < 2:
        return
    quality = quality_metric(runs).name
    wishes = {
        "size": "the smallest file",
        "speed": "the lowest latency",
        ranking_metric(runs).name: "the most size and speed together",
    }
    granted: dict[int, list[str]] = {}  # by identity, as names differ only within a model
    for name in wishes:
        for best in METRICS[name].ranked(runs)[:1]:
            granted.setdefault(id(best), []).append(name)
    for best in runs:
        if names := granted.get(id(best)):
            rest = "" if METRICS[quality].of(best) is None else f", at {_quality_words(best, quality)}"
            *others, last = (wishes[name] for name in names)
            wished = f"{', '.join(others)} and {last}" if others else last
            text = f"For {wished} take {best.name}: {_gains(best)}{rest}."
            yield Advice(text, _said(best, *dict.fromkeys((*names, "size", "speed", quality))))


def _gains(run: Figures) -> str:
    parts = [f"{_times(value)} as {word}" for value, word in ((run.smaller, "small"), (run.faster, "fast")) if value]
    return " and ".join(parts) or "what else it brings was not measured"


def _quality_words(run: Figures, quality: str) -> str:
    if quality == "score":
        change = "" if run.change is None else f" ({run.change:+.4g} against the original)"
        return f"a score of {METRICS['score'].shown(run)}{change}"
    if run.decibels == math.inf:
        return "outputs equal to the original's"
    return METRICS["decibels"].shown(run)


def _steps(runs: Sequence[Figures]) -> Iterator[Advice]:
    """Steps along the front, from the most faithful run on, that cost quality and gain little."""
    quality = quality_metric(runs).name
    of = METRICS[quality].of
    along = METRICS["speed"].ranked(front(runs, ["speed", quality]))[::-1]
    for slow, fast in itertools.pairwise(along):
        ratio, before, after = (fast.faster or 0) / (slow.faster or 1), of(slow), of(fast)
        if before is None or after is None or not after < before < math.inf:
            continue
        if ratio < _LITTLE:
            yield Advice(
                f"From {slow.name} to {fast.name} little is won: {_times(ratio)} the speed for "
                f"{before - after:.4g} less {quality}.",
                (*_said(slow, "speed", quality), *_said(fast, "speed", quality)),
            )


def _beaten(runs: Sequence[Figures]) -> Iterator[Advice]:
    """Runs that another one beats in size, speed and quality alike."""
    names = ("size", "speed", quality_metric(runs).name)
    best = front(runs, names)
    kept = set(map(id, best))
    beaten: dict[int, list[Figures]] = {}
    for run in runs:
        if id(run) not in kept and all(METRICS[name].of(run) is not None for name in names):
            winner = next(other for other in best if front([other, run], names) == [other])
            beaten.setdefault(id(winner), []).append(run)
    for winner in best:
        if losers := beaten.get(id(winner)):
            yield Advice(
                f"Nothing speaks for {', '.join(run.name for run in losers)}: {winner.name} is no worse in size, speed "
                f"and {names[2]}, and better in one of them.",
                (*itertools.chain.from_iterable(_said(run, *names) for run in losers), *_said(winner, *names)),
            )


def _slow(runs: Sequence[Figures]) -> Iterator[Advice]:
    for run in runs:
        if run.faster is not None and round(run.faster, 2) < 1:
            yield Advice(
                f"{run.name} is slower than the original: {_times(run.faster)} as fast.",
                (
                    f"latency of {run.name}: {run.milliseconds:.3f} ms",
                    f"of the original: {run.original_milliseconds:.3f} ms",
                ),
            )


def _unmeasured(runs: Sequence[Figures]) -> Iterator[Advice]:
    """Runs that a ranking leaves out, as they were not measured."""
    scored = any(run.score is not None for run in runs)
    for name in ("size", "speed", *(["score"] if scored else [])):
        missing = [run.name for run in runs if METRICS[name].of(run) is None]
        if missing:
            yield Advice(
                f"The {name} of {', '.join(missing)} was not measured: no ranking by {name} says anything of "
                f"{'it' if len(missing) == 1 else 'them'}.",
                tuple(f"{name} of {run}: not measured" for run in missing),
            )
