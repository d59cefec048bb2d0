"""Kills and full disks: a share of the trials; and that what writes in place is found out."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LONG = 2**20


@pytest.fixture
def interruptions() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("interruptions")
    sys.path.remove(str(BENCHMARKS))


def in_place(folder: Path, version: str) -> None:
    """Two files that belong together, one after the other."""
    for name in ("weights", "graph"):
        (folder / name).write_text(version * LONG)


def version_of(path: Path) -> str:
    texts = {(path.parent / name).read_text() for name in ("weights", "graph")}
    assert len(texts) == 1, "of two versions"
    (text,) = texts
    return f"{len(text)} {text[:3]}"


def between_changes(changes: int) -> list[str]:
    """A seed for each change to a file at which a process is killed that writes over an older version."""
    found: dict[int, str] = {}
    for number in range(1000):
        chance = random.Random(f"seed {number}")
        before, by_time = chance.choice(["nothing", "old", "old", "old"]), chance.random() < 0.5
        if before == "old" and not by_time:
            found.setdefault(chance.randrange(changes), f"seed {number}")
    assert len(found) == changes
    return list(found.values())


def test_what_writes_in_place_is_found_torn(interruptions: Any, tmp_path: Path) -> None:
    operation = interruptions.Operation(in_place, {"graph": version_of})
    reference = interruptions.refer(operation, tmp_path / "reference")
    assert reference.changes == 3, "a folder and two files"
    found = [interruptions.trial("kill", operation, reference, seed, tmp_path / "trial") for seed in between_changes(3)]
    assert any(outcome["faults"] for outcome in found)
    assert all(outcome["ended"] in ("killed", "done") for outcome in found)


@pytest.mark.slow
def test_a_share_of_the_trials_leaves_the_old_or_the_new(interruptions: Any) -> None:
    results = interruptions.run({"kill": 20, "full disk": 10})
    assert len(results) == 30
    assert [fault for result in results for fault in result["faults"]] == []
