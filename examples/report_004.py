"""Report 004 with our own figures: a neural receiver pruned, quantized and distilled, by its bit error rate.

    python examples/report_004.py [-o folder] [--results file] [--quick]

The report shows size, size after gzip, zeros and bit error rate of a hundred thousand parameters compressed in 22 ways,
and the best of each category. `benchmarks/report_004.py` trains and measures, and this reads its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from reported import options, original_row, read_results, run_of, show

from lobo_fx.report.comparison import Comparison
from lobo_fx.report.curves import Curve, Line
from lobo_fx.report.records import Sheet

KINDS = {
    "magnitude": "Magnitude pruning",
    "random": "Random pruning",
    "structured": "Structured pruning",
    **dict.fromkeys(("dynamic", "static", "qat"), "Integers"),
    **dict.fromkeys(("log2", "e4m3", "e5m2", "e3m4"), "Few bits"),
    "student": "Students",
}
Row = Mapping[str, Any]


def kind_of(name: str) -> str:
    """The technique of a row."""
    return KINDS.get(name.split()[0].split("_")[0], "")


def group_of(name: str) -> str:
    """The technique, and how it was trained."""
    kind, _, training = name.partition(" ")
    return ", ".join(filter(None, (kind_of(kind), training)))


def rates_of(name: str, rates: Mapping[str, float], is_reference: bool = False) -> Line:
    """Bit error rates over the signal-to-noise ratio."""
    points = sorted((float(snr), rate) for snr, rate in rates.items() if rate > 0)  # no error has no logarithm
    return Line(name, tuple(points), is_reference)


def curves(rows: Mapping[str, Row], original: Row) -> list[Curve]:
    """One for each technique, with the original and the exact demapper."""
    references = rates_of("original", original["rates"], True), rates_of("exact demapper", original["exact"], True)
    lines: dict[str, list[Line]] = {}
    for name, row in rows.items():
        if kind := kind_of(name):
            lines.setdefault(kind, []).append(rates_of(name, row["rates"]))
    axes = "signal-to-noise ratio, dB", "bit error rate"
    return [Curve(f"{kind}, bit errors", *axes, (*found, *references), True) for kind, found in lines.items()]


def mean(rates: Mapping[str, float]) -> float:
    """Over all signal-to-noise ratios."""
    return sum(rates.values()) / len(rates)


def main() -> None:
    """Reads the results and writes all forms."""
    chosen = options(__doc__ or "", "report_004", results=True)
    networks = read_results(chosen.results)
    (network, rows), *_ = networks.items()
    original = original_row(rows)
    runs = [
        dataclasses.replace(
            run_of(network, name, row, original),
            group=group_of(name),
            score=1 - 2 * mean(row["rates"]),
            original_score=1 - 2 * mean(original["rates"]) if original else None,
        )
        for name, row in rows.items()
    ]
    worst = {
        name: max(rate / original["rates"][snr] for snr, rate in row["rates"].items())
        for name, row in rows.items()
        if original is not None
    }
    comparison = Comparison(
        runs,
        "Report 004: a neural receiver, compressed",
        "one minus twice the bit error rate of the exported file, over all signal-to-noise ratios: guessing gives 0",
        ["Latency is of one thread, in turn with the original. Bit errors are of slots that no training saw."],
        [
            Sheet(
                "bit errors at worst",
                ("run", "times the original's, at the worst ratio", "within 1.2 times", "mean bit error rate"),
                tuple(
                    (name, times, "yes" if times <= 1.2 else "no", mean(rows[name]["rates"]))
                    for name, times in sorted(worst.items(), key=lambda pair: pair[1])
                ),
            )
        ],
        curves(rows, original) if original else [],
    )
    show(comparison, chosen.output)


if __name__ == "__main__":
    main()
