"""Declares operators that torchvision's wheels fail to register next to a CPU build of torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

__all__ = ["declare_torchvision_operators"]

_TORCHVISION_OPERATORS = ("nms", "qnms")
_library: torch.library.Library | None = None


def declare_torchvision_operators() -> None:
    """Declares `torchvision::nms` and `torchvision::qnms` where torchvision's binary could not register them.

    torchvision's wheels are built against CUDA. Next to a CPU-only torch their library does not load, and
    `import torchvision` (and with it timm and parts of transformers) fails on the missing operators. Declared without
    an implementation, they let the import succeed; calling them still fails. Must be called before the first import of
    torchvision; does nothing if the operators exist.
    """
    global _library
    if _library is not None or any(hasattr(torch.ops.torchvision, name) for name in _TORCHVISION_OPERATORS):
        return
    _load_torchvision_binary()
    missing = [name for name in _TORCHVISION_OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in missing:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]


def _load_torchvision_binary() -> None:
    """Loads the operators of a torchvision that fits this torch, as its own import would."""
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return
    for library in Path(next(iter(found.submodule_search_locations))).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError:
            return
