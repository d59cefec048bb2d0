"""The drawing of a network: a tree of its modules, with what each of them became."""

from __future__ import annotations

import json
import math

from lobo_fx import Report
from lobo_fx.measures.module_figures import ModuleFigures
from lobo_fx.report.cells import Source
from lobo_fx.report.drawing import Part, drawing
from lobo_fx.report.records import ModuleRow, Row


def figures(width: int | None, parameters: int, nonzero: int, stored: str, computed: str) -> ModuleFigures:
    return ModuleFigures("linear layer" if width else "", width, parameters, nonzero, 4 * parameters, stored, computed)


def drawn(*modules: ModuleRow) -> Part:
    row = Row("original", 10, 10, 0.0, None, 40, math.inf, None, 0.0)
    found = drawing(Source(json.loads(Report("Network", [row], modules=list(modules)).to_json())))
    assert found is not None
    return found


WHOLE = figures(None, 300, 300, "float32", "float32")


def test_modules_stand_in_those_that_hold_them_and_single_ones_are_one() -> None:
    layer = figures(100, 100, 100, "float32", "float32")
    root = drawn(
        ModuleRow("", WHOLE, WHOLE),
        *(ModuleRow(name, WHOLE, WHOLE) for name in ("encoder", "encoder.down")),
        *(ModuleRow(name, layer, layer) for name in ("encoder.down.0", "encoder.fc", "encoder2")),
    )
    assert (root.name, [part.name for part in root.parts]) == ("Network", ["encoder", "encoder2"])
    assert [(part.name, part.path) for part in root.parts[0].parts] == [
        ("down.0", "encoder.down.0"), ("fc", "encoder.fc")
    ]  # fmt: skip
    assert len(root.bars) == 3
    assert root.parts[1].parts == []


def test_bars_are_shares_of_the_widest_and_zeros_a_part_of_them() -> None:
    root = drawn(
        ModuleRow("", WHOLE, WHOLE),
        ModuleRow("a", figures(200, 100, 100, "float32", "float32"), figures(100, 50, 50, "float32", "float32")),
        ModuleRow("b", figures(100, 100, 100, "float32", "float32"), figures(100, 100, 25, "float32", "float32")),
        ModuleRow("c", None, figures(50, 100, 98, "float32", "float32")),
    )
    assert [(bar.before, bar.after, bar.zero) for bar in root.bars] == [(100, 50, 0), (50, 50, 37.5), (0, 25, 0)]
    left = [None if part.stays is None else part.stays.text for part in root.parts]
    assert left == ["50%", "25%", None]


def test_parts_are_coloured_by_what_they_store_and_compute_in() -> None:
    kinds = {
        ("float32", "float32"): "float", ("float16", "float32"): "float", ("int8", "float32"): "stored",
        ("e4m3", "float32"): "stored", ("int8", "int8"): "integer", ("int4", "int8"): "few",
        ("log2_6", "float32"): "few", ("log2_8", "float32"): "stored", ("mixed", "float32"): "mixed",
    }  # fmt: skip
    old = figures(8, 10, 10, "float32", "float32")
    rows = [ModuleRow(f"m{at}", old, figures(8, 10, 10, *kind)) for at, kind in enumerate(kinds)]
    root = drawn(ModuleRow("", WHOLE, WHOLE), *rows, ModuleRow("gone", old, None))
    assert [part.precision for part in root.parts] == [*kinds.values(), "gone"]


def test_what_was_not_measured_is_not_shown_and_a_report_without_modules_has_no_drawing() -> None:
    root = drawn(ModuleRow("", WHOLE, WHOLE))
    assert [unit for _, _, unit in root.figures] == ["parameters", ""]
    assert root.decibels is None
    row = Row("original", 10, 10, 0.0, None, 40, math.inf, None, 0.0)
    assert drawing(Source(json.loads(Report("Network", [row]).to_json()))) is None
    assert drawing(Source({"passes": []})) is None, "a report from before"


def test_a_vocabulary_does_not_make_all_other_bars_short() -> None:
    widths = (100, 200, 100, 50_000)
    layers = [figures(width, 100, 100, "float32", "float32") for width in widths]
    root = drawn(ModuleRow("", WHOLE, WHOLE), *(ModuleRow(f"m{at}", one, one) for at, one in enumerate(layers)))
    assert [(bar.after, bar.is_longer) for bar in root.bars] == [(50, False), (100, False), (50, False), (100, True)]
