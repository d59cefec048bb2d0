"""What the tasks share: data with labels, a training loop that can be interrupted, and a cache of the results."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lobo_fx.files import written_beside
from lobo_fx.terminal.progress import track
from lobo_fx.terminal.tables import new_table, render

BATCH = 128


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/lobo-fx`, or `~/.cache/lobo-fx`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lobo-fx"


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (count, 1, height, width) in [0, 1] and their labels."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = BATCH, generator: torch.Generator | None = None) -> list[tuple[torch.Tensor, ...]]:
        """Batches in order, or in an order drawn by `generator`."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        return [(self.images[chosen], self.labels[chosen]) for chosen in torch.split(order, size)]

    def sample(self, count: int, seed: int = 0) -> Split:
        """Some of the images, drawn at random: for calibration."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Split(self.images[chosen], self.labels[chosen])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is made and trained: AdamW, the rate rising for a tenth of the steps and falling by a cosine."""

    build: Callable[[], nn.Module]
    epochs: int
    rate: float = 3e-3
    decay: float = 0.02
    seed: int = 0

    def rate_at(self, progress: float) -> float:
        """The learning rate after a share of all steps."""
        return self.rate * min(1.0, progress / 0.1) * (1 + math.cos(math.pi * progress)) / 2


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and models for it.

    Attributes:
        name: what files in the cache begin with.
        load: gives the training and the test split, from a cache folder where it is worth one.
        models: a recipe by name.
    """

    name: str
    load: Callable[[Path], tuple[Split, Split]]
    models: Mapping[str, Recipe]

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
            train(self.models[model], *self.load(cache), path)
        module = build(self.models[model])
        module.load_state_dict(load_file(path))
        return module.eval()


def build(recipe: Recipe) -> nn.Module:
    """The model before training, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return recipe.build()


def accuracy(module: nn.Module, split: Split) -> float:
    """Share of images classified correctly."""
    module.eval()
    with torch.no_grad():
        hits = sum(int((module(images).argmax(1) == labels).sum()) for images, labels in split.batches(500))
    return hits / len(split)


def train(recipe: Recipe, train_split: Split, test_split: Split, path: Path) -> nn.Module:
    """Trains and writes the weights to `path`; interrupted, it goes on after the last whole epoch."""
    module = build(recipe)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    checkpoint = path.with_suffix(".checkpoint")
    done, spent = _resume(checkpoint, module, optimizer)
    for epoch in range(done, recipe.epochs):
        start = _clocks()
        with torch.random.fork_rng(devices=[]):  # an epoch draws the same whether or not training was interrupted
            torch.manual_seed(1000 * recipe.seed + epoch)
            loss = _epoch(recipe, epoch, module, optimizer, train_split)
        spent += _clocks() - start
        print(f"{path.stem}: epoch {epoch + 1}/{recipe.epochs}, loss {loss:.4f}", flush=True)
        state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        saved = io.BytesIO()  # torch aborts the interpreter where the disk is full
        torch.save(state | {"spent": spent}, saved)
        with written_beside(checkpoint) as folder:
            (folder / checkpoint.name).write_bytes(saved.getbuffer())
    facts = {
        "accuracy": f"{accuracy(module, test_split):.4f}",
        "seconds": f"{spent[0]:.0f}",
        "CPU seconds": f"{spent[1]:.0f}",
    }
    with written_beside(path) as folder:
        save_file(module.state_dict(), folder / path.name, {"facts": json.dumps(facts)})
    checkpoint.unlink(missing_ok=True)
    return module


def _clocks() -> torch.Tensor:
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.double)


def _resume(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, torch.Tensor]:
    """Epochs done, and seconds and CPU seconds spent so far."""
    if not checkpoint.exists():
        return 0, torch.zeros(2, dtype=torch.double)
    state = torch.load(checkpoint, weights_only=True)
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"], state["spent"]


def _epoch(recipe: Recipe, epoch: int, module: nn.Module, optimizer: torch.optim.Optimizer, split: Split) -> float:
    """One pass over the data in an order of its own; returns the mean loss."""
    module.train()
    batches = split.batches(generator=torch.default_generator)
    total = 0.0
    for index, (images, labels) in enumerate(track(batches, f"epoch {epoch + 1}")):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at((epoch + (index + 1) / len(batches)) / recipe.epochs)
        loss = nn.functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item()
    return total / len(batches)


def facts(path: Path) -> dict[str, Any]:
    """Test accuracy and training time, from the header of the weights."""
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["facts"]))


def main(task: Task) -> None:
    """Trains what is not in the cache, and prints the accuracies."""
    parser = argparse.ArgumentParser(description=f"Trains the models for {task.name}.")
    parser.add_argument("models", nargs="*", metavar="model", help=f"one of {', '.join(task.models)}; default: all")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for data and weights (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in task.models]:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(task.models)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    table = new_table(task.name, ["model", "parameters", "test accuracy", "training seconds", "CPU seconds", "weights"])
    for name in options.models or task.models:
        module = task.trained(name, options.cache)
        path = task.file(name, options.cache)
        count = sum(parameter.numel() for parameter in module.parameters())
        found = facts(path)
        table.add_row(name, f"{count:,}", found["accuracy"], found["seconds"], found["CPU seconds"], str(path))
    print(render(table))
