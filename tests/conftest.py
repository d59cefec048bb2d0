"""Shared by all tests: operators that torchvision's wheels lack beside a CPU-only torch, and a fixed seed."""

from __future__ import annotations

import pytest
import torch

from lobo_fx.models import declare_torchvision_operators

declare_torchvision_operators()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
