"""Shared by all tests: operators that torchvision's wheels lack beside a CPU-only torch, and a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lobo_fx.models import declare_torchvision_operators

declare_torchvision_operators()


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables measured by tests are theirs alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
