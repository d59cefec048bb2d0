"""Handwritten digits (Alpaydin and Kaynak, 1998), as they come with scikit-learn: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ..training import Split


def load(cache: Path | None = None) -> tuple[Split, Split]:
    """Training and test split: three quarters and one quarter of each class; needs no cache."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Split(train_x, train_y), Split(test_x, test_y)
