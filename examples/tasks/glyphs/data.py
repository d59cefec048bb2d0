"""Letters and numerals drawn by PIL in matplotlib's fonts: turned, scaled, sheared, shifted, noisy.

The images are made here; no font and no data set is downloaded or copied. Training and test share no font.
"""

from __future__ import annotations

import functools
import string
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

from lobo_fx.files import written_beside
from lobo_fx.terminal.progress import track

from ..training import Split

CHARACTERS = string.ascii_uppercase + string.digits
TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmtt10"),
)
TEST_FONTS = ("DejaVuSansMono-Oblique", "DejaVuSerif-BoldItalic", "STIXGeneralBol", "cmss10", "DejaVuSans-BoldOblique")
SIZE = 28
TRAIN_COUNT = 34_000
TEST_COUNT = 6_000
_CANVAS = 2 * SIZE
_VERSION = 1
"""Part of the cached file's name: raise it when images change for the same settings."""

Image8 = npt.NDArray[np.uint8]


def load(
    cache: Path, train_count: int = TRAIN_COUNT, test_count: int = TEST_COUNT, seed: int = 0
) -> tuple[Split, Split]:
    """Training and test split, drawn once and kept in `cache`."""
    path = cache / f"glyphs-v{_VERSION}-train{train_count}-test{test_count}-seed{seed}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        tensors = draw_split("train", TRAIN_FONTS, train_count, seed) | draw_split("test", TEST_FONTS, test_count, seed)
        with written_beside(path) as folder:
            save_file(tensors, folder / path.name)
    tensors = load_file(path)
    train, test = (
        Split(tensors[f"{name}.images"].unsqueeze(1) / 255, tensors[f"{name}.labels"]) for name in ("train", "test")
    )
    return train, test


def draw_split(name: str, fonts: tuple[str, ...], count: int, seed: int) -> dict[str, torch.Tensor]:
    """Images and labels: classes in turn, fonts in turn, the rest at random."""
    images = np.empty((count, SIZE, SIZE), np.uint8)
    for index in track(range(count), f"draw {name}"):
        rng = np.random.default_rng([seed, len(fonts), index])
        font = fonts[index // len(CHARACTERS) % len(fonts)]
        images[index] = draw(CHARACTERS[index % len(CHARACTERS)], font, rng)
    labels = torch.arange(count) % len(CHARACTERS)
    return {f"{name}.images": torch.from_numpy(images), f"{name}.labels": labels}


def draw(character: str, font: str, rng: np.random.Generator) -> Image8:
    """One image, drawn at twice its size."""
    image = Image.new("L", (_CANVAS, _CANVAS))
    middle = (_CANVAS / 2, _CANVAS / 2)
    stroke = int(rng.integers(0, 3))
    ImageDraw.Draw(image).text(middle, character, 255, _font(font), anchor="mm", stroke_width=stroke)
    affine = Image.Transform.AFFINE
    image = image.transform(image.size, affine, _affine(rng), Image.Resampling.BILINEAR).reduce(2)
    pixels = np.asarray(image) / 255 * rng.uniform(0.5, 1.0)
    pixels += rng.normal(0, rng.uniform(0, 0.2), pixels.shape)
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


def _affine(rng: np.random.Generator) -> tuple[float, ...]:
    """Rotation, shear, scale and shift about the middle, from output pixels to input pixels."""
    angle, shear = rng.uniform(-0.26, 0.26), rng.uniform(-0.25, 0.25)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag(1 / rng.uniform(0.75, 1.2, 2)) @ np.array([[1, shear], [0, 1]]) @ turn
    shift = _CANVAS / 2 - matrix @ (_CANVAS / 2 + rng.uniform(-6, 6, 2))
    return (*matrix[0], shift[0], *matrix[1], shift[1])


@functools.lru_cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", 44)
