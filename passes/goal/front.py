"""The candidates of a search, which can be compiled without searching again, and their table in the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from lobo_fx.contracts.candidates import CANDIDATES, Candidate
from lobo_fx.contracts.context import Context
from lobo_fx.measures.fidelity import decibels
from lobo_fx.passes.goal.programs import Built, Programs
from lobo_fx.report.records import Sheet

__all__ = ["candidates_of", "tell"]


def candidates_of(programs: Programs, best: Built, context: Context) -> list[Candidate]:
    """All candidates: whole programs as they were measured, the others as they are expected."""
    found = []
    rounding: dict[str, float] = {}
    for built in programs.built:
        size = round(built.measured["size"] * programs.costs.original["size"])
        predicted = programs.costs.expected(built.precision, "latency", built.widths)
        measured = built.measured["latency"] if programs.settings.costs is None else None
        found.append(
            Candidate(
                built.precision.name,
                programs.settings.applying(built.plan),
                context.made_by,
                programs.start,
                predicted,
                measured,
                size,
                built.verdict.whole,
                built.score,
                built is best,
            )
        )
        known = programs.rounding(built)
        if known is not None:
            rounding[built.precision.name] = known
    of_variance = decibels(1.0, best.noise)  # noise is relative to the variance, a verdict's decibels to the energy
    shift = best.verdict.whole - of_variance if math.isfinite(of_variance + best.verdict.whole) else 0.0
    whole = {(built.precision.name, tuple(built.widths.values())) for built in programs.built}
    tried = {(entry[0].name, tuple(entry[1].values())): entry for entry in programs.tried}
    for precision, widths, noise in (entry for key, entry in tried.items() if key not in whole):
        expected = decibels(1.0, noise + rounding.get(precision.name, 0.0)) + shift
        predicted = programs.costs.expected(precision, "latency", widths)
        size = round(programs.costs.expected(precision, "size", widths) * programs.costs.original["size"])
        plan = programs.plan(precision, widths, programs.cut(widths)[1])
        made = programs.settings.applying(dataclasses.replace(plan, expected={"decibels": expected}))
        found.append(Candidate(precision.name, made, context.made_by, programs.start, predicted, None, size, expected))
    return found


def tell(programs: Programs, best: Built, limits: Mapping[str, float], context: Context) -> None:
    """Puts the candidates, their table, and the one that was taken into the report.

    Args:
        programs: all programs that the search looked at.
        best: the program that is taken.
        limits: limits as shares of the original's.
        context: context of the report.
    """
    candidates = candidates_of(programs, best, context)
    context.candidates.extend(candidates)
    context.notes.extend(note for note in best.notes if note not in context.notes)
    rows = tuple(
        (
            round(candidate.latency, 4),
            round(candidate.decibels, 2),
            candidate.bytes,
            "" if candidate.score is None else round(candidate.score, 4),
            candidate.name,
            "measured" if candidate.measured is not None else "predicted",
            "taken" if candidate.chosen else "",
        )
        for candidate in sorted(candidates, key=lambda candidate: candidate.latency)
    )
    columns = ("latency, of the original's", "dB", "bytes", "score", "precision", "latency is", "")
    context.sheets.append(Sheet(CANDIDATES, columns, rows))
    taken = [f"{name} {best.measured[name]:.3f} of the original's" for name in best.measured]
    taken += [f"{best.verdict.whole:.1f} dB", *([] if best.score is None else [f"score {best.score:.4g}"])]
    goal = programs.settings.goal
    losses = {"drop": goal.drop, "decibels": goal.decibels}
    asked = [f"{name} {limit:.3f}" for name, limit in limits.items()]
    asked += [f"{name} {limit:g}" for name, limit in losses.items() if limit is not None]
    count, took = len(programs.tried), best.precision.name
    tried = f"{count} candidate{'s' * (count != 1)}"
    context.note(f"fit_goal took {took}, of {tried}: {', '.join(taken)}; asked for: {', '.join(asked)}")
    if programs.settings.costs is not None:
        context.note("latency is what the cost table says of another machine: nothing was measured there")
