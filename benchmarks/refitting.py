"""What refitting after removal gains on rows that no fit saw, and that it never harms.

    python benchmarks/refitting.py [--models 'timm:efficientnet*'] [--output docs/refitting.md]

Networks of the zoo with random weights; batch norms with the statistics of data, as training leaves them (`set`), or
as they are made (`fresh`). 25 and 50 % of every width go, by L2 norm, and 8, 32 or 128 rows calibrate. Columns are
decibels of the outputs against the original's on 64 rows that nothing else saw: of plain removal, of each method alone,
and of what `PruneChannels` takes by what it sees on held-out rows of its calibration data.

Bar: what is taken is never more than half a decibel below the best of none, recalibrate and bias, and above all three
on most. Results go to a JSON lines file beside the table; what is in it is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_transformers import build_tiny
from torch import nn

from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.machine import machine
from lobo_fx.passes import FoldWeights, PruneChannels
from lobo_fx.passes.pruning.compensation import METHODS, Split, attempts, chosen
from lobo_fx.sources.known_inputs import find_inputs
from lobo_fx.sources.models import build
from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import new_table, render, to_markdown

TIMM = (
    *("efficientnet_b0", "mobileone_s0", "levit_conv_128s", "mobilevitv2_050", "mobilenetv2_050", "resnet18"),
    *("mobilenetv3_small_050", "convnext_atto", "ghostnet_100", "regnetx_002", "regnety_002", "resnet10t", "lcnet_050"),
    *("tf_efficientnetv2_b0", "mnasnet_small", "tinynet_e", "repvgg_a0", "edgenext_xx_small", "poolformer_s12"),
    *("fbnetc_100", "hardcorenas_a", "legacy_seresnet18", "test_convnext", "test_resnet", "test_byobnet", "rexnet_100"),
)
TEXTS = ("bert", "distilbert", "gpt2", "albert")
MODELS = (*(f"timm:{name}" for name in TIMM), *(f"transformers:{name}" for name in TEXTS))
FIXED = ("timm:levit_conv_128s",)
"""Networks that take images of their own size alone."""
ROWS, RATIOS, STATISTICS = (8, 32, 128), (0.25, 0.5), ("set", "fresh")
SIZE, FRESH = 64, 64
MARGIN = 0.5


def images(count: int, seed: int, size: int = SIZE) -> torch.Tensor:
    """Smooth coloured blobs and edges: (count, 3, size, size), of mean 0 and standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="bicubic")
    blocks = nn.functional.interpolate(torch.randn(count, 3, 9, 9, generator=generator).sign(), size)
    mixed = smooth + 0.5 * blocks + 0.1 * torch.randn(count, 3, size, size, generator=generator)
    return (mixed - mixed.mean()) / mixed.std()


def texts(count: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    """Pieces of this repository's own text, as bytes: (count, length)."""
    source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    length = like.shape[1]
    starts = torch.randint(len(source) - length, (count,), generator=torch.Generator().manual_seed(seed))
    rows = [list(source[start : start + length]) for start in starts.tolist()]
    return torch.tensor(rows) % 90 + 2


def network(name: str, statistics_of: str) -> tuple[nn.Module, Callable[[int, int], Any]]:
    """A network with random weights, and what gives rows for it by count and seed."""
    torch.manual_seed(0)
    if name.startswith("transformers:"):
        tiny, inputs = build_tiny(name.partition(":")[2])
        like = inputs.tensors[0]
        return tiny.eval(), lambda count, seed: texts(count, seed, like)
    model, _ = build(name)
    assert isinstance(model, nn.Module)
    size = SIZE if name not in FIXED else find_inputs(model).tensors[0].shape[-1]
    if statistics_of == "set":
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None  # the mean over all batches
            norm.reset_running_stats()
        with torch.no_grad():
            for seed in range(4):
                model.train()(images(64, 100 + seed, size))
    return model.eval(), lambda count, seed: images(count, seed, size)


def cases(name: str) -> Iterator[dict[str, Any]]:
    """All settings of a network, with what was measured."""
    for state in STATISTICS if name.startswith("timm:") else STATISTICS[:1]:
        model, rows = network(name, state)
        if state == "fresh" and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            continue
        with quiet():
            program = trace(model, rows(2, 1))
        fresh = program.signature.bind_batch(rows(FRESH, 2))
        for ratio, count in itertools.product(RATIOS, ROWS):
            start = time.process_time()
            found = measured(program, ratio, rows(count, 3), fresh)
            yield {"model": name, "norms": state, "removed": ratio, "rows": count, **found} | {
                "seconds": round(time.process_time() - start, 1)
            }


def measured(program: Program, ratio: float, calibration: Any, fresh: Any) -> dict[str, Any]:
    """Decibels by method, on fresh rows and on held-out ones."""
    context = Context(program.signature, calibration_data=[calibration], show_progress=False)
    original = FoldWeights().run(program.clone(), context)
    pruned = PruneChannels(ratio, compensation="none").run(original.clone(), context)
    expected = original.run(fresh)
    by_method, held_out = {}, {}
    for attempt in attempts(pruned, original, Split.of(context), METHODS[-1]):
        by_method[attempt.method] = round(signal_to_noise(expected, attempt.program.run(fresh)), 2)
        held_out[attempt.method] = round(attempt.decibels, 2)
    return {"decibels": by_method, "held_out": held_out}


def shortfall(case: dict[str, Any]) -> float:
    """By how much what is taken is below the best of the simpler methods; negative where it is above."""
    others = [value for method, value in case["decibels"].items() if method != METHODS[-1]]
    return float(max(others) - case["decibels"][chosen(case["held_out"])])


def table(found: list[dict[str, Any]]) -> Any:
    """A row for each setting."""
    columns = ["model", "norms", "removed", "rows", *METHODS, "taken", "gives", "above the others"]
    made = new_table("Decibels on 64 fresh rows after removal, by how the rest is fitted", columns)
    for case in found:
        cells = [f"{case['decibels'][name]:.1f}" if name in case["decibels"] else "-" for name in METHODS]
        taken = chosen(case["held_out"])
        setting = (case["model"], case["norms"], f"{case['removed']:g}", str(case["rows"]))
        made.add_row(*setting, *cells, taken, f"{case['decibels'][taken]:.1f}", f"{-shortfall(case):+.1f}")
    return made


def main() -> None:
    """Runs what was not run yet, and prints the table."""
    parser = argparse.ArgumentParser(description="What refitting gains on rows that no fit saw.")
    parser.add_argument("--models", default="*", help="a pattern of names")
    parser.add_argument("--output", type=Path, default=Path("docs/refitting.md"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = options.output.with_suffix(".jsonl")
    found = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    complete = {case["model"] for case in found}
    for name in MODELS:
        if fnmatch.fnmatch(name, options.models) and name not in complete:
            made = list(cases(name))
            with kept.open("a") as stream:
                stream.writelines(json.dumps(case) + "\n" for case in made)
            found += made
            print(name, " ".join(f"{-shortfall(case):+.1f}" for case in made), flush=True)
    found.sort(key=lambda case: MODELS.index(case["model"]))
    losses = [shortfall(case) for case in found]
    words = (
        f"{len({case['model'] for case in found})} networks, {len(found)} settings: what is taken is more than {MARGIN}"
        f" dB below the best of none, recalibrate and bias in {sum(loss > MARGIN for loss in losses)} "
        f"(at most {max(losses):.1f} dB), above all three in {sum(loss < 0 for loss in losses)}, "
        f"by {statistics.median(-loss for loss in losses):.1f} dB in the median. Weights are random. {machine()}"
    )
    made_table = table(found)
    options.output.write_text(
        f"# What refitting gains\n\n`python benchmarks/refitting.py`: {words}\n\n{to_markdown(made_table)}\n"
    )
    print(render(made_table))
    print(words)


if __name__ == "__main__":
    main()
