"""The machine that figures are measured on."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["cpu_name", "machine"]


def cpu_name() -> str:
    """The CPU's model name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> str:
    """The processor and system that figures were measured on."""
    return f"{cpu_name()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
