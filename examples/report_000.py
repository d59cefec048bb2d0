"""Report 000 with our own figures: three models, each pruned, quantized, both, and pruned by structure.

    python examples/report_000.py [-o folder] [--quick]

The report shows sizes, parameters and times of compression of ResNet-50, Whisper-tiny and MobileViT-v2-050, before and
after, and which of the compressed models still run. Here each one is also exported, compared with PyTorch and timed.
"""

from __future__ import annotations

from lobotomizer_table import MODELS
from reported import SMALL, Variant, measured, options, show

from lobo_fx import passes
from lobo_fx.measures.latency import MEGABYTE
from lobo_fx.report.comparison import Comparison
from lobo_fx.report.records import Sheet

VARIANTS = {
    "Prune 30% (unstructured L1)": Variant("pruning", [passes.PruneWeights(0.3)]),
    "Prune 30%, packed": Variant("pruning", [passes.PruneWeights(0.3)], "packed"),
    "Quantize (dynamic int8)": Variant("quantization", [passes.QuantizeDynamic()]),
    "Quantize (static int8)": Variant("quantization", [passes.QuantizeStatic()]),
    "Prune 30% + Quantize": Variant("both", [passes.PruneWeights(0.3), passes.QuantizeDynamic()]),
    "Structured Prune 30%": Variant("structured pruning", [passes.PruneChannels(0.3)]),
}
COLUMNS = ["parameters", "after", "change", "trainable", "after", "change", "file MB", "after", "change"]


def main() -> None:
    """Measures every model in turn with its variants."""
    chosen = options(__doc__ or "", "report_000")
    runs, rows, remarks = [], [], []
    for name, spec in (SMALL if chosen.quick else MODELS).items():
        found = measured(name, spec, VARIANTS, chosen.rounds, chosen.quick)
        runs += found.runs
        remarks.append(found.remark)
        for run in found.runs:
            if run.name in found.trainable:
                counts = (run.original_parameters, run.parameters)
                sizes = ((run.original_bytes or 0) / MEGABYTE, (run.bytes or 0) / MEGABYTE)
                cells = [
                    (before, after, f"{after / before - 1:+.1%}")
                    for before, after in (counts, found.trainable[run.name], sizes)
                    if before is not None and after is not None
                ]
                rows.append((f"{name}, {run.name}", *(cell for three in cells for cell in three)))
    comparison = Comparison(
        runs,
        "Report 000: models compressed without training",
        remarks=[
            "Weights are random (seed 0): sizes, latencies and memory are real, accuracies are not measured; decibels "
            "compare outputs with the original's. A run came through if it compiled, its outputs have the original's "
            "shapes, and its file agrees with PyTorch.",
            *remarks,
        ],
        sheets=[Sheet("before and after", ("run", *COLUMNS), tuple(rows))],
    )
    show(comparison, chosen.output)


if __name__ == "__main__":
    main()
