"""The machine and the software that figures are measured with."""

from __future__ import annotations

import contextlib
import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lobo_fx.version import __version__

__all__ = ["cpu_name", "is_arm", "machine", "products_saturate", "versions"]


def cpu_name() -> str:
    """The CPU's model name, if the system provides it."""
    lines = _cpu_facts().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def is_arm() -> bool:
    """Whether the CPU is a 64-bit Arm."""
    return platform.machine().lower() in ("aarch64", "arm64")


def products_saturate() -> bool:
    """Whether this CPU adds two products of uint8 and int8 at 16 bits, as x86 without VNNI does.

    Where the system says nothing of VNNI, there is taken to be none.
    """
    return not is_arm() and "vnni" not in _cpu_facts()


def _cpu_facts() -> str:
    """What Linux says of the processors; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


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
