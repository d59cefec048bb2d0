"""Report 002 with our own figures: how far pruning shares and quantization make a network smaller and faster.

    python examples/report_002.py [-o folder] [--quick]

The report draws sizes, latencies and speed-ups of a network quantized and pruned at several ratios as bars, the curve
from ratio to speed, and ranks them. Here zeros alone win no speed, and say so; packed they win size; cut channels win
both.
"""

from __future__ import annotations

from reported import SMALL, Variant, measured, options, show

from lobo_fx import passes
from lobo_fx.report.comparison import Comparison

MODELS = {"ResNet-18": "torchvision:resnet18"}
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
VARIANTS = {
    "Quantization, dynamic": Variant("quantization", [passes.QuantizeDynamic()]),
    "Quantization, static": Variant("quantization", [passes.QuantizeStatic()]),
    **{f"Zeros {share:.0%}": Variant("zeros", [passes.PruneWeights(share)]) for share in RATIOS},
    **{f"Zeros {share:.0%}, packed": Variant("zeros, packed", [passes.PruneWeights(share)], "packed")
       for share in RATIOS},
    **{f"Channels {share:.0%}": Variant("channels", [passes.PruneChannels(share)]) for share in RATIOS},
    "Channels 30%, static": Variant("both", [passes.PruneChannels(0.3), passes.QuantizeStatic()]),
    "Channels 50%, static": Variant("both", [passes.PruneChannels(0.5), passes.QuantizeStatic()]),
}  # fmt: skip


def main() -> None:
    """Measures every ratio in turn with the original."""
    chosen = options(__doc__ or "", "report_002")
    (name, spec), *_ = (SMALL if chosen.quick else MODELS).items()
    found = measured(name, spec, VARIANTS, chosen.rounds, chosen.quick)
    remark = (
        f"{name} with random weights (seed 0): sizes, latencies and memory are real, accuracies are not measured; "
        "decibels compare outputs with the original's. Each run is timed in turn with the original."
    )
    title = "Report 002: pruning ratios and quantization"
    show(Comparison(found.runs, title, remarks=[remark, found.remark]), chosen.output)


if __name__ == "__main__":
    main()
