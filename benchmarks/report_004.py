"""A neural receiver, compressed in every way that reports/004 lists; scored by its bit error rate.

    python benchmarks/report_004.py [--quick] [--rows 'student*' ...]

The demapper of `tasks.receiver` (98,000 parameters) beside the exact demapper, which no network can beat. Rows that
train get the same epochs; the rows of the report without training stand beside them.

Bars: half of every width removed, with recovery: at most 1.2 times the original's bit error rate at every
signal-to-noise ratio; a distilled student of a quarter of the width makes up at least half of what the same student
lacks when trained alone (it makes up 6 %: that bar is missed).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from tasks.receiver import TASK
from tasks.receiver.channel import TEST_SNRS
from tasks.receiver.score import bit_error_rates, exact_rates
from tasks.training import build
from torch import nn
from trained_report import VALIDATION, Results, Trial, Variant, options

from lobo_fx import passes

EPOCHS = 4
AMOUNTS = (0.1, 0.3, 0.5, 0.7)
FORMATS = ("log2_4", "log2_6", "log2_8", "e4m3", "e5m2", "e3m4")


def variants(training: dict[str, Any]) -> Sequence[Variant]:
    """The rows, as the report has them, and those with recovery."""
    tuned = passes.FineTune(**training)
    distilled = passes.Distill(match="binary_logits", temperature=1.0, label_share=0.5, **training)
    rows = [Variant("original", "")]
    for amount in AMOUNTS:
        rows += [
            Variant(f"magnitude_{amount}", "", [passes.PruneWeights(amount)]),
            Variant(f"random_{amount}", "", [passes.PruneWeights(amount, "random")]),
            Variant(f"structured_{amount}", "", [passes.PruneChannels(amount, round_to=1)]),
            Variant(f"magnitude_{amount}", "fine-tuned", [passes.PruneWeights(amount), tuned]),
            Variant(f"structured_{amount}", "fine-tuned", [passes.PruneChannels(amount, round_to=1), tuned]),
        ]
    as_values = passes.Distill(match="values", label_share=0.5, **training)
    rows.append(Variant("structured_0.5", "distilled as values", [passes.PruneChannels(0.5, round_to=1), as_values]))
    rows.append(Variant("dynamic_int8", "", [passes.QuantizeDynamic()]))
    rows.append(Variant("static_int8", "", [passes.QuantizeStatic()]))
    rows.append(Variant("qat_int8", "", [passes.QuantizationAwareTraining(**training)]))
    rows += [Variant(name, "", [passes.QuantizeWeights(name)]) for name in FORMATS]
    for width in (0.25, 0.1, 0.05):
        student = passes.Student(width=width, start="fresh")
        rows.append(Variant(f"student_{width}", "alone", [student, tuned]))
        rows.append(Variant(f"student_{width}", "distilled", [student, distilled]))
        rows.append(Variant(f"student_{width}", "kept, distilled", [passes.Student(width=width), distilled]))
    return rows


COLUMNS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "row": lambda key, row: key,
    "size (kB)": lambda key, row: f"{row['bytes'] / 1e3:.0f}",
    "gzip (kB)": lambda key, row: f"{row['gzip bytes'] / 1e3:.0f}",
    "compression": lambda key, row: f"{row['compression']:.2f}",
    "non-zero": lambda key, row: f"{row['non-zero']:,}",
    "sparsity": lambda key, row: f"{1 - row['non-zero'] / row['parameters']:.1%}",
    "latency": lambda key, row: f"{row['ratio']:.2f}",
    **{
        f"bit errors at {snr:g} dB": lambda key, row, snr=snr: f"{row['rates'][str(snr)]:.4f}"  # type: ignore[misc]
        for snr in TEST_SNRS
    },
}


def main() -> None:
    """Runs what is missing, and writes JSON and markdown."""
    chosen = options(__doc__ or "", "report_004.json")
    train, test = TASK.load(chosen.cache)
    learned, validation = train.apart(VALIDATION)
    training: dict[str, Any] = {"epochs": EPOCHS}
    wanted, rounds = None, 50
    module = None
    if chosen.quick:
        learned, validation, test = learned.sample(256), validation.sample(32), test.sample(100)
        training, rounds = {"steps": 3, "learning_rate": 1e-3}, 5
        wanted = ("original ", "magnitude_0.5 fine-tuned", "structured_0.5 ", "log2_4 ", "student_0.05 distilled")
        module = build(TASK.models["Demapper"]).eval()
    module = TASK.trained("Demapper", chosen.cache) if module is None else module
    trial = Trial(module, learned, validation, test, TASK.loss, TASK.score, workdir=chosen.workdir)
    results = Results(chosen.output, chosen.rows)
    exact = {str(snr): rate for snr, rate in exact_rates(test).items()}

    def tell(file: nn.Module) -> dict[str, Any]:
        return {"rates": {str(snr): rate for snr, rate in bit_error_rates(file, test).items()}, "exact": exact}

    def run(variant: Variant) -> dict[str, Any]:
        row = trial.run(variant, rounds, tell)
        original = results.rows["Demapper"].get("original", row)
        return row | {"compression": original["bytes"] / row["bytes"]}

    rows = [v for v in variants(training) if wanted is None or f"{v.method} {v.compression}" in wanted]
    results.measure("Demapper", rows, run, trial.module)
    known = ", ".join(f"{rate:.4f} at {snr} dB" for snr, rate in exact.items())
    remark = (
        f"The exact demapper, given the same pilots: {known}. Weights are chosen by 2,000 slots that the original "
        "itself was trained on; the test slots are nobody's."
    )
    print(results.write_markdown("Compression of a neural receiver", COLUMNS, remark))


if __name__ == "__main__":
    main()
