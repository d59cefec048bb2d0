"""Shared by all tests: operators that torchvision's wheels lack beside a CPU-only torch, and a fixed seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lobo_fx.models import declare_torchvision_operators

declare_torchvision_operators()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


_KNOWN_FAILURES = Path(__file__).parent / "known_failures.txt"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that show open bugs are expected to fail until those are mended; each is listed by name."""
    known = set(_KNOWN_FAILURES.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in known:
            item.add_marker(pytest.mark.xfail(reason="open bug, see tests/known_failures.txt", strict=False))
