"""What the tasks share: data with labels, models trained by `FineTune`, and a cache of the results."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lobo_fx
from lobo_fx import passes
from lobo_fx.files import written_beside
from lobo_fx.terminal.tables import new_table, render

BATCH = 128
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/lobo-fx`, or `~/.cache/lobo-fx`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lobo-fx"


@dataclasses.dataclass(frozen=True)
class Split:
    """Inputs, rows first, and their labels. Images are (count, 1, height, width) in [0, 1]."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = BATCH) -> list[tuple[torch.Tensor, ...]]:
        """Batches in order."""
        return list(zip(torch.split(self.inputs, size), torch.split(self.labels, size), strict=True))

    def shuffled(self, size: int = BATCH) -> Shuffled:
        """Batches in an order that PyTorch's generator draws anew at every reading."""
        return Shuffled(self, size)

    def sample(self, count: int, seed: int = 0) -> Split:
        """Some of the rows, drawn at random: for calibration."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Split(self.inputs[chosen], self.labels[chosen])

    def apart(self, count: int) -> tuple[Split, Split]:
        """All rows but some, and those, drawn at random but always the same."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(1))
        chosen, rest = order[:count], order[count:]
        return Split(self.inputs[rest], self.labels[rest]), Split(self.inputs[chosen], self.labels[chosen])


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """A data loader over tensors: rows are taken many at a time."""

    split: Split
    size: int

    def __len__(self) -> int:
        return -(-len(self.split) // self.size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for chosen in torch.split(torch.randperm(len(self.split)), self.size):
            yield self.split.inputs[chosen], self.split.labels[chosen]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is made and trained: AdamW, the rate rising for a tenth of the steps and falling by a cosine."""

    build: Callable[[], nn.Module]
    epochs: int
    rate: float = 3e-3
    decay: float = 0.02
    batch: int = BATCH
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"


def accuracy(module: nn.Module, split: Split) -> float:
    """Share of rows classified correctly."""
    module.eval()
    with torch.no_grad():
        hits = sum(int((module(inputs).argmax(1) == labels).sum()) for inputs, labels in split.batches(500))
    return hits / len(split)


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and models for it.

    Attributes:
        name: what files in the cache begin with.
        load: gives the training and the test split, from a cache folder where it is worth one.
        models: a recipe by name.
        loss: of outputs and labels.
        score: of a module on a split; higher is better.
        score_name: what it is called.
        held_out: how many rows of the training split no model is trained on, for choosing among weights.
    """

    name: str
    load: Callable[[Path], tuple[Split, Split]]
    models: Mapping[str, Recipe]
    loss: Loss = nn.functional.cross_entropy
    score: Callable[[nn.Module, Split], float] = accuracy
    score_name: str = "accuracy"
    held_out: int = 0

    def splits(self, cache: Path) -> tuple[Split, Split, Split]:
        """What models are trained on, what chooses among weights, and what tests them: no row is in two of them."""
        train, test = self.load(cache)
        return *train.apart(self.held_out), test

    def file(self, model: str, cache: Path) -> Path:
        """Where the weights are kept; the name changes with the settings."""
        recipe = self.models[model]
        settings = f"{dataclasses.replace(recipe, build=nn.Module)}{build(recipe)}"
        return cache / f"{self.name}-{model}-{hashlib.sha256(settings.encode()).hexdigest()[:10]}.safetensors"

    def trained(self, model: str, cache: Path | None = None) -> nn.Module:
        """The trained model in inference mode; training happens where the cache has no weights."""
        cache = cache or default_cache()
        path = self.file(model, cache)
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            learned, _, test = self.splits(cache)
            train(self, model, learned, test, path)
        module = build(self.models[model])
        module.load_state_dict(load_file(path))
        return module.eval()


def build(recipe: Recipe) -> nn.Module:
    """The model before training, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return recipe.build()


def train(task: Task, model: str, train_split: Split, test_split: Split, path: Path) -> nn.Module:
    """Trains and writes the weights to `path`; killed, it goes on after the last whole epoch."""
    recipe, start = task.models[model], (time.perf_counter(), time.process_time())
    module = build(recipe)
    checkpoints = path.with_suffix(".training")
    training = passes.FineTune(
        epochs=recipe.epochs,
        learning_rate=recipe.rate,
        weight_decay=recipe.decay,
        warmup=0.1,
        clip_norm=None,
        mixed_precision=recipe.mixed_precision,
        checkpoint_dir=checkpoints,
    )
    result = lobo_fx.compile(
        module,
        [training],
        example_inputs=train_split.inputs[:2],
        train_data=train_split.shuffled(recipe.batch),
        loss_fn=task.loss,
        seed=recipe.seed,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    module.load_state_dict(result.module.state_dict())
    facts = {
        "score": f"{task.score(module, test_split):.4f}",
        "seconds": f"{time.perf_counter() - start[0]:.0f}",
        "CPU seconds": f"{time.process_time() - start[1]:.0f}",
    }
    with written_beside(path) as folder:
        save_file(module.state_dict(), folder / path.name, {"facts": json.dumps(facts)})
    shutil.rmtree(checkpoints, ignore_errors=True)
    return module


def facts(path: Path) -> dict[str, Any]:
    """Test score and training time, from the header of the weights."""
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["facts"]))


def main(task: Task) -> None:
    """Trains what is not in the cache, and prints the scores."""
    parser = argparse.ArgumentParser(description=f"Trains the models for {task.name}.")
    parser.add_argument("models", nargs="*", metavar="model", help=f"one of {', '.join(task.models)}; default: all")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for data and weights (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in task.models]:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(task.models)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    columns = ["model", "parameters", f"test {task.score_name}", "training seconds", "CPU seconds", "weights"]
    table = new_table(task.name, columns)
    for name in options.models or task.models:
        module = task.trained(name, options.cache)
        path = task.file(name, options.cache)
        count = sum(parameter.numel() for parameter in module.parameters())
        found = facts(path)
        table.add_row(name, f"{count:,}", found["score"], found["seconds"], found["CPU seconds"], str(path))
    print(render(table))
