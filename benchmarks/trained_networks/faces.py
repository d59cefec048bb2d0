"""P-Net, R-Net and O-Net of facenet-pytorch, which find faces in three stages (Zhang et al., "MTCNN", 2016).

Each takes square crops, and says whether there is a face, where its box lies and (O-Net) where eyes, nose and mouth.
Crops come from the images inside scikit-image's wheel: labelled faces and other small images of its LFW subset, and
windows of photographs. Learned from and tested are other faces and other photographs. The score is the share of
test crops on which a compressed network decides as the original does, at the threshold that facenet-pytorch uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from tasks import Split
from torch import nn
from torch.nn import functional
from trained_report import Trial

from lobo_fx.passes.training.distill import Match

from .network import Network, package_folder

__all__ = ["NETWORKS"]

FACES = 100
"""Of the LFW subset's 200 images, the first so many are faces."""
PHOTOGRAPHS = {
    "train": ("chelsea.png", "motorcycle_left.png", "camera.png", "page.png", "brick.png"),
    "test": ("astronaut.png", "coffee.png", "rocket.jpg", "grass.png"),
}
SMALLEST = 20
"""Pixels of the smallest window: facenet-pytorch's `min_face_size`."""
LABELLED = 0.75
"""Share of the crops that are of labelled images, two thirds of these of faces."""
THRESHOLDS = {"P-Net": 0.6, "R-Net": 0.7, "O-Net": 0.7}
SIZES = {"P-Net": 12, "R-Net": 24, "O-Net": 48}
COUNTS = {"train": 6_000, "validation": 1_000, "test": 3_000}


def crops(split: str, size: int, count: int, seed: int) -> torch.Tensor:
    """Crops as the networks take them, (count, 3, size, size) in [-1, 1]."""
    folder = package_folder("skimage") / "data"
    images = torch.from_numpy(np.load(folder / "lfw_subset.npy")).float().mul(255)
    photographs = [_read(folder / name) for name in PHOTOGRAPHS[split]]
    # Every second labelled image belongs to the test.
    own = range(0 if split == "train" else 1, FACES, 2)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        if generator.random() < LABELLED:
            index = int(generator.choice(own)) + (FACES if generator.random() < 1 / 3 else 0)
            crop = _jittered(images[index].expand(1, 3, -1, -1), size, generator)
        else:
            crop = _window(photographs[int(generator.integers(len(photographs)))], size, generator)
        found.append(_recoloured(crop, generator))
    return (torch.cat(found) - 127.5) / 128


def _read(path: Any) -> torch.Tensor:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0)


def _jittered(image: torch.Tensor, size: int, generator: np.random.Generator) -> torch.Tensor:
    """A labelled image, moved, turned and magnified as the boxes of the stage before are off."""
    scale, angle = float(generator.uniform(0.8, 1.3)), float(generator.uniform(-0.2, 0.2))
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    shift = generator.uniform(-0.2, 0.2, 2)
    mirrored = -1.0 if generator.random() < 0.5 else 1.0
    matrix = [[scale * turn[0][0] * mirrored, scale * turn[0][1], shift[0]]]
    matrix.append([scale * turn[1][0] * mirrored, scale * turn[1][1], shift[1]])
    fine = max(size, image.shape[-1])
    grid = functional.affine_grid(torch.tensor([matrix], dtype=torch.float32), [1, 3, fine, fine], align_corners=False)
    found = functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
    return functional.interpolate(found, (size, size), mode="area")


def _window(photograph: torch.Tensor, size: int, generator: np.random.Generator) -> torch.Tensor:
    """A square of a photograph; widths are as likely from 20 to 40 pixels as from 40 to 80."""
    height, width = photograph.shape[2:]
    side = int(math.exp(generator.uniform(math.log(SMALLEST), math.log(min(height, width)))))
    top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
    part = photograph[:, :, top : top + side, left : left + side]
    return functional.interpolate(part, (size, size), mode="area")


def _recoloured(crop: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Another brightness, contrast and tint: labelled images are grey."""
    gain = torch.from_numpy(generator.uniform(0.6, 1.3) * generator.uniform(0.85, 1.15, 3)).float()
    middle = crop.mean()
    return ((crop - middle) * gain.view(1, 3, 1, 1) + middle + float(generator.uniform(-30, 30))).clamp(0, 255)


def _outputs(module: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Boxes, points where there are any, and the probability of a face, each (count, width)."""
    module.eval()
    with torch.no_grad():
        batches = [module(part) for part in torch.split(inputs, 500)]
    return [torch.cat(parts).flatten(1) for parts in zip(*batches, strict=True)]


def _network(name: str, counts: Mapping[str, int] = COUNTS) -> Network:
    module = _trained(name)
    threshold, size = THRESHOLDS[name], SIZES[name]

    def split(kind: str, seed: int) -> Split:
        inputs = crops("test" if kind == "test" else "train", size, counts[kind], seed)
        return Split(inputs, (_outputs(module, inputs)[-1][:, 1] > threshold).long())

    def agreement(found: nn.Module, part: Split) -> float:
        decided = _outputs(found, part.inputs)[-1][:, 1] > threshold
        return float((decided == part.labels.bool()).float().mean())

    test = split("test", 2)
    wanted = _outputs(module, test.inputs)
    is_face = test.labels.bool()

    def tell(found: nn.Module) -> dict[str, Any]:
        given = _outputs(found, test.inputs)
        errors = [float((a - b)[is_face].abs().mean()) for a, b in zip(given, wanted, strict=True)]
        decided = given[-1][:, 1] > threshold
        names = {"box error": errors[0]} | ({"landmark error": errors[1]} if len(errors) == 3 else {})
        return {
            "score": float((decided == is_face).float().mean()),
            "faces kept": float(decided[is_face].float().mean()),
            "faces": float(is_face.float().mean()),
            **names,
        }

    trial = Trial(module, split("train", 0), split("validation", 1), test, None, agreement, calibration=2048)
    match: list[Match] = ["values", "values", "probabilities"] if name == "O-Net" else ["values", "probabilities"]
    training = {"epochs": 12, "learning_rate": 1e-3, "temperature": 1.0}
    ends: Callable[[nn.Module], list[nn.Module]] = lambda copy: [  # noqa: E731
        part for layer, part in copy.named_children() if layer.startswith(("conv4_", "dense5_", "dense6_"))
    ]
    return Network(trial, tell, "agreement", match, training, ends, {"round_to": 1, "scope": "global"})


def _trained(name: str) -> nn.Module:
    """The network with the weights in the wheel, read as tensors alone."""
    from facenet_pytorch.models import mtcnn

    module: nn.Module = getattr(mtcnn, name.replace("-", ""))(pretrained=False)
    path = package_folder("facenet_pytorch") / "data" / f"{name.replace('-', '').lower()}.pt"
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()


NETWORKS: dict[str, Callable[..., Network]] = {
    name: lambda counts=COUNTS, name=name: _network(name, counts) for name in THRESHOLDS
}
