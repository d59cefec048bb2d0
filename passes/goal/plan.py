"""The plan of a goal: widths, ranks and precisions that a search found, for any checkpoint of the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lobo_fx.axes import Inference
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.files import read_json, written_beside
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate
from lobo_fx.passes.low_rank.candidates import Candidate, find_candidates
from lobo_fx.passes.low_rank.factorize import factorize
from lobo_fx.passes.low_rank.lowering import name_of_first
from lobo_fx.passes.pruning.plan import PruningPlan
from lobo_fx.passes.pruning.prune_channels import PruneChannels
from lobo_fx.passes.quantization.integers.prices import open_table
from lobo_fx.passes.quantization.quantize_static import QuantizeStatic, folded, fused_where_faster
from lobo_fx.passes.quantization.quantize_weights import QuantizeWeights
from lobo_fx.terminal.tables import new_table, render

__all__ = ["GoalPlan", "shapes_of", "with_firsts"]

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class GoalPlan:
    """What a search decided to do to a program. Compare plans with `==`, print them, keep them in a file.

    Attributes:
        pruning: the positions that stay.
        integers: names of the operators that run as integers; weights of the others are stored as int8. None if the
            program stays float.
        runtime: the runtime whose kernels were measured.
        expected: what the search expected or measured, by name: shares of the original's latency and size, decibels.
        ranks: by name of a weight, the rank of the two layers that replace its layer after pruning.
        weights: the format of `QuantizeWeights` that weights are stored in; None where there is none.
        shapes: shapes of the model's parameters, by name; a model of other shapes is refused.
        quantizer: how ranges are observed and weights rounded; its costs belong to the machine, not to the plan.

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
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    weights: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    quantizer: QuantizeStatic = dataclasses.field(default_factory=QuantizeStatic)

    def apply(self, program: Program, context: Context, quantizer: QuantizeStatic | None = None) -> Program:
        """Prunes, lowers ranks, refits to calibration data, and quantizes.

        Args:
            program: changed.
            context: gives calibration data.
            quantizer: instead of the plan's own.

        Raises:
            InvalidInput: the program is not the plan's; the first difference is named.
        """
        program = folded(program, context)
        propagate(program.module)
        if self.pruning.cuts:
            program = PruneChannels(plan=self.pruning).run(program, context)
            propagate(program.module)
        if self.ranks:
            program = factorize(program, _candidates(program, self.ranks, context), self.ranks, context)
            propagate(program.module)
        return self.quantize(program, context, quantizer or self.quantizer)

    def quantize(self, program: Program, context: Context, quantizer: QuantizeStatic) -> Program:
        """Quantizes a program that is pruned, lowered and refitted already, as the plan says.

        Raises:
            InvalidInput: the program lacks an operator that is to run as integers.
        """
        if self.integers is None:
            program = fused_where_faster(program, open_table(quantizer.costs), context)
            if self.weights is not None:
                program = QuantizeWeights(self.weights, costs=quantizer.costs).run(program, context)
            return program
        program, choices = quantizer.simplify(program, context)
        placement = choices.exactly(with_firsts(self.integers))
        if missing := set(self.integers) - placement.integer.keys():
            raise InvalidInput(
                f"the plan does not fit this model: it has no operator '{min(missing)}' to run as integers"
            )
        placement.note(program.graph, context)
        factors = quantizer.rounded(program, placement, context)
        return quantizer.quantize(program, placement, context, factors)

    def check(self, inference: Inference) -> None:
        """Refuses a program that the plan was not made for.

        Raises:
            InvalidInput: names the first difference.
        """
        found = shapes_of(inference.program)
        for name in sorted(self.shapes.keys() | found.keys()) if self.shapes else ():
            if self.shapes.get(name) != found.get(name):
                there, here = (str(list(of[name])) if name in of else "nothing" for of in (self.shapes, found))
                raise InvalidInput(f"the plan is of another model: '{name}' is {there} there, {here} here")
        self.pruning.removal(inference)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, beside its place first.

        Raises:
            InvalidInput: the path can't be written to.
        """
        path = Path(path)
        content = {"format": _FORMAT, "runtime": self.runtime, "expected": dict(self.expected)}
        content |= {"integers": None if self.integers is None else list(self.integers)}
        content |= {"ranks": dict(self.ranks), "weights": self.weights, "quantizer": self.quantizer.settings}
        content |= {"shapes": {name: list(shape) for name, shape in self.shapes.items()}}
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
            ranks = {str(name): int(rank) for name, rank in content.get("ranks", {}).items()}
            weights = content.get("weights")
            if weights is not None:
                QuantizeWeights(weights)  # refused here
            quantizer = QuantizeStatic(**content.get("quantizer", {}))
            shapes = {str(name): tuple(map(int, shape)) for name, shape in content.get("shapes", {}).items()}
            return cls(pruning, integers, str(content["runtime"]), expected, ranks, weights, shapes, quantizer)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InvalidInput(f"{path} is no plan of a goal ({type(error).__name__}: {error})") from None

    def __repr__(self) -> str:
        integers = "float" if self.integers is None else f"{len(self.integers)} operators as integers"
        lowered = f", {len(self.ranks)} of a lower rank" if self.ranks else ""
        stored = f", weights in {self.weights}" if self.weights else ""
        return f"GoalPlan({len(self.pruning.cuts)} axes cut{lowered}, {integers}{stored})"

    def __str__(self) -> str:
        table = new_table("plan of a goal", ["what", "value"])
        for name, value in self.expected.items():
            table.add_row(name, f"{value:.3g}")
        table.add_row("operators as integers", "none" if self.integers is None else str(len(self.integers)))
        for name, rank in self.ranks.items():
            table.add_row(f"rank of {name}", str(rank))
        table.add_row("weights", self.weights or ("float" if self.integers is None else "int8"))
        return render(table) + str(self.pruning)


def shapes_of(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a graph reads, by name."""
    reads = {str(node.target): program.parameter(node) for node in program.graph.find_nodes(op="get_attr")}
    return {name: tuple(tensor.shape) for name, tensor in reads.items() if isinstance(tensor, nn.Parameter)}


def with_firsts(integers: Collection[str]) -> set[str]:
    """Names of operators, and of the first of two layers wherever one of them may have become two."""
    return {*integers, *map(name_of_first, integers)}


def _candidates(program: Program, ranks: Mapping[str, int], context: Context) -> list[Candidate]:
    """The weights that ranks name.

    Raises:
        InvalidInput: there is no such weight, or it can't have that rank.
    """
    found = {one.name: one for one in find_candidates(program, dataclasses.replace(context, notes=[]))}
    for name, rank in ranks.items():
        if name not in found:
            raise InvalidInput(f"the plan does not fit this model: no weight '{name}' that two layers could stand for")
        if not 1 <= rank <= found[name].shape.highest:
            raise InvalidInput(
                f"the plan does not fit this model: two layers of rank {rank} are no smaller than '{name}', of "
                f"{found[name].shape.outputs} by {found[name].shape.inputs}"
            )
    return [found[name] for name in ranks]
