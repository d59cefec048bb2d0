"""Runs passes on a program one at a time: run, verify, measure. Needs no model and no file, unlike `compile`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from lobo_fx.axes.kept import kept_indices
from lobo_fx.checksums import checksum_of_program
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass
from lobo_fx.contracts.verification import Snapshot, snapshot, verify
from lobo_fx.errors import ContractError, LoboError
from lobo_fx.graph.node_facts import facts_of, mark
from lobo_fx.graph.program import Program
from lobo_fx.graph.randomness import random_state_kept
from lobo_fx.graph.weight_names import mark_weights
from lobo_fx.measures.counts import measure
from lobo_fx.measures.judge import Judge, Verdict
from lobo_fx.measures.modules import measure_modules
from lobo_fx.report.records import SENSITIVITY, AxisRow, CandidateRow, ModuleRow, Row
from lobo_fx.report.report import Report
from lobo_fx.terminal.progress import spinner

__all__ = ["Pipeline"]


@dataclasses.dataclass
class Pipeline:
    """A program under compilation, with the original that it is compared with and all measurements so far.

    Attributes:
        original: the program that everything is compared with.
        context: what passes may use; collects their notes and sheets.
        program: the program as the last pass left it.
        rows: a row of the report for the original, then one for every pass.
        judge: measures decibels on held-out rows of the calibration data, or on the example inputs if there are none.
        first: the snapshot of the original: its outputs on the example inputs.
        last: the snapshot of `program`.
        source_checksum: checksum of the original's weights and code before any pass; the user may train them later.

    Example:
        ```python
        pipeline = Pipeline.start(program, Context(program.signature, original=program))
        pipeline.run(PruneChannels(0.3))
        pipeline.rows[-1].snr
        ```
    """

    original: Program
    context: Context
    program: Program
    rows: list[Row]
    judge: Judge
    first: Snapshot
    last: Snapshot
    source_checksum: str

    @classmethod
    @random_state_kept
    def start(cls, original: Program, context: Context) -> Pipeline:
        """Measures the original, and copies it: passes never change what was given.

        Raises:
            InvalidInput: `evaluate` returns no number.
        """
        mark_weights(original.module)
        for node in original.graph.nodes:
            if facts_of(node).made_by is None:
                mark(node, made_by="")
        context = dataclasses.replace(context, original=original)
        first = snapshot(original)
        batches = context.held_out_batches() if context.calibration_data is not None else []
        same, score = Verdict(math.inf, math.inf), context.score(original)
        row = Row.of("original", measure(original, first.macs), same, score, 0.0)
        judge = Judge(original, batches or [original.example_inputs])
        return cls(original, context, original.clone(), [row], judge, first, first, checksum_of_program(original))

    @random_state_kept
    def go_on_from(self, program: Program, rows: Sequence[Row]) -> None:
        """Continues from a program that earlier passes made of the original, and the rows they added."""
        self.program, self.last, self.rows = program.clone(), snapshot(program), list(rows)

    def fork(self) -> Pipeline:
        """A copy on which passes can be tried: it has its own program, rows, notes, sheets and candidates."""
        own = self.context
        context = dataclasses.replace(
            own,
            notes=list(own.notes),
            sheets=list(own.sheets),
            candidates=list(own.candidates),
            interrupted=list(own.interrupted),
        )
        return dataclasses.replace(self, context=context, program=self.program.clone(), rows=list(self.rows))

    @random_state_kept
    def run(self, pass_: Pass) -> Program:
        """Runs a pass on the program as it is now, verifies what it returns, and adds a row.

        Raises:
            InvalidInput: the pass lacks something that it needs.
            ContractError: the pass broke its promise, or failed. It may have changed `program` by then: `fork` first to
                keep it.
        """
        start = time.perf_counter()
        context = dataclasses.replace(self.context, made_by=pass_.name, expected=[])
        with spinner(str(pass_), context.show_progress and not pass_.needs):
            program = _rewritten(pass_, self.program, context)
            after = verify(pass_, self.last, program, context)
        mark_weights(program.module)
        verdict = self.judge(program)
        score, seconds = context.score(program), time.perf_counter() - start
        self.rows.append(Row.of(str(pass_), measure(program, after.macs), verdict, score, seconds))
        self.program, self.last = program, after
        return program

    def report(self, model: str, settings: list[tuple[str, dict[str, Any]]]) -> Report:
        """The report, for a model of that name and passes with these settings."""
        candidates = [
            CandidateRow(c.name, c.latency, c.measured is not None, c.bytes, c.decibels, c.score, c.chosen)
            for c in self.context.candidates
        ]
        notes, sheets, seed = self.context.notes, self.context.sheets, self.context.seed
        return Report(
            model,
            self.rows,
            notes,
            sheets=sheets,
            candidates=candidates,
            axes=_axes(self.original, self.program),
            settings=settings,
            seed=seed,
            modules=self.modules(),
        )

    def modules(self) -> list[ModuleRow]:
        """Figures of each module before and after; and its sensitivity, where a pass measured it."""
        before = measure_modules(self.original)
        after = measure_modules(self.program, self.original)
        alone = [sheet for sheet in self.context.sheets if sheet.title == SENSITIVITY]
        layers = {name for modules in (before, after) for name, module in modules.items() if module.kind}
        decibels = {row[0]: row[1] for row in alone[-1].rows if row[0] in layers} if alone else {}
        return [ModuleRow(name, before.get(name), after.get(name), decibels.get(name)) for name in {**before, **after}]


def _axes(original: Program, program: Program) -> list[AxisRow]:
    """The cut axes; dimensions of the same size that kept the same positions are listed as one axis."""
    tensors = {**dict(original.module.named_parameters()), **dict(original.module.named_buffers())}
    members: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = {}
    for name, dims in kept_indices(program.module).items():
        for dim, kept in dims.items():
            if name in tensors and dim < tensors[name].dim() and len(kept) < tensors[name].shape[dim]:
                members.setdefault((tensors[name].shape[dim], tuple(kept)), []).append((name, dim))
    rows = []
    for (before, stays), found in members.items():
        along = sum(tensors[name].numel() for name in {name for name, _ in found})
        rows.append(AxisRow(f"{found[0][0]}[{found[0][1]}]", len(found), before, len(stays), along))
    return sorted(rows, key=lambda row: -row.parameters)


def _rewritten(pass_: Pass, program: Program, context: Context) -> Program:
    try:
        rewritten = pass_.run(program, context)
    except LoboError:
        raise
    except Exception as error:
        raise ContractError(f"{pass_} failed: {type(error).__name__}: {error}") from error
    if not isinstance(rewritten, Program):
        raise ContractError(f"{pass_} returned a {type(rewritten).__name__}; run must return the program")
    return rewritten
