"""A session in a process of its own.

Some options hold for a whole process (ONNX Runtime takes the denormals setting of its first session), and the position
of a session in memory affects its times. Therefore files to compare are each loaded in a fresh process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lobo_fx.errors import InvalidInput
from lobo_fx.plugins.protocols import Arrays, ArraySpec

__all__ = ["SessionApart", "session_apart"]


@dataclasses.dataclass(frozen=True)
class SessionApart:
    """A `Session` whose calls run in another process."""

    process: subprocess.Popen[bytes]
    inputs: list[ArraySpec]

    def run(self, arrays: Arrays) -> list[np.ndarray[Any, Any]]:
        """Runs it once.

        Raises:
            RuntimeError: what the other process raised, in its words.
        """
        return list(_arrays(self._ask(_packed(arrays))).values())

    def seconds(self, calls: int, cpu: bool = False) -> float:
        """Times calls with the arrays of the last `run`; returns the mean wall time of a call, or its CPU time."""
        return float(json.loads(self._ask(str(calls).encode()))[cpu])

    def _ask(self, message: bytes) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            _send(self.process.stdin, message)
            answer = _receive(self.process.stdout)
        except (OSError, EOFError) as error:
            raise RuntimeError("the process that ran it ended") from error
        if answer[:1] == _FAILED:
            raise RuntimeError(answer[1:].decode())
        return answer[1:]


@contextlib.contextmanager
def session_apart(path: Path, runtime: object, core: int | None = None) -> Iterator[SessionApart]:
    """Loads a file in a process of its own, on as many threads as its options say, else one.

    Args:
        path: the file.
        runtime: the runtime (`lobo_fx.plugins.tuning.TunesFiles`); created anew in that process.
        core: index among the cores that this process may use, to which the new process is pinned where the system
            supports it; other work on that core then slows all processes pinned to it alike.

    Raises:
        InvalidInput: the file can't be loaded.
    """
    kind = type(runtime)
    command = [sys.executable, "-m", __name__, str(path), f"{kind.__module__}:{kind.__qualname__}"]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        try:
            assert process.stdout is not None
            if core is not None and hasattr(os, "sched_setaffinity"):
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(process.pid, {cores[core % len(cores)]})
            try:
                specs = json.loads(_receive(process.stdout))
            except EOFError:
                process.wait()
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines() or ["it ended"]
                raise InvalidInput(f"{path.name} can't be loaded in a fresh process: {lines[-1]}") from None
            inputs = [ArraySpec(name, dtype, tuple(shape)) for name, dtype, shape in specs]
            yield SessionApart(process, inputs)
        finally:
            process.kill()


_DONE, _FAILED = b"+", b"-"
_LENGTH = struct.Struct("<Q")


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(_LENGTH.pack(len(message)) + message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    head = stream.read(_LENGTH.size)
    message = stream.read(*_LENGTH.unpack(head)) if len(head) == _LENGTH.size else b""
    if not message:
        raise EOFError
    return message


def _packed(arrays: Mapping[str, np.ndarray[Any, Any]] | Sequence[np.ndarray[Any, Any]]) -> bytes:
    """Serialises arrays with their names in front; without names, they are numbered."""
    named = arrays if isinstance(arrays, Mapping) else {str(place): array for place, array in enumerate(arrays)}
    stream = io.BytesIO()
    stream.write(json.dumps(list(named)).encode() + b"\n")
    for array in named.values():
        np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _arrays(message: bytes) -> dict[str, np.ndarray[Any, Any]]:
    stream = io.BytesIO(message)
    return {name: np.load(stream, allow_pickle=False) for name in json.loads(stream.readline())}


def _serve(path: str, runtime: str) -> None:
    """Loads a file, sends its input specifications, and answers arrays with outputs, counts of calls with times."""
    import importlib

    answers, questions = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # so that output that a library prints does not mix with answers
    module, _, name = runtime.partition(":")
    session = getattr(importlib.import_module(module), name)().load(Path(path), None)
    _send(answers, json.dumps([[spec.name, spec.dtype, spec.shape] for spec in session.inputs]).encode())
    feed: Arrays = {}
    with contextlib.suppress(EOFError):
        while question := _receive(questions):
            try:
                if question.isdigit():
                    calls, cpu, start = int(question), time.process_time(), time.perf_counter()
                    for _ in range(calls):
                        session.run(feed)
                    took = time.perf_counter() - start, time.process_time() - cpu
                    answer = json.dumps([seconds / calls for seconds in took]).encode()
                else:
                    feed = _arrays(question)
                    answer = _packed(session.run(feed))
                _send(answers, _DONE + answer)
            except Exception as error:
                _send(answers, _FAILED + str(error).encode())


if __name__ == "__main__":
    _serve(*sys.argv[1:])
