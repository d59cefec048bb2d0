"""Accuracy, size and latency of four image classifiers, compressed in every way that reports/001 lists, and some more.

    python benchmarks/report_001.py [--quick] [--rows 'Pruning*' ...] [network ...]

Networks: a plain CNN of six stages of two convolutions, LeNet-5 with more channels, EfficientNet-B0 and ResNet-50, for
images of one channel and 28×28 pixels: letters and numerals of fonts that training did not see (`tasks.glyphs`). Every
method gets the same two epochs, and so does the original in two rows of its own: at the learning rate that is found for
it, and at the one that pruned networks mostly get; those that train before they cut, ours and Torch-Pruning's sparse
learning, one before and one after. A share of the training images chooses the best weights; what the table tells is of
the test fonts, and of the exported file in ONNX Runtime.

Bars, in points of the original: structured 50 % within 1 on SimpleCNN and ResNet-50, within 2 on the others; 70 %
within 3; static int8 within .5; quantization-aware training within .3 and never below static; equal to or above
Torch-Pruning at its multiply-accumulates.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from tasks.glyphs import TASK as GLYPHS
from tasks.glyphs.data import CHARACTERS
from tasks.layers import conv_norm
from tasks.training import Recipe
from torch import nn
from trained_report import VALIDATION, Results, Trial, Variant, options, torch_pruned

import lobo_fx
from lobo_fx import passes, sources

sources.declare_torchvision_operators()  # before torchvision is imported
EPOCHS = 2
CLASSES = len(CHARACTERS)


def simple_cnn() -> nn.Module:
    """Six stages of two convolutions, 5.9 million parameters; images are halved after the first three."""
    widths = (1, 32, 64, 128, 256, 256, 512)
    stages: list[nn.Module] = []
    for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        stages += [conv_norm(inputs, outputs), nn.ReLU(), conv_norm(outputs, outputs), nn.ReLU()]
        stages += [nn.MaxPool2d(2)] if stage < 3 else []
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))


def lenet() -> nn.Module:
    """Two convolutions of 5×5 and three linear layers, 1.1 million parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 320), nn.ReLU(), nn.Linear(320, 120), nn.ReLU(), nn.Linear(120, CLASSES)),
    )


def efficientnet() -> nn.Module:
    """EfficientNet-B0 for one channel, without the first stride."""
    import torchvision

    module = torchvision.models.efficientnet_b0(num_classes=CLASSES)
    module.features[0][0] = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
    return module  # type: ignore[no-any-return]


def resnet() -> nn.Module:
    """ResNet-50 for one channel."""
    import torchvision

    module = torchvision.models.resnet50(num_classes=CLASSES)
    module.conv1 = nn.Conv2d(1, 64, 3, 2, 1, bias=False)
    return module  # type: ignore[no-any-return]


NETWORKS = {
    "SimpleCNN 6x2": Recipe(simple_cnn, epochs=5, rate=1e-3),
    "LeNet-5": Recipe(lenet, epochs=5, rate=1e-3),
    "EfficientNet-B0": Recipe(efficientnet, epochs=6, rate=2e-3),
    "ResNet-50": Recipe(resnet, epochs=6, rate=1e-3),
}


def _heads(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Linear) and part.out_features == CLASSES]


def peer(
    trial: Trial, ratio: float, learn: Callable[[nn.Module, Any], None] | None = None
) -> Callable[[nn.Module], nn.Module]:
    """Torch-Pruning's own pruner, at the multiply-accumulates that `PruneChannels(ratio)` leaves."""

    def prune(module: nn.Module) -> nn.Module:
        inputs = trial.train.inputs[:2]
        ours = lobo_fx.compile(module, [passes.PruneChannels(ratio)], example_inputs=inputs, progress=False)
        rows = ours.report.rows
        return torch_pruned(module, inputs, (rows[-1].macs or 0) / (rows[0].macs or 1), _heads, learn)

    return prune


def sparse_learning(trial: Trial, training: Mapping[str, Any]) -> Callable[[nn.Module, Any], None]:
    """Torch-Pruning's, with the settings of its own benchmark: SGD at .01, and its pruner's penalty on gradients."""

    def learn(module: nn.Module, pruner: Any) -> None:
        assert trial.loss is not None
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        module.train()
        for _ in range(training.get("epochs", 1)):
            pruner.update_regularizer()
            for inputs, labels in itertools.islice(trial.train.shuffled(trial.batch), training.get("steps")):
                optimizer.zero_grad()
                trial.loss(module(inputs), labels).backward()  # type: ignore[no-untyped-call]
                pruner.regularize(module)
                optimizer.step()
        module.eval()

    return learn


def variants(trial: Trial, training: dict[str, Any]) -> Sequence[Variant]:
    """The rows, as the report has them, and Torch-Pruning's."""
    tuned = passes.FineTune(**training)
    half = training | {name: count // 2 for name, count in training.items() if name in ("epochs", "steps")}

    def structured(ratio: float) -> list[Any]:
        return [passes.PruneChannels(ratio), tuned]

    rows = [
        Variant("Original", ""),
        Variant("Original, fine-tuned", "", [tuned]),
        Variant("Original, fine-tuned at 0.003", "", [passes.FineTune(**training | {"learning_rate": 3e-3})]),
        Variant("Quantization (dynamic)", "int8", [passes.QuantizeDynamic()]),
        Variant("Quantization (static)", "int8", [passes.QuantizeStatic()]),
        Variant("Quantization (QAT)", "int8", [passes.QuantizationAwareTraining(**training)]),
        *(Variant("Pruning (unstructured)", f"{a:.0%}", [passes.PruneWeights(a), tuned]) for a in (0.3, 0.5, 0.7)),
        *(Variant("Pruning (structured)", f"{ratio:.0%}", structured(ratio)) for ratio in (0.3, 0.5, 0.7)),
        Variant("Structured + static", "50%, int8", [*structured(0.5), passes.QuantizeStatic()]),
        *(Variant("Torch-Pruning", f"{ratio:.0%}", [tuned], peer(trial, ratio)) for ratio in (0.5, 0.7)),
    ]
    cut, tuned_after = passes.PruneChannels(0.5), passes.FineTune(**half)
    rows.append(Variant("Sparse training", "50%", [passes.SparseTraining(cut, **half), cut, tuned_after]))
    learned = peer(trial, 0.5, sparse_learning(trial, half))
    rows.append(Variant("Torch-Pruning, sparse", "50%", [tuned_after], learned, settings=f"SGD at 0.01, {half}"))
    distilled = passes.Distill(**training)
    rows.append(Variant("Structured + distilled", "50%", [passes.PruneChannels(0.5), distilled]))
    student = passes.Student(width=0.25, start="fresh")
    rows.append(Variant("Student alone", "0.25", [student, tuned]))
    rows.append(Variant("Student distilled", "0.25", [student, distilled]))
    rows.append(Variant("Student kept, distilled", "0.25", [passes.Student(width=0.25), distilled]))
    return rows


COLUMNS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "method": lambda key, row: key,
    "test accuracy": lambda key, row: f"{row['accuracy']:.2%}",
    "parameters (M)": lambda key, row: f"{row['parameters'] / 1e6:.2f}",
    "non-zero (M)": lambda key, row: f"{row['non-zero'] / 1e6:.2f}",
    "size (MB)": lambda key, row: f"{row['bytes'] / 1e6:.2f}",
    "gzip (MB)": lambda key, row: f"{row['gzip bytes'] / 1e6:.2f}",
    "latency (ms)": lambda key, row: f"{row['ms']:.2f}",
    "of the original's": lambda key, row: f"{row['ratio']:.2f}",
}


def main() -> None:
    """Runs what is missing, and writes JSON and markdown."""
    chosen = options(__doc__ or "", "report_001.json", list(NETWORKS))
    results = Results(chosen.output, chosen.rows)
    train, test = GLYPHS.load(chosen.cache)
    learned, validation = train.apart(VALIDATION)
    training: dict[str, Any] = {"epochs": EPOCHS}
    networks = {name: NETWORKS[name] for name in chosen.networks or (["LeNet-5"] if chosen.quick else NETWORKS)}
    if chosen.quick:
        networks = {name: dataclasses.replace(network, epochs=1) for name, network in networks.items()}
        learned, validation, test = (
            part.sample(count) for part, count in ((learned, 512), (validation, 64), (test, 64))
        )
        training = {"steps": 4, "learning_rate": 1e-3}
    for name, recipe in networks.items():
        task = dataclasses.replace(GLYPHS, models={name: recipe}, load=lambda cache: (learned, test))
        if chosen.quick:
            task = dataclasses.replace(task, name="quick")
        module = task.trained(name, chosen.cache)
        trial = Trial(module, learned, validation, test, task.loss, task.score, workdir=chosen.workdir)

        def tell(file: nn.Module) -> dict[str, float]:
            return {"accuracy": task.score(file, test)}  # noqa: B023

        rounds = 5 if chosen.quick else 50
        results.measure(name, variants(trial, training), lambda v: trial.run(v, rounds, tell), module)  # noqa: B023
    print(results.write_markdown("Compression of image classifiers", COLUMNS))


if __name__ == "__main__":
    main()
