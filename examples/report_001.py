"""Report 001 with our own figures: image classifiers quantized and pruned, ranked by accuracy.

    python examples/report_001.py [-o folder] [--results file] [--quick]

The report shows, network by network, accuracy, parameters, size and latency of ten methods. Training them takes hours:
`benchmarks/report_001.py` does, and this reads its results.
"""

from __future__ import annotations

import dataclasses

from reported import options, original_row, read_results, run_of, show

from lobo_fx.report.comparison import Comparison


def main() -> None:
    """Reads the results and writes all forms."""
    chosen = options(__doc__ or "", "report_001", results=True)
    networks = read_results(chosen.results)
    runs = []
    for network, rows in networks.items():
        original = original_row(rows)
        for name, row in sorted(rows.items(), key=lambda entry: -entry[1]["accuracy"]):
            method = name.rpartition(" ")[0] if name.endswith(("%", "int8", "0.25")) else ""
            runs.append(
                dataclasses.replace(
                    run_of(network, name, row, original),
                    group=method.removesuffix(" 50%,"),
                    score=row["accuracy"],
                    original_score=original["accuracy"] if original else None,
                )
            )
    comparison = Comparison(
        runs,
        "Report 001: image classifiers, compressed and trained again",
        "accuracy of the exported file on test images",
        ["Latency is of one thread, in turn with the original. Methods that train get the same epochs."],
    )
    show(comparison, chosen.output)


if __name__ == "__main__":
    main()
