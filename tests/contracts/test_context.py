"""Calibration data in two parts; and of what goes wrong in the user's own code, whose it was and where."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.confirmation import Confirmation
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.split import Split
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.passes import MixedPrecision, PruneChannels, QuantizeStatic


class Two(nn.Module):
    """Takes rows, a table that all rows share, and rows along the second dimension."""

    def forward(self, x: torch.Tensor, table: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
        return x @ table + across.T


def program(dynamic_shapes: Any = None) -> Program:
    return trace(Two(), (torch.ones(6, 3), torch.ones(3, 2), torch.ones(2, 6)), dynamic_shapes)


def batch(rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Rows that say which they are."""
    numbers = torch.tensor(rows, dtype=torch.float)
    return numbers[:, None].expand(-1, 3), torch.ones(3, 2), numbers.expand(2, -1)


def split(made: Program, batches: list[Any]) -> dict[bool, list[int]]:
    """The numbers of the rows of each part."""
    found: dict[bool, list[int]] = {False: [], True: []}
    for inputs, held_out in Context(made.signature, batches, show_progress=False).split_batches():
        x, table, across = inputs.tensors
        assert torch.equal(table, torch.ones(3, 2))
        assert torch.equal(across[0], x[:, 0])
        found[held_out] += x[:, 0].int().tolist()
    return found


def free() -> Program:
    rows = torch.export.Dim("rows", min=1)
    return program({"x": {0: rows}, "table": None, "across": {1: rows}})


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [7] * 28 + [4], [64, 136]], ids=["one", "ones", "sevens", "two"])
def test_every_fourth_row_is_held_out_and_of_many_every_eighth(sizes: list[int]) -> None:
    numbers = iter(range(200))
    found = split(free(), [batch([next(numbers) for _ in range(size)]) for size in sizes])
    assert found[True] == [*range(1, 64, 4), *range(65, 200, 8)]
    assert sorted(found[False] + found[True]) == list(range(200))


def test_of_a_fixed_batch_whole_batches_are_held_out() -> None:
    found = split(program(), [batch(range(6 * at, 6 * at + 6)) for at in range(6)])
    assert found[True] == [*range(6, 12), *range(30, 36)]
    assert split(program(), [batch(range(6))]) == {False: list(range(6)), True: []}


class Shuffling:
    """An iterable of the user's own that gives its rows in another order at every read."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers, self.random = list(numbers), random.Random(0)

    def __iter__(self) -> Iterator[Any]:
        self.random.shuffle(self.numbers)
        return (batch(self.numbers[start : start + 7]) for start in range(0, len(self.numbers), 7))


def loader(generator: torch.Generator | None) -> Iterable[Any]:
    return torch.utils.data.DataLoader(
        cast(Any, list(range(80))), batch_size=7, shuffle=True, generator=generator, collate_fn=batch
    )


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "global generator": lambda: loader(None),
    "own generator": lambda: loader(torch.Generator().manual_seed(3)),
    "plain iterable": lambda: Shuffling(range(80)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_that_shuffles_never_has_held_out_rows_fitted(name: str) -> None:
    data = LOADERS[name]()
    context = Context(free().signature, data, show_progress=False)
    orders: set[tuple[int, ...]] = set()
    held_out: set[int] = set()
    fitted: set[int] = set()

    def numbers(batches: Iterable[Inputs]) -> list[int]:
        return [int(number) for inputs in batches for number in inputs.tensors[0][:, 0]]

    for read in range(3):
        held_out |= set(numbers(context.held_out_batches(8)))  # stops before the end
        found = numbers(dataclasses.replace(context, notes=[]).fitting_batches())
        orders.add(tuple(found))
        fitted |= set(found)
        assert len(set(found)) == len(found) == 80 - 18, read
    assert len(orders) == 3, "the twin: the loader does shuffle"
    assert len(held_out) > 8
    assert not held_out & fitted


def test_equal_rows_are_on_one_side() -> None:
    found = split(free(), [batch([1, 2, 1, 3]), batch([2, 2, 1])])
    assert found == {False: [1, 1, 3, 1], True: [2, 2, 2]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_rows_of_any_type_are_told_apart(dtype: torch.dtype) -> None:
    rows, made = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 1]]).to(dtype), Split()
    assert [made.of([row]) for row in rows] == [False, True, False, False]
    assert [made.of([row]) for row in rows.flip(0)] == [False, False, True, False]
    assert made.of([torch.tensor(1).to(dtype)]) is False  # no dimension at all


def test_rows_of_a_computed_size_are_not_taken_apart() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y.reshape(-1, 2, 3).sum(1)

    rows = torch.export.Dim("rows", min=1, max=64)
    shapes = {"x": {0: rows}, "y": {0: 2 * rows}}
    made = trace(Halves(), (torch.ones(6, 3), torch.ones(12, 3)), shapes)
    assert made.signature.batch is None
    context = Context(
        made.signature, [(size * torch.ones(4, 3), torch.ones(8, 3)) for size in (1, 2)], show_progress=False
    )
    assert [(len(inputs.tensors[0]), held_out) for inputs, held_out in context.split_batches()] == [
        (4, False),
        (4, True),
    ]


ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def fail(*given: object) -> Any:
    raise RuntimeError("out of luck")


class Loader:
    """Batches of which one can't be read."""

    def __init__(self, sound: int) -> None:
        self.sound = sound

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.sound):
            yield ROWS, torch.zeros(8, dtype=torch.long)
        fail()


TAYLOR = PruneChannels(0.5, importance="taylor", round_to=1)
LABELLED = [(ROWS, torch.zeros(8, dtype=torch.long))]
FAILURES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "calibration_data": ([QuantizeStatic(kernels="all")], {"calibration_data": Loader(1)}),
    "train_data": ([TAYLOR], {"train_data": Loader(1), "loss_fn": nn.functional.cross_entropy}),
    "loss_fn": ([TAYLOR], {"train_data": LABELLED, "loss_fn": fail}),
    "evaluate": ([], {"evaluate": fail}),
}


@pytest.mark.parametrize("argument", FAILURES)
def test_an_error_in_the_users_code_names_it_and_its_line(argument: str) -> None:
    passes, given = FAILURES[argument]
    with pytest.raises(
        InvalidInput, match=rf"{argument} failed at .*test_context\.py:\d+: .*RuntimeError: out of luck"
    ):
        lobo_fx.compile(network(), passes, example_inputs=ROWS, progress=False, **given)


def test_a_loader_that_fails_at_once_is_refused_before_work() -> None:
    with pytest.raises(InvalidInput, match=r"calibration_data failed at .*test_context\.py"):
        lobo_fx.compile(network(), example_inputs=ROWS, calibration_data=Loader(0), progress=False)


def test_a_function_called_wrongly_is_not_blamed_on_our_line() -> None:
    wrong: Any = lambda: 1.0  # noqa: E731
    with pytest.raises(InvalidInput, match=r"evaluate failed: TypeError: .* takes 0 positional"):
        lobo_fx.compile(network(), example_inputs=ROWS, evaluate=wrong, progress=False)


@pytest.mark.parametrize("scores", [[math.nan], [1.0, math.nan]], ids=["first", "later"])
def test_a_score_that_is_not_a_number_is_refused(scores: list[float]) -> None:
    given = iter(scores)
    mixed = MixedPrecision(drop=0.01, quantizer=QuantizeStatic(kernels="all"))
    with pytest.raises(InvalidInput, match="evaluate returned NaN"):
        lobo_fx.compile(
            network(),
            [mixed],
            example_inputs=ROWS,
            calibration_data=[ROWS],
            evaluate=lambda module: next(given, math.nan),
            progress=False,
        )


@pytest.mark.parametrize("seed", [True, -1, 2**63, 2**64, 1.0, "0"])
def test_a_seed_is_a_whole_number_of_63_bits(seed: Any) -> None:
    with pytest.raises(InvalidInput, match=r"seed is .*it must be a whole number"):
        lobo_fx.compile(network(), example_inputs=ROWS, seed=seed, progress=False)


UNFIT: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "no rows": (lambda: torch.randn(0, 6), "without rows nothing can be verified"),
    "meta": (lambda: torch.randn(8, 6, device="meta"), "meta device"),
    "sparse": (lambda: ROWS.to_sparse(), "layout sparse_coo; make it dense"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_tensors_that_hold_nothing_to_compute_with_are_refused(name: str) -> None:
    make, words = UNFIT[name]
    with pytest.raises(InvalidInput, match=f"example_inputs holds a tensor .*{words}"):
        lobo_fx.compile(network(), example_inputs=make(), progress=False)
    with pytest.raises(InvalidInput, match=f"calibration_data, batch 0 holds a tensor .*{words}"):
        lobo_fx.compile(network(), example_inputs=ROWS, calibration_data=[make()], progress=False)


def test_an_empty_dimension_that_counts_no_rows_is_no_fault() -> None:
    """A cache of keys before the first step."""
    result = lobo_fx.compile(
        Joined(), example_inputs=(torch.ones(2, 0, 3), torch.ones(2, 1, 3)), dynamic_shapes=None, progress=False
    )
    assert result.module(torch.ones(2, 0, 3), torch.ones(2, 1, 3)).shape == (2, 1, 3)


class Joined(nn.Module):
    """Appends a step to a cache."""

    def forward(self, cache: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return torch.cat([cache, step], 1) * 2


@pytest.mark.parametrize(
    ("compiled", "floating", "taken_back"),
    [
        (1.2, 1.0, True),
        (1.2, 1.3, False),
        (0.3, 0.2, True),
        (0.3, 0.299, False),
        (1.2, 1.199, False),
        (0.9, None, False),
    ],
)
def test_integers_are_taken_back_by_a_difference_that_can_be_shown(
    compiled: float, floating: float | None, taken_back: bool
) -> None:
    assert Confirmation(compiled, floating).takes_back is taken_back


def test_weights_that_no_file_computes_in_are_named_first() -> None:
    model = torch.nn.Linear(4, 2).bfloat16()
    notes = lobo_fx.compile(model, [], example_inputs=torch.ones(2, 4).bfloat16(), progress=False).report.notes
    assert notes == [
        "'weight' is bfloat16, which runtimes do not compute in on CPU, so `export` will refuse it: "
        "compile model.float() to export"
    ]


def test_an_exit_in_the_users_code_is_an_error_of_it() -> None:
    """It ended the process, with a status of its own and without a word."""

    def leave(module: nn.Module) -> float:
        raise SystemExit(4)

    with pytest.raises(InvalidInput, match=r"evaluate failed at .*test_context\.py:\d+: .*SystemExit: 4"):
        lobo_fx.compile(nn.Linear(4, 2), [], example_inputs=torch.ones(2, 4), evaluate=leave, progress=False)
