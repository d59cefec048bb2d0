"""Report 003 with our own figures: a language model with half of its parameters pruned by consensus.

    python examples/report_003.py [-o folder] [--results file] [--quick]

The report shows latency, memory, tokens a second and parameters of a language model before and after, and two
dashboards. Training takes hours: `benchmarks/report_003.py` does, and this reads its results.
"""

from __future__ import annotations

import dataclasses

from reported import before_and_after, options, original_row, read_results, run_of, show

from lobo_fx.report.comparison import Comparison
from lobo_fx.report.records import Sheet


def main() -> None:
    """Reads the results and writes all forms."""
    chosen = options(__doc__ or "", "report_003", results=True)
    networks = read_results(chosen.results)
    runs, bits = [], []
    for network, rows in networks.items():
        original = original_row(rows)
        for name, row in rows.items():
            runs.append(
                dataclasses.replace(
                    run_of(network, name, row, original),
                    score=2 ** -row["bits"],
                    original_score=2 ** -original["bits"] if original else None,
                    rate=row["tokens a second"],
                    original_rate=original["tokens a second"] if original else None,
                    unit="tokens",
                )
            )
            bits.append((name, row["bits"], row["bits"] / original["bits"] - 1 if original else "not measured"))
    comparison = Comparison(
        runs,
        "Report 003: a language model, pruned by consensus",
        "geometric mean of the probability given to each next character, 2 to the minus bits per character",
        ["Tokens a second are of greedy generation, one prompt after the other, the whole context for each token."],
        [
            Sheet("bits per character", ("run", "bits", "more than the original's, as a share"), tuple(bits)),
            *(before_and_after(run) for run in runs if run.name.lower() != "original"),
        ],
    )
    show(comparison, chosen.output)


if __name__ == "__main__":
    main()
