"""Costs measured at different times are costs of one machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

SMALL, LARGE = (Kernel("linear", ((1, size), (size, 4))) for size in (8, 80))


def runtime(
    slower: float, asked: list[Kernel] | None = None, refused: str = ""
) -> Callable[[Sequence[Kernel]], Mapping[Kernel, Cost | NoCost]]:
    """A runtime on which everything takes so many times what its first size says."""

    def measure(kernels: Sequence[Kernel]) -> Mapping[Kernel, Cost | NoCost]:
        if asked is not None:
            asked.extend(kernels)
        found: dict[Kernel, Cost | NoCost] = {}
        for kernel in kernels:
            time = slower * kernel.shapes[0][-1]
            found[kernel] = NoCost("refused") if kernel.operator == refused else Cost(time, time / 2)
        return found

    return measure


@pytest.mark.parametrize("slower", [0.5, 1.0, 1.7])
def test_what_a_busy_machine_measures_is_put_at_the_pace_of_the_table(slower: float) -> None:
    table = CostTable("a machine", {})
    table.measure([SMALL], runtime(1.0))
    before = dict(table.costs)
    table.measure([SMALL, LARGE], runtime(slower))
    assert table[LARGE] == Cost(80.0, 40.0)
    assert {key: table.costs[key] for key in before} == before, "what was known is not measured anew"


def test_the_pace_is_that_of_most_kernels() -> None:
    table = CostTable("a machine", {})
    table.measure([SMALL], runtime(1.0))
    measure = runtime(2.0)

    def one_interrupted(kernels: Sequence[Kernel]) -> Mapping[Kernel, Cost | NoCost]:
        found = dict(measure(kernels))
        disturbed = next(kernel for kernel in kernels if kernel.operator == "add")
        return found | {disturbed: Cost(1e6, 1e6)}

    table.measure([LARGE], one_interrupted)
    assert table[LARGE] == Cost(80.0, 40.0)


def test_without_kernels_in_common_costs_are_as_measured() -> None:
    shipped = CostTable("another machine", {SMALL.key: Cost(1.0, 1.0)}, shipped=True)
    shipped.measure([LARGE], runtime(3.0))
    assert shipped[LARGE] == Cost(240.0, 120.0)
    refusing = CostTable("a machine", {})
    refusing.measure([SMALL], runtime(1.0, refused="conv"))
    refusing.measure([LARGE], runtime(2.0, refused="conv"))
    assert refusing[LARGE] == Cost(80.0, 40.0)


def test_a_table_without_pacemakers_has_the_pace_of_what_is_asked_again() -> None:
    table = CostTable("another machine", {SMALL.key: Cost(4.0, 1.0)}, shipped=True)
    table.measure([SMALL, LARGE], runtime(1.0))
    assert table[LARGE] == Cost(40.0, 10.0), "integers are faster there, for what they are here"


def test_a_table_that_knows_everything_measures_nothing() -> None:
    table, asked = CostTable("a machine", {}), list[Kernel]()
    table.measure([SMALL], runtime(1.0, asked))
    assert asked[0] == SMALL
    assert len(asked) > 1
    asked.clear()
    table.measure([SMALL], runtime(1.0, asked))
    assert not asked


def test_costs_that_another_process_wrote_meanwhile_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = (CostTable.of_this_machine("a runtime") for _ in range(2))
    one, other = (Kernel("linear", ((1, size), (size, size))) for size in (8, 16))
    first.add({one: Cost(1.0, 2.0)})
    second.add({other: Cost(3.0, 4.0)})
    assert CostTable.of_this_machine("a runtime").costs == {one.key: Cost(1.0, 2.0), other.key: Cost(3.0, 4.0)}
