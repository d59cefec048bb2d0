"""Checksums of values: two that differ in anything are told apart, equal ones are not, and the unknown has none."""

from __future__ import annotations

import abc
import collections
import copy
import dataclasses
import enum
import functools
import io
import random
import runpy
import subprocess
import sys
import textwrap
import threading
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lobo_fx.content import checksum_of, checksum_of_data

DATA = torch.arange(6.0).reshape(2, 3)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))


def of_a_class(**entries: Any) -> Any:
    """An object of a class of one name, with these entries."""
    return type("Loss", (), {"__module__": __name__, "__qualname__": "Loss", **entries})()


def of_classes() -> list[tuple[Any, Any]]:
    def cached(number: int) -> Any:
        return functools.cache(lambda: number)

    class Slots:
        __slots__ = ("inner",)

        def __init__(self, inner: int) -> None:
            self.inner = inner

    class Beside(Slots): ...

    class Named(NamedTuple):
        weight: float

    def colour(value: int) -> Any:
        return enum.Enum("Colour", {"red": value})

    class Whole(int): ...

    return [
        (of_a_class(weights=[1]), of_a_class(weights=[2])),
        (of_a_class(weights={"a": 1}), of_a_class(weights={"a": 2})),
        (of_a_class(a=1.0, b=2.0), of_a_class(a=2.0, b=1.0)),
        (of_a_class(rule=cached(1)), of_a_class(rule=cached(2))),
        (of_a_class(rule=property(lambda self: 1)), of_a_class(rule=property(lambda self: 2))),
        (of_a_class(rule=staticmethod(lambda: 1)), of_a_class(rule=staticmethod(lambda: 2))),
        (
            of_a_class(rule=functools.cached_property(lambda self: 1)),
            of_a_class(rule=functools.cached_property(lambda self: 2)),
        ),
        (of_a_class(inner=type("Inner", (), {"a": 1})), of_a_class(inner=type("Inner", (), {"a": 2}))),
        (Slots(1), Slots(2)),
        (Beside(1), Beside(2)),
        (Named(1.0), (1.0,)),
        (Whole(1), 1),
        (colour(1).red, colour(2).red),
    ]


def of_functions() -> list[tuple[Any, Any]]:
    def told(weight: float) -> Any:
        def loss(outputs: Any, labels: Any) -> Any:
            return loss.weight * outputs  # type: ignore[attr-defined]

        loss.weight = weight  # type: ignore[attr-defined]
        return loss

    def made(code: str, **known: Any) -> Any:
        exec(code, known)
        return known["loss"]

    reads = "def loss(outputs, labels): return [WEIGHT * output for output in outputs]"
    calls = "def weight(): return {}\ndef loss(outputs, labels): return weight() * outputs"
    return [
        (told(1.0), told(2.0)),
        (made(reads, WEIGHT=1), made(reads, WEIGHT=2)),
        (made(calls.format(1)), made(calls.format(2))),
        (made("def loss(o, l, a, b): return o * a + b"), made("def loss(o, l, b, a): return o * a + b")),
        (made("def loss(o, l): return o"), made("def loss(o, *l): return o")),
        (made("def loss(o, l=1): return o"), made("def loss(o, l=2): return o")),
        ({1: 2}.get, {1: 3}.get),
        ([1].count, [2].count),
        (random.Random(1).random, random.Random(2).random),
    ]


def of_objects() -> list[tuple[Any, Any]]:
    class Own(dict[str, int]): ...

    masked = np.ma.masked_array([1, 2], mask=[True, False])
    return [
        (random.Random(1), random.Random(2)),
        (io.BytesIO(b"a"), io.BytesIO(b"b")),
        (ValueError(1), ValueError(2)),
        (collections.deque([1]), collections.deque([2])),
        (collections.defaultdict(int), collections.defaultdict(list)),
        (Own(a=1), Own(a=2)),
        (Own(a=1), {"a": 1}),
        (slice(0, 2), slice(0, 3)),
        (masked, np.ma.masked_array([1, 2], mask=[False, True])),
        (np.arange(3)[::-1], np.arange(3)),
        (np.arange(3, dtype=">i4"), np.arange(3, dtype="<i4")),
        (np.float64(1), 1.0),
        ({"a", "b"}, {"a", "c"}),
        (torch.float32, "torch.float32"),
    ]


def test_data_are_told_apart_by_all_that_they_hold() -> None:
    given: list[Any] = [
        [(DATA, 1)],
        [(DATA, 2)],
        [(DATA, 2.0)],
        [(DATA, "2")],
        [{"x": DATA, "y": 1}],
        [{"x": DATA, "z": 1}],
    ]
    found = [checksum_of_data(data) for data in given]
    assert len(set(found)) == len(given)
    assert checksum_of_data([(DATA.clone(), 1)]) == found[0]
    assert checksum_of_data([(DATA, threading.Lock())]) == ""  # of which nothing is known
    assert checksum_of_data(iter([DATA])) == ""


def pairs() -> list[Any]:
    """Pairs that have one name each."""

    def closed_over(factor: float) -> Any:
        return lambda outputs, labels: factor * functional.cross_entropy(outputs, labels)

    def weighted(seed: int) -> Any:
        weights = torch.rand(5_000, generator=torch.Generator().manual_seed(seed))
        return functools.partial(functional.cross_entropy, weight=weights)

    class Loss:
        def __init__(self, smoothing: float) -> None:
            self.smoothing = smoothing

        def __call__(self, outputs: Any, labels: Any) -> Any: ...

        def method(self, outputs: Any, labels: Any) -> Any: ...

    def with_a_method(factor: float) -> Any:
        class Scaled:
            def __call__(self, outputs: Any, labels: Any) -> Any:
                return factor * functional.cross_entropy(outputs, labels)

        class Inherited(Scaled): ...

        return Inherited()

    return [
        (with_a_method(1.0), with_a_method(2.0)),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.5)),
        (closed_over(1.0), closed_over(2.0)),
        (lambda outputs, labels: outputs.mean(), lambda outputs, labels: outputs.sum()),
        (lambda outputs, labels: outputs[..., 0], lambda outputs, labels: outputs[..., 1]),
        (weighted(0), weighted(1)),
        (Loss(0.1), Loss(0.2)),
        (Loss(0.1).method, Loss(0.2).method),
        (network(0), network(1)),
        ({"temperature": 2.0}, {"temperature": 2}),
        (np.arange(3), np.arange(3) + 1),
        ([(DATA, [])], [(DATA,)]),
        ([DATA], (DATA,)),
        *of_classes(),
        *of_functions(),
        *of_objects(),
    ]


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: type(pair[0]).__name__)
def test_values_of_one_name_are_told_apart_by_what_they_hold(pair: tuple[Any, Any]) -> None:
    first, second = map(checksum_of, pair)
    assert first
    assert second
    assert first != second
    assert checksum_of(copy.deepcopy(pair[0])) == first


def test_a_name_that_is_not_bound_is_no_error() -> None:
    def outer(bind: bool) -> Any:
        if bind:
            factor = 2.0
        return lambda outputs, labels: factor * outputs

    assert "" != checksum_of(outer(True)) != checksum_of(outer(False)) != ""


def test_objects_in_a_circle_are_told_apart() -> None:
    class Trainer:
        def __init__(self, rate: float) -> None:
            self.rate, self.itself, self.callbacks = rate, self, [Callback(self)]

    class Callback:
        def __init__(self, trainer: Trainer) -> None:
            self.trainer, self.stop = trainer, trainer.__init__  # type: ignore[misc]

    found = [checksum_of(Trainer(rate)) for rate in (0.1, 0.2, 0.1)]
    assert "" not in found
    assert found[0] == found[2] != found[1]


def test_classes_of_many_kinds_are_known() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        rate: float = 0.1
        layers: list[int] = dataclasses.field(default_factory=list)

    class Base(abc.ABC):
        @abc.abstractmethod
        def run(self) -> int: ...

    class Derived(Base):
        @functools.cached_property
        def cached(self) -> int:
            return 1

        @classmethod
        def make(cls) -> Derived:
            return cls()

        def run(self) -> int:
            return super().__init__() or 1

    @torch.no_grad()
    def decorated(outputs: Any) -> Any:
        return outputs

    for value in (Settings(), Derived(), Derived().run, decorated, network(0), nn.GRU(2, 2), torch.no_grad):
        assert checksum_of(value)
        assert checksum_of(value) == checksum_of(copy.deepcopy(value))


def test_what_is_not_known_has_no_checksum() -> None:
    class Rude:
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise KeyError(protocol)

    def one() -> Iterator[int]:
        yield 1

    objects = np.array([object()])
    for unknown in (torch.eye(2).to_sparse(), threading.Lock(), one(), Rude(), objects, [Rude()], sys.stdout):
        assert checksum_of(unknown) == ""
    checksum_of(unittest.mock.Mock(spec=len))  # whatever it is, it is no error


def test_parts_that_many_hold_are_read_once() -> None:
    held: list[Any] = []
    for _ in range(100):
        held = [held, held]
    assert checksum_of(held)


def test_a_file_that_text_names_counts(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    found = [checksum_of(str(file))]
    for text in ("a", "b", "c" * (1 << 21), "d" * (1 << 22)):
        file.write_text(text, encoding="utf-8")
        found.append(checksum_of(str(file)))
    assert len(set(found)) == len(found)


def test_a_script_has_one_checksum_in_every_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
            import torch
            from lobo_fx.content import checksum_of

            KNOWN = {"a", "b", "c"}

            class Loss:
                kinds = KNOWN

                def __call__(self, outputs, labels):
                    return outputs.mean() if labels in {"x", "y"} else torch.nn.functional.mse_loss(outputs, labels)

            def score(module):
                return len(KNOWN)

            print(checksum_of(Loss(), score))
        """),
        encoding="utf-8",
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    elsewhere = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    assert elsewhere.strip()
    assert elsewhere == capsys.readouterr().out
