"""What operators cost as float and as integer kernels on a CPU: a table measured once, kept, and shippable.

lobo-fx costs MODEL -o target.json      # on the machine that will run the model
QuantizeStatic(costs="target.json")     # on the machine that compiles it
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lobo_fx.errors import InvalidInput
from lobo_fx.measures.machine import cpu_name
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

__all__ = ["CostTable"]

_FORMAT = 2
"""Of a table; those of format 1 were measured with data that no cache held."""
_PLAIN_CONVOLUTION = (("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (1, 1)), ("groups", 1))
_PACE = (
    Kernel("conv", ((1, 64, 28, 28), (64, 64, 3, 3)), _PLAIN_CONVOLUTION),
    Kernel("linear", ((1, 64, 256), (256, 256))),
    Kernel("add", ((1, 64, 56, 56), (1, 64, 56, 56))),
    Kernel("convert", ((1, 64, 56, 56),)),
)
"""Kernels that are measured each time: what they take tells how fast the machine is just then."""


@dataclasses.dataclass
class CostTable:
    """Costs by kernel, of one machine and runtime.

    Attributes:
        machine: CPU and runtime that the costs were measured on.
        costs: by `Kernel.key`.
        path: where it is kept; None keeps it in memory only, as what was shipped from another machine is.
        shipped: whether it was read from a file of the user's.
        unreadable: whether what was kept at `path` is no table, or one of another format; it is measured again, and
            replaced.
        failures: why kernels could not be measured, by `Kernel.key`; not kept, since another version may measure them.
    """

    machine: str
    costs: dict[str, Cost]
    path: Path | None = None
    shipped: bool = False
    unreadable: bool = False
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_this_machine(cls, runtime: str) -> CostTable:
        """The table kept for this CPU and runtime, empty at first."""
        machine = f"{cpu_name()}, {runtime}"
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lobo-fx" / "costs"
        path = folder / ("".join(c if c.isalnum() else "-" for c in machine) + ".json")
        try:
            return cls(machine, cls.load(path).costs if path.is_file() else {}, path)
        except InvalidInput:
            return cls(machine, {}, path, unreadable=True)

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Reads a table; what is measured beside it later is not written to it.

        Raises:
            InvalidInput: no such file, no table, or one of another format.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise InvalidInput(
                    f"the cost table {path} is of format {content['format']}; this version reads format {_FORMAT}. "
                    "Measure it again on the machine that it is of: lobo-fx costs MODEL -o FILE"
                )
            costs = {key: Cost(float(pair[0]), float(pair[1])) for key, pair in content["costs"].items()}
            for key, cost in costs.items():
                if not all(0 <= time < math.inf for time in (cost.floating, cost.integer)):
                    raise ValueError(f"'{key}' costs {cost.floating} and {cost.integer} microseconds")
            return cls(str(content["machine"]), costs, shipped=True)
        except InvalidInput:
            raise
        except OSError as error:
            raise InvalidInput(f"can't read the cost table {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise InvalidInput(f"{path} is no cost table ({error}); measure one with CostTable.save") from None

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON, beside its place first.

        Raises:
            InvalidInput: the path can't be written to.
        """
        from lobo_fx.files import written_beside

        path = Path(path)
        rows = {key: [cost.floating, cost.integer] for key, cost in sorted(self.costs.items())}
        content = {"format": _FORMAT, "machine": self.machine, "costs": rows}
        with written_beside(path) as folder:
            (folder / path.name).write_text(json.dumps(content, indent=1), encoding="utf-8")

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """Those that were not measured yet, each once."""
        known = self.costs.keys() | self.failures.keys()
        return list({kernel.key: kernel for kernel in kernels if kernel.key not in known}.values())

    def add(self, measured: Mapping[Kernel, Cost | NoCost]) -> None:
        """Takes in what was measured, and keeps it where the table has a place."""
        for kernel, found in measured.items():
            if isinstance(found, Cost):
                # As the file has it: choices and reports of the process that measured are those of later ones.
                self.costs[kernel.key] = Cost(round(found.floating, 3), round(found.integer, 3))
            else:
                self.failures[kernel.key] = found.reason
        if measured and self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.save(self.path)
            except (OSError, InvalidInput):
                self.path = None  # it can't be kept here, and serves this once

    def measure(
        self, kernels: Iterable[Kernel], with_runtime: Callable[[Sequence[Kernel]], Mapping[Kernel, Cost | NoCost]]
    ) -> None:
        """Measures what the table lacks, and adds it at the pace of what it has.

        Costs are compared with one another, and other work or a slow clock make a machine half as fast as it was.

        Args:
            kernels: whose costs will be asked.
            with_runtime: measures on this machine.
        """
        kernels = list(kernels)
        missing = self.missing(kernels)
        if not missing:
            return
        known = [kernel for kernel in (*_PACE, *kernels) if kernel.key in self.costs][: len(_PACE)]
        found = with_runtime(list(dict.fromkeys([*missing, *_PACE, *known])))
        pairs = [(self[kernel], again) for kernel in known if isinstance(again := found.get(kernel), Cost)]
        floating = _pace((before.floating, now.floating) for before, now in pairs)
        integer = _pace((before.integer, now.integer) for before, now in pairs)
        self.add(
            {
                kernel: Cost(floating * cost.floating, integer * cost.integer) if isinstance(cost, Cost) else cost
                for kernel, cost in found.items()
                if kernel.key not in self.costs
            }
        )

    def find(self, kernel: Kernel) -> Cost | NoCost:
        """The cost of a kernel, or why there is none."""
        found = self.costs.get(kernel.key)
        return NoCost(self.failures.get(kernel.key, "it was not measured")) if found is None else found

    def __getitem__(self, kernel: Kernel) -> Cost:
        return self.costs[kernel.key]

    def __str__(self) -> str:
        from lobo_fx.terminal.tables import new_table, render

        table = new_table(f"Microseconds on {self.machine}", ["kernel", "float", "integer", "ratio"])
        for key, cost in sorted(self.costs.items()):
            ratio = f"{cost.integer / cost.floating:.2f}" if cost.floating else ""
            table.add_row(key, f"{cost.floating:.1f}", f"{cost.integer:.1f}", ratio)
        return render(table)


def _pace(pairs: Iterable[tuple[float, float]]) -> float:
    """By what new times are multiplied, from known kernels' times before and now."""
    return statistics.median([before / now for before, now in pairs if now > 0] or [1.0])
