"""Costs of the kernels that a network needs: from a cost table, or measured if the table lacks them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.plugins.kernels import Kernel, MeasuresKernels
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.terminal.progress import spinner

__all__ = ["check_costs", "measure_missing", "open_table"]


def check_costs(path: object) -> None:
    """Refuses a setting that names no cost table.

    Raises:
        InvalidInput: it is no path, or no table can be read there.
    """
    if path is not None:
        if not isinstance(path, (str, Path)):
            raise InvalidInput(f"costs is {path!r}; it must be the path of a cost table")
        CostTable.load(path)


def open_table(path: str | None) -> CostTable:
    """A table that was shipped, or else the one of this machine and the runtime."""
    return (
        CostTable.of_this_machine(RUNTIMES.ours(RUNTIMES.default)().version) if path is None else CostTable.load(path)
    )


def measure_missing(table: CostTable, kernels: Iterable[Kernel], context: Context) -> None:
    """Measures the kernels that a table lacks, on this machine, and adds their costs.

    Args:
        table: the table to fill; a kernel that can't be measured is kept with the reason.
        kernels: kernels whose costs will be asked.
        context: takes a note if the table was shipped from elsewhere; says whether to show progress.

    Raises:
        InvalidInput: the runtime measures no kernels.
    """
    kernels = list(kernels)
    missing = table.missing(kernels)
    if not missing:
        return
    runtime = RUNTIMES.ours(RUNTIMES.default)()
    if not isinstance(runtime, MeasuresKernels):
        raise InvalidInput(f"{runtime.version} measures no kernels; give costs=, or kernels='all'")
    if table.unreadable:
        context.note(f"the cost table kept in {table.path} is damaged, or of another format: measured again")
    if table.shipped:
        context.note(f"the cost table lacks {len(missing)} kernels, measured on this machine instead")
    with spinner(f"measure {len(missing)} kernels", context.show_progress):
        table.measure(kernels, runtime.measure_kernels)
