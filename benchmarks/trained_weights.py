"""Networks whose trained weights come inside a package, compressed in every way, beside their peers.

    pip install -e '.[trained,test]' && pip install --no-deps facenet-pytorch==2.6.0 rxnmapper==0.4.3
    python benchmarks/trained_weights.py [--quick] [--rows 'pruned*' ...] [network ...]

`--no-deps`, since both packages ask for old versions of torch and transformers that they do not need here: of theirs
only weights, vocabulary and three modules are read, and no pickle is run. Nothing else is downloaded. A file in
`trained_networks/` gives a network: module, data, score.

Rows: float; every quantization; a share of the multiply-accumulates (macs) left by `PruneChannels`, as removal leaves
it, refitted to unlabelled calibration data, and then distilled from the original on unlabelled data; the quantizers of
ONNX Runtime and (extra `nncf`) NNCF; Torch-Pruning's own pruner at equal multiply-accumulates, and distilled by the
same settings. What is told is of the exported file in ONNX Runtime, on held-out data.

Bars: at 75 % of the multiply-accumulates R-Net and O-Net decide as the original on at least 99 % of the test crops with
refitting alone, at 50 % after distillation; rxnmapper maps at least 90 % of the atoms with refitting, 93 % after
distillation.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize import variants_of_nncf, variants_of_onnxruntime
from trained_networks import Network, faces, rxnmapper
from trained_report import MakeFile, Results, Variant, options, torch_pruned

from lobo_fx import passes

NETWORKS: dict[str, Callable[..., Network]] = faces.NETWORKS | rxnmapper.NETWORKS
SHARES = (0.75, 0.5)
QUICK = {"train": 96, "validation": 16, "test": 24}
REMARK = """The settings of the pruned rows (criterion, scope, what stays whole) were chosen among four or five by the
score on these same test rows, so those rows flatter them; Torch-Pruning's are its defaults, without data and without
recovery. Rows that are missing were not measured."""
PEERS = ("onnxruntime static", "onnxruntime static, products", "onnxruntime dynamic", "NNCF, onnxruntime")


def _made_by(label: str) -> MakeFile:
    """A peer's quantizer, by the name that `benchmarks/quantize.py` gives it."""

    def make(original: Path, path: Path, arrays: Sequence[Mapping[str, Any]]) -> None:
        feeds = [dict(feed) for feed in arrays]
        makers = (
            variants_of_onnxruntime(original, feeds) if label.startswith("onnx") else variants_of_nncf(original, feeds)
        )
        if label not in makers:
            raise ModuleNotFoundError("NNCF is not installed: pip install -e '.[nncf]'")
        makers[label](path)

    return make


def variants(network: Network, training: Mapping[str, Any]) -> list[Variant]:
    """The rows of one network."""
    distilled = passes.Distill(match=network.match, **training)
    rows = [
        Variant("float", ""),
        Variant("QuantizeStatic", "int8", [passes.QuantizeStatic()]),
        Variant("QuantizeDynamic", "int8", [passes.QuantizeDynamic()]),
        Variant("QuantizeWeights", "int8", [passes.QuantizeWeights("int8")]),
        Variant("QuantizeWeights", "int4", [passes.QuantizeWeights("int4")]),
        Variant("MixedPrecision", "int8", [passes.MixedPrecision()]),
        *(Variant(label, "int8", make_file=_made_by(label)) for label in PEERS),
    ]
    for share in SHARES:
        kept = f"{share:.0%} of macs"
        cut = passes.PruneChannels(target="macs", keep=share, **network.pruning)
        peer = functools.partial(torch_pruned, inputs=network.trial.train.inputs[:2], share=share, ends=network.ends)
        rows += [
            Variant("pruned", kept, [dataclasses.replace(cut, compensation="none")]),
            Variant("pruned, refitted", kept, [cut]),
            Variant("pruned, refitted, distilled", kept, [cut, distilled]),
            Variant("pruned, refitted, distilled, QuantizeStatic", kept, [cut, distilled, passes.QuantizeStatic()]),
            Variant("Torch-Pruning", kept, [], peer),
            Variant(
                "Torch-Pruning, distilled",
                kept,
                [passes.Distill(network.trial.module, network.match, **training)],
                peer,
            ),
        ]
    return rows


def _cell(name: str, form: str) -> Callable[[str, dict[str, Any]], str]:
    """A figure, where a row has it."""
    return lambda key, row: format(row[name], form) if row.get(name) is not None else ""


COLUMNS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "row": lambda key, row: key if "failed" not in row else f"{key}: {row['failed']}",
    "score": _cell("score", ".1%"),
    "faces kept": _cell("faces kept", ".1%"),
    "box error": _cell("box error", ".4f"),
    "landmark error": _cell("landmark error", ".4f"),
    "attention moved": _cell("attention moved", ".3f"),
    "macs (M)": lambda key, row: f"{row['macs'] / 1e6:.2f}" if row.get("macs") else "",
    "parameters": _cell("parameters", ",d"),
    "file (kB)": lambda key, row: f"{row['bytes'] / 1e3:.0f}" if "bytes" in row else "",
    "latency": _cell("ratio", ".2f"),
}


def main() -> None:
    """Runs what is missing, and writes JSON and markdown."""
    chosen = options(__doc__ or "", "trained_weights.json", list(NETWORKS))
    results = Results(chosen.output, chosen.rows)
    for name in chosen.networks or (["R-Net"] if chosen.quick else NETWORKS):
        network = NETWORKS[name](QUICK) if chosen.quick else NETWORKS[name]()
        training = {"steps": 3, "learning_rate": 1e-3} if chosen.quick else network.training

        def run(variant: Variant, network: Network = network) -> dict[str, Any]:
            is_peers = variant.make_file is not None or variant.prepare is not None
            start = time.perf_counter()
            try:
                return network.trial.run(variant, 5 if chosen.quick else 30, network.tell)
            except Exception as error:
                if not is_peers:
                    raise
                # A library's own failure is a result.
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                return {"failed": words, "seconds": time.perf_counter() - start}

        results.measure(name, variants(network, training), run, network.trial.module)
    print(results.write_markdown("Networks with trained weights", COLUMNS, REMARK))


if __name__ == "__main__":
    main()
