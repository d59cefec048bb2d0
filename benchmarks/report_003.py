"""A language model, half of it pruned by consensus: speed, memory and tokens a second beside what it still knows.

    python benchmarks/report_003.py [--quick] [--rows PATTERN ...]

The decoder of `tasks.language`: 15.5 million parameters, characters of Python's standard library. Several criteria vote
on what goes; the rest is refitted and distilled from the original. Latency is of one row of 128 characters;
tokens a second are of greedy generation, 20 prompts, a forward of the whole context for each token.

Bars: at least 1.67 times as fast, at least 35 % less memory, bits per character within 5 % of the original's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from tasks.language import TASK
from tasks.language.models import Decoder
from tasks.language.score import bits_per_character
from tasks.language.text import CONTEXT
from torch import nn
from trained_report import Results, Trial, Variant, options

from lobo_fx import passes
from lobo_fx.passes.pruning.criteria import Consensus

PROMPTS, GENERATED = 20, 32
STEPS = 400


def tokens_per_second(file: nn.Module, prompts: torch.Tensor, generated: int) -> float:
    """Of greedy generation behind prompts (count, `CONTEXT`), one after the other."""
    start = time.perf_counter()
    for prompt in prompts:
        context = prompt[None]
        for _ in range(generated):
            following = file(context)[:, -1].argmax(-1, keepdim=True)
            context = torch.cat([context[:, 1:], following], 1)
    return len(prompts) * generated / (time.perf_counter() - start)


def variants(training: dict[str, Any]) -> Sequence[Variant]:
    """Before, and after in steps: pruned, fine-tuned, distilled, and quantized on top."""
    consensus = Consensus(["l1", "l2", "taylor"])
    pruned = passes.PruneChannels(target="parameters", keep=0.5, importance=consensus)
    tuned, distilled = passes.FineTune(**training), passes.Distill(**training)
    return [
        Variant("original", ""),
        Variant("consensus 50%", "refitted", [pruned]),
        Variant("consensus 50%", "fine-tuned", [pruned, tuned]),
        Variant("consensus 50%", "distilled", [pruned, distilled]),
        Variant("consensus 50%", "distilled, int8", [pruned, distilled, passes.QuantizeDynamic()]),
    ]


COLUMNS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "row": lambda key, row: key,
    "bits per character": lambda key, row: f"{row['bits']:.3f}",
    "parameters (M)": lambda key, row: f"{row['parameters'] / 1e6:.2f}",
    "size (MB)": lambda key, row: f"{row['bytes'] / 1e6:.1f}",
    "latency (ms)": lambda key, row: f"{row['ms']:.1f}",
    "times as fast": lambda key, row: f"{1 / row['ratio']:.2f}",
    "memory (MB)": lambda key, row: f"{row['memory'] / 1e6:.0f}",
    "tokens a second": lambda key, row: f"{row['tokens a second']:.1f}",
}


def main() -> None:
    """Runs what is missing, and writes JSON and markdown."""
    chosen = options(__doc__ or "", "report_003.json")
    learned, validation, test = TASK.splits(chosen.cache)
    training: dict[str, Any] = {"steps": STEPS, "mixed_precision": "bf16"}
    prompts, generated, rounds = test.sample(PROMPTS).inputs, GENERATED, 30
    if chosen.quick:
        learned, validation, test = learned.sample(64), validation.sample(16), test.sample(16)
        training, rounds, prompts, generated = {"steps": 2, "learning_rate": 1e-3}, 3, prompts[:2], 2
        torch.manual_seed(0)  # a run that goes on has the network that it began with
        module: nn.Module = Decoder(32, heads=2, depth=2).eval()
    else:
        module = TASK.trained("Decoder", chosen.cache)
    trial = Trial(module, learned, validation, test, TASK.loss, TASK.score, batch=16, workdir=chosen.workdir)
    results = Results(chosen.output, chosen.rows)

    def tell(file: nn.Module) -> dict[str, float]:
        assert prompts.shape[1] == CONTEXT
        rate = tokens_per_second(file, prompts, generated)
        return {"bits": bits_per_character(file, test), "tokens a second": rate}

    results.measure("Decoder", variants(training), lambda variant: trial.run(variant, rounds, tell), trial.module)
    print(results.write_markdown("Consensus pruning of a language model", COLUMNS))


if __name__ == "__main__":
    main()
