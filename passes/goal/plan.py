"""The plan of a goal: widths and integers that a search found, to be applied to any checkpoint of the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lobo_fx.axes import Inference
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.files import read_json, written_beside
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate
from lobo_fx.passes.pruning.plan import PruningPlan
from lobo_fx.passes.pruning.prune_channels import PruneChannels
from lobo_fx.passes.quantization.integers.prices import open_table
from lobo_fx.passes.quantization.quantize_static import QuantizeStatic, folded, fused_where_faster
from lobo_fx.terminal.tables import new_table, render

__all__ = ["GoalPlan"]

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class GoalPlan:
    """What to do to a program, decided. Compare plans with `==`, print them, keep them in a file.

    Attributes:
        pruning: which positions stay.
        integers: names of the operators that run as integers; None where the program stays float.
        runtime: whose kernels were measured.
        expected: what the search expected or measured, by name: shares of the original's latency and size, decibels.

    Example:
        ```python
        result = lobo_fx.compile(model, goal=lobo_fx.Goal(latency=0.25), calibration_data=loader)
        result.front[0].plan.save("plan.json")
        lobo_fx.compile(other_checkpoint, [FitGoal(plan="plan.json")], calibration_data=loader)
        ```
    """

    pruning: PruningPlan
    integers: tuple[str, ...] | None
    runtime: str
    expected: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def apply(self, program: Program, context: Context, quantizer: QuantizeStatic | None = None) -> Program:
        """Prunes, refits to calibration data, and quantizes.

        Raises:
            InvalidInput: the program is not the plan's; the first difference is named.
        """
        quantizer = quantizer or QuantizeStatic()
        program = folded(program, context)
        propagate(program.module)
        if self.pruning.cuts:
            program = PruneChannels(plan=self.pruning).run(program, context)
            propagate(program.module)
        if self.integers is None:
            return fused_where_faster(program, open_table(quantizer.costs), context)
        program, choices = quantizer.simplify(program, context)
        placement = choices.exactly(self.integers)
        if missing := set(self.integers) - placement.integer.keys():
            raise InvalidInput(
                f"the plan does not fit this model: it has no operator '{min(missing)}' to run as integers"
            )
        placement.note(program.graph, context)
        factors = quantizer.rounded(program, placement, context)
        return quantizer.quantize(program, placement, context, factors)

    def check(self, inference: Inference) -> None:
        """Refuses a program that is not the plan's.

        Raises:
            InvalidInput: names the first difference.
        """
        self.pruning.removal(inference)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, beside its place first.

        Raises:
            InvalidInput: the path can't be written to.
        """
        path = Path(path)
        content = {"format": _FORMAT, "runtime": self.runtime, "expected": dict(self.expected)}
        content |= {"integers": None if self.integers is None else list(self.integers)}
        content |= {"cuts": [dataclasses.asdict(cut) for cut in self.pruning.cuts]}
        with written_beside(path) as folder:
            (folder / path.name).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GoalPlan:
        """Reads a plan.

        Raises:
            InvalidInput: no such file, or no plan.
        """
        content: Mapping[str, Any] = read_json(Path(path))
        if content.get("format") != _FORMAT or "integers" not in content:
            raise InvalidInput(f"{path} is no plan of a goal of format {_FORMAT}; GoalPlan.save writes one")
        try:
            pruning = PruningPlan.of_json(content["cuts"])
            integers = None if content["integers"] is None else tuple(map(str, content["integers"]))
            expected = {str(name): float(value) for name, value in content["expected"].items()}
            return cls(pruning, integers, str(content["runtime"]), expected)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{path} is no plan of a goal ({type(error).__name__}: {error})") from None

    def __repr__(self) -> str:
        integers = "float" if self.integers is None else f"{len(self.integers)} operators as integers"
        return f"GoalPlan({len(self.pruning.cuts)} axes cut, {integers})"

    def __str__(self) -> str:
        table = new_table("plan of a goal", ["what", "value"])
        for name, value in self.expected.items():
            table.add_row(name, f"{value:.3g}")
        table.add_row("operators as integers", "none" if self.integers is None else str(len(self.integers)))
        return render(table) + str(self.pruning)
