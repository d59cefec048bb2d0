"""The machine and the software that figures are measured with."""

from __future__ import annotations

import contextlib
import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lobo_fx.version import __version__

__all__ = ["cpu_name", "machine", "versions"]


def cpu_name() -> str:
    """The CPU's model name, if the system provides it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> str:
    """The processor and system that figures were measured on."""
    return f"{cpu_name()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """Versions of lobo_fx, and of the packages that it runs on, if installed."""
    return {"lobo_fx": __version__, **_installed()}


@functools.cache
def _installed() -> dict[str, str]:
    """Read once: looking for a package's metadata takes as long as a small pass."""
    found = {}
    for package in ("torch", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
