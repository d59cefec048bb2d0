"""Peak memory of a file, measured in a fresh process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from lobo_fx.errors import InvalidInput
from lobo_fx.files import temporary_folder
from lobo_fx.plugins.protocols import Arrays, Runtime

__all__ = ["peak_memory", "peak_memory_now"]


def peak_memory(path: Path, runtime: str, threads: int, arrays: Arrays) -> tuple[int, int]:
    """Peak memory in bytes of a fresh process: before it loads the file, and after it ran it.

    Args:
        path: the file.
        runtime: `module:class` of the runtime.
        threads: threads of the runtime.
        arrays: the inputs; the process holds them before it loads the file.

    Raises:
        InvalidInput: the process failed; its last line is quoted.
    """
    with temporary_folder() as folder:
        stored = folder / "arrays.npz"
        np.savez(stored, *arrays.values())
        command = [
            sys.executable,
            "-m",
            "lobo_fx.measures.memory",
            str(path),
            runtime,
            str(threads),
            str(stored),
            *arrays,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"it ended with status {done.returncode}").splitlines()[-1]
        raise InvalidInput(f"{path} does not run in a fresh process: {reason}")
    base, peak = json.loads(done.stdout.splitlines()[-1])
    return base, peak


def _measure_memory(path: str, runtime: str, threads: str, stored: str, *names: str) -> tuple[int, int]:
    import importlib

    module, _, name = runtime.partition(":")
    loader: Runtime = getattr(importlib.import_module(module), name)()
    with np.load(stored) as arrays:
        feed = dict(zip(names, (arrays[key] for key in arrays.files), strict=True))
    base = peak_memory_now()
    session = loader.load(Path(path), int(threads))
    for _ in range(2):
        session.run(feed)
    return base, peak_memory_now()


def peak_memory_now() -> int:
    """Peak memory of this process in bytes; `ru_maxrss` would include the parent's peak from before the exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(_measure_memory(*sys.argv[1:])))
