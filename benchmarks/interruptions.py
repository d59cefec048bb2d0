"""What kills and full disks at random moments leave: the old files or the new ones, never torn.

    python benchmarks/interruptions.py [--kills 500] [--full-disks 200] [--output interruptions.jsonl]

Export (weights in a file beside the model), save, report and the command line write a new result over an old one, or
into an empty folder, in a forked process. A kill comes at a random time, or before a random change of a file or
folder. A full disk is a small one (a tmpfs: root, or `unshare -Urm`) with a random number of bytes left, in half of
the trials for temporary files too. Then everything that stands there must load and compute what the old result or the
new one does, a disk must have been refused in our words, and the next run must leave what an undisturbed one leaves,
and no other file. Of the three reports each is whole; where they are of two runs, `report.json` says so.

Results go to a JSON lines file; what is in it is not run again. Memory of fresh processes is not measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lobo_fx
from lobo_fx.cli.app import app
from lobo_fx.errors import LoboError
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.terminal.tables import new_table, render

KINDS = ("kill", "full disk")
VERSIONS = ("old", "new")
ROWS = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
DISK = 24 * 2**20
REFUSED, TOLD = 2, "of two runs, and says so"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
TURNS = ("export", "save", "report", "report", "command line", "export", "save", "report", "save", "report")
"""Which operation every ten trials are of; those that take seconds have fewer."""
NETWORKS = f"""\
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from interruptions import ROWS, network

def old():
    return network("old"), ROWS

def new():
    return network("new"), ROWS
"""

Check = Callable[[Path], Any]


def network(version: str) -> nn.Module:
    torch.manual_seed(VERSIONS.index(version))
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 256)).eval()


@functools.cache
def compiled(version: str) -> lobo_fx.Result:
    return lobo_fx.compile(network(version), ["prune_weights"], example_inputs=ROWS, progress=False)


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that writes files.

    Attributes:
        write: writes a version into a folder.
        checks: by path in the folder, what is computed by what stands there, to be equal to what one version computes;
            an error where it is torn.
    """

    write: Callable[[Path, str], object]
    checks: dict[str, Check]


def outputs_of_file(path: Path) -> Any:
    return OnnxRuntime().load(path, threads=1).run({"input": ROWS.numpy()})[0]


def outputs_of_folder(path: Path) -> Any:
    loaded = lobo_fx.load(path)
    assert [row.name for row in loaded.report.rows] == ["original", "PruneWeights()"]
    return loaded.module(ROWS).detach().numpy()


def whole_reports(path: Path) -> Any:
    """The model that the reports are of; of two runs where the checksums in `report.json` say so."""
    saved = json.loads(path.read_text())
    texts = {name: (path.parent / name).read_bytes() for name in saved["files"]}
    assert texts["report.md"].endswith(b".\n"), "report.md is torn"
    assert len(texts["report.csv"].splitlines()) == 3, "report.csv is torn"
    told = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()} == saved["files"]
    return saved["model"].rpartition(":")[2] if told else TOLD


def write_report(folder: Path, version: str) -> None:
    report = dataclasses.replace(compiled(version).report, model=version)
    report.save(folder)


def run_command(folder: Path, version: str) -> None:
    arguments = ["compile", f"{folder.parent / 'networks.py'}:{version}", "--pass", "prune_weights", "--rounds", "1"]
    if app([*arguments, "-o", str(folder)], standalone_mode=False) == REFUSED:
        raise LoboError("as it is printed")


OPERATIONS = {
    "export": Operation(
        lambda folder, version: compiled(version).export(folder / "m.onnx", OnnxExporter(external_data=True)),
        {"m.onnx": outputs_of_file},
    ),
    "save": Operation(lambda folder, version: compiled(version).save(folder / "saved"), {"saved": outputs_of_folder}),
    "report": Operation(write_report, {"report.json": whole_reports}),
    "command line": Operation(
        run_command,
        {
            "original.onnx": outputs_of_file,
            "model.onnx": outputs_of_file,
            "program": outputs_of_folder,
            "report.json": whole_reports,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Undisturbed runs of an operation.

    Attributes:
        folders: what they wrote, by version.
        expected: what is computed by what they wrote, by version and path.
        seconds: how long one takes.
        changes: how many files and folders it opens for writing, moves, makes and removes.
        bytes: how much it writes.
    """

    folders: dict[str, Path]
    expected: dict[str, dict[str, Any]]
    seconds: float
    changes: int
    bytes: int


def names(folder: Path) -> list[str]:
    """All files in a folder; of those named by their content, how many there are."""
    found = (str(file.relative_to(folder)) for file in folder.rglob("*"))
    return sorted(re.sub(r"\.[0-9a-f]{16}\.", ".CONTENT.", name) for name in found)


def found_in(operation: Operation, reference: Reference, folder: Path) -> dict[str, str]:
    """By path, which version stands there."""
    found = {}
    for path, check in operation.checks.items():
        place = folder / path
        if not place.exists() or (place.is_dir() and not (place / "lobo_fx.json").exists()):
            found[path] = "nothing"
            continue
        value = check(place)
        of = [v for v in VERSIONS if equal(value, reference.expected[v][path])]
        found[path] = of[0] if of else value if isinstance(value, str) else "torn"
    return found


def equal(value: Any, expected: Any) -> bool:
    if isinstance(value, str) or isinstance(expected, str):
        return bool(value == expected)
    return bool(np.allclose(value, expected, rtol=1e-4, atol=1e-5))


def forked(work: Callable[[], Any], kill_after: float | None = None) -> tuple[int, Any]:
    """Runs work in a process of its own: its exit status (refused: 2, killed: -9), and what it returns or says."""
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            status = 1
            try:  # nothing may leave this block: what is cleaned up behind it is the parent's
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
                try:
                    said, status = work(), 0
                except LoboError as error:
                    said, status = str(error), REFUSED
                except BaseException:
                    said = traceback.format_exc()
                answer.write(json.dumps(said, default=str).encode())
                answer.flush()
            finally:
                os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer.seek(0)
        text = answer.read()
        return status, json.loads(text) if text else None


def counting(folder: Path, kill_at: int | None = None) -> list[str]:
    """Counts changes of files in a folder from now on, and kills this process before one of them."""
    seen: list[str] = []

    def hook(event: str, given: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in CHANGES) or not isinstance(given[0], (str, os.PathLike)):
            return
        if str(given[0]).startswith(str(folder)):
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(event)

    sys.addaudithook(hook)
    return seen


def refer(operation: Operation, place: Path) -> Reference:
    """Runs an operation undisturbed, twice for each version: the first run warms up."""
    place.mkdir(parents=True)
    (place / "networks.py").write_text(NETWORKS)
    folders, expected, seconds, changes = {}, {}, 0.0, 0
    for version in VERSIONS * 2:
        folder = place / version

        def work(folder: Path = folder, version: str = version) -> tuple[float, int]:
            seen, start = counting(folder), time.perf_counter()
            folder.mkdir(exist_ok=True)
            operation.write(folder, version)
            return time.perf_counter() - start, len(seen)

        status, said = forked(work)
        assert status == 0, said
        seconds, changes = said
        folders[version] = folder
    for version, folder in folders.items():
        expected[version] = {path: check(folder / path) for path, check in operation.checks.items()}
    size = sum(file.stat().st_size for file in folders["new"].rglob("*") if file.is_file())
    return Reference(folders, expected, seconds, changes, size)


def trial(kind: str, operation: Operation, reference: Reference, seed: str, place: Path) -> dict[str, Any]:
    """Disturbs one run, and looks at what it left and what the next one makes of it."""
    chance = random.Random(seed)
    folder = place / "here"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(exist_ok=True)
    (place / "networks.py").write_text(NETWORKS)
    before = chance.choice(["nothing", "old", "old", "old"])
    shutil.copytree(reference.folders["old"], folder) if before == "old" else folder.mkdir()
    moment: dict[str, float | int | str] = {}
    if kind == "full disk":
        moment = {"free": int(chance.uniform(0, 1.3) * reference.bytes), "temporary": chance.choice(["apart", "full"])}
        status, said = forked(functools.partial(on_full_disk, operation, folder, moment))
    elif chance.random() < 0.5:
        moment = {"seconds": chance.uniform(0, 1.1) * reference.seconds}
        status, said = forked(functools.partial(operation.write, folder, "new"), float(moment["seconds"]))
    else:
        moment = {"change": chance.randrange(reference.changes)}
        status, said = forked(functools.partial(killed_at, operation, folder, int(moment["change"])))
    faults = [] if status in (0, REFUSED, -signal.SIGKILL) else [f"status {status}: {said}"]
    (place / "filler").unlink(missing_ok=True)
    found, again = forked(functools.partial(next_run, operation, reference, folder))
    if found:
        faults.append(f"afterwards: {again}")
    else:
        left, made, listing = again
        faults += [f"{path} is torn" for path, version in left.items() if version == "torn"]
        faults += [f"{path} is lost" for path, version in left.items() if version == "nothing" and before == "old"]
        faults += [f"the next run leaves {path}: {v}" for path, v in made.items() if v != "new"]
        if listing != names(reference.folders["new"]):
            faults.append(f"the next run leaves {listing}")
    ended = {0: "done", REFUSED: "refused"}.get(status, "killed")
    said = said if status == REFUSED else None
    return {"before": before, **moment, "ended": ended, "said": said, "left": None if found else left, "faults": faults}


def killed_at(operation: Operation, folder: Path, change: int) -> None:
    counting(folder, kill_at=change)
    operation.write(folder, "new")


def on_full_disk(operation: Operation, folder: Path, moment: dict[str, Any]) -> None:
    """Fills the disk up to some bytes, then writes."""
    if moment["temporary"] == "full":
        (folder.parent / "temporary").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder.parent / "temporary")
    disk = os.statvfs(folder)
    rest = disk.f_bavail * disk.f_frsize - moment["free"]
    with (folder.parent / "filler").open("wb") as stream:
        stream.write(bytes(max(rest, 0)))
    operation.write(folder, "new")


def next_run(operation: Operation, reference: Reference, folder: Path) -> tuple[Any, Any, Any]:
    left = found_in(operation, reference, folder)
    operation.write(folder, "new")
    return left, found_in(operation, reference, folder), names(folder)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A disk of few bytes.

    Raises:
        SystemExit: none can be mounted.
    """
    place.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", place], check=False)
    if done.returncode:
        raise SystemExit("a small disk can't be mounted: run as root, or in `unshare -Urm`")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder to work in; what compilation keeps and measures elsewhere stays out of it."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    torch.set_num_threads(1)
    registry = functools.cache(ONNXRegistry.from_torchlib)
    ONNXRegistry.from_torchlib = staticmethod(registry)  # type: ignore[method-assign]
    registry()
    import lobo_fx.measures.latency

    vars(lobo_fx.measures.latency)["peak_memory"] = lambda *_: (1, 1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        yield Path(folder)


def run(kinds: dict[str, int], written: Path | None = None, part: int = 0, parts: int = 1) -> list[dict[str, Any]]:
    """All trials that are not in the file yet, the operations in turn; or those of one of several processes."""
    results = [json.loads(line) for line in written.read_text().splitlines()] if written and written.exists() else []
    known = {(r["kind"], r["operation"], r["trial"]) for r in results}
    with workplace() as folder, small_disk(folder / "disk") as disk:
        for version in VERSIONS:
            compiled(version)
        references = {name: refer(operation, folder / "reference" / name) for name, operation in OPERATIONS.items()}
        for kind, count in kinds.items():
            for index in range(count):
                name = TURNS[index % len(TURNS)]
                if (kind, name, index) in known or index % parts != part:
                    continue
                place = (disk if kind == "full disk" else folder) / "trial"
                start = time.perf_counter()
                outcome = trial(kind, OPERATIONS[name], references[name], f"{kind}, {name}, {index}", place)
                shutil.rmtree(place, ignore_errors=True)
                took = round(time.perf_counter() - start, 2)
                results.append({"kind": kind, "operation": name, "trial": index, **outcome, "took": took})
                if written:
                    with written.open("a") as stream:
                        stream.write(json.dumps(results[-1]) + "\n")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--full-disks", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("interruptions.jsonl"))
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="which of how many processes this is")
    options = parser.parse_args()
    results = run({"kill": options.kills, "full disk": options.full_disks}, options.output, *options.part)
    columns = [
        "what",
        "trials",
        "ended before it",
        "disturbed",
        "left old",
        "left new",
        "left nothing",
        "of both",
        "told",
        "faults",
    ]
    table = new_table("interruptions", columns)
    for kind in KINDS:
        for name in OPERATIONS:
            of = [r for r in results if (r["kind"], r["operation"]) == (kind, name)]
            left = Counter(state(r["left"]) for r in of if r["ended"] != "done")
            undisturbed = sum(r["ended"] == "done" for r in of)
            counts = [left[word] for word in ("old", "new", "nothing", "of both", TOLD)]
            table.add_row(
                f"{kind}, {name}",
                *map(str, [len(of), undisturbed, len(of) - undisturbed, *counts, sum(bool(r["faults"]) for r in of)]),
            )
    print(render(table))
    for result in results:
        for fault in result["faults"]:
            print(f"{result['kind']}, {result['operation']}, trial {result['trial']}: {fault}")
    return any(result["faults"] for result in results)


def state(left: dict[str, str] | None) -> str:
    """What stands in a folder as a whole: files that don't need each other may be of two runs."""
    found = set((left or {}).values())
    return found.pop() if len(found) == 1 else "of both"


if __name__ == "__main__":
    sys.exit(main())
