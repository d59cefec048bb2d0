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
"""Format of a table; those of format 1 were measured with data that was in no cache."""
_PLAIN_CONVOLUTION = (("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (1, 1)), ("groups", 1))
_PACE = (
    Kernel("conv", ((1, 64, 28, 28), (64, 64, 3, 3)), _PLAIN_CONVOLUTION),
    Kernel("linear", ((1, 64, 256), (256, 256))),
    Kernel("add", ((1, 64, 56, 56), (1, 64, 56, 56))),
    Kernel("convert", ((1, 64, 56, 56),)),
)
"""Kernels that are measured every time; their times show how fast the machine is at the moment."""


@dataclasses.dataclass
class CostTable:
    """Costs of kernels on one machine and runtime.

    Attributes:
        machine: CPU and runtime that the costs were measured on.
        costs: by `Kernel.key`.
        path: the file that keeps the table; None for tables in memory only, such as shipped ones.
        shipped: whether it was read from a file that the user gave.
        unreadable: whether the file at `path` holds no table, or one of another format; it is then measured again and
            replaced.
        failures: why kernels could not be measured, by `Kernel.key`; not kept, as another version may measure them.
    """

    machine: str
    costs: dict[str, Cost]
    path: Path | None = None
    shipped: bool = False
    unreadable: bool = False
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_this_machine(cls, runtime: str) -> CostTable:
        """The table kept for this CPU and runtime; empty at first."""
        machine = f"{cpu_name()}, {runtime}"
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lobo-fx" / "costs"
        path = folder / ("".join(c if c.isalnum() else "-" for c in machine) + ".json")
        try:
            return cls(machine, cls.load(path).costs if path.is_file() else {}, path)
        except InvalidInput:
            return cls(machine, {}, path, unreadable=True)

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Reads a shipped table; costs that are measured later are not written to its file.

        Raises:
            InvalidInput: no such file, no table, or one of another format.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise InvalidInput(
                    f"the cost table {path} is of format {content['format']}; this version reads format {_FORMAT}. "
                    "Measure it again on the machine that it is of (lobo-fx costs MODEL -o FILE), with this version"
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
        """Writes the table as JSON, to a temporary file first.

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
        """Kernels that were not measured yet, each once."""
        known = self.costs.keys() | self.failures.keys()
        return list({kernel.key: kernel for kernel in kernels if kernel.key not in known}.values())

    def add(self, measured: Mapping[Kernel, Cost | NoCost]) -> None:
        """Adds measured costs, and writes the table if it has a file."""
        for kernel, found in measured.items():
            if isinstance(found, Cost):
                # Rounded as in the file, so that this process and later ones decide alike.
                self.costs[kernel.key] = Cost(round(found.floating, 3), round(found.integer, 3))
            else:
                self.failures[kernel.key] = found.reason
        if measured and self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.is_file() and not self.unreadable:  # another process may have added costs meanwhile
                    self.costs = CostTable.load(self.path).costs | self.costs
                self.save(self.path)
            except (OSError, InvalidInput):
                self.path = None  # it can't be written, and is only used in this process

    def measure(
        self, kernels: Iterable[Kernel], with_runtime: Callable[[Sequence[Kernel]], Mapping[Kernel, Cost | NoCost]]
    ) -> None:
        """Measures the kernels that the table lacks, scaled to the speed at which the others were measured.

        Costs are compared with one another, but other work or a slow clock can halve the speed of a machine.

        Args:
            kernels: kernels whose costs will be needed.
            with_runtime: measures kernels on this machine.
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
    """Factor for new times: the median ratio of known kernels' earlier times to their times now."""
    return statistics.median([before / now for before, now in pairs if now > 0] or [1.0])
