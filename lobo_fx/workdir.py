"""Keeps programs between passes in a folder, so that an interrupted compilation goes on after the last finished pass.

Measurements of passes are kept beside them, for runs with other settings.

The name of a state is a checksum of all that it depends on: the program that passes began with, the passes so far with
all their settings and their code, the seed, the data, loss and score, the machine. So nothing has to be compared when a
state is looked up, and passes may be changed from any point on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lobo_fx import saving
from lobo_fx.checksums import checksum_of_code, checksum_of_program
from lobo_fx.content import checksum_of, checksum_of_data, holds_rows
from lobo_fx.contracts.candidates import Candidate, Plans
from lobo_fx.contracts.measurements import Measurements
from lobo_fx.contracts.passbase import Pass
from lobo_fx.contracts.pipeline import Pipeline
from lobo_fx.errors import InvalidInput
from lobo_fx.files import make_folder
from lobo_fx.graph.notes import Note
from lobo_fx.graph.program import Program
from lobo_fx.measures.machine import machine
from lobo_fx.report.records import Row

__all__ = ["Workdir"]

_DIGITS, _PLAN = 24, ".plan.json"
_UNKNOWN = "data, a function or a setting holds what can't be told apart by its content"


class Workdir:
    """States of one compilation.

    Args:
        folder: created if missing.
        pipeline: the pipeline before any pass has run.

    Raises:
        InvalidInput: the folder can't be created or written to.
    """

    def __init__(self, folder: Path, pipeline: Pipeline) -> None:
        make_folder(folder)
        self.folder, self.pipeline = folder, pipeline
        context = pipeline.context
        data = {name: getattr(context, name) for name in ("calibration_data", "train_data")}
        told = {name: checksum_of_data(value) for name, value in data.items()}
        loss, score = checksum_of(context.loss_fn), checksum_of(context.evaluate)
        fixed = [
            *(torch.__version__, machine(), checksum_of_program(pipeline.program), pipeline.source_checksum),
            *(checksum_of_code(context.loss_fn, context.evaluate), context.seed, context.higher_is_better),
            [row.name for row in pipeline.rows],  # of a result that is compiled further
        ]
        rows = [told[name] if holds_rows(value) else type(value).__name__ for name, value in data.items()]
        given = [*rows, loss, score, checksum_of(pipeline.program.example_inputs.leaves)]
        self.start = json.dumps([*fixed, *given]) if all(given) else ""
        depends = {"calibration_data": told["calibration_data"], "train_data": loss and told["train_data"]}
        depends = {name: known and json.dumps([*fixed, known, loss]) for name, known in depends.items()}
        pipeline.context = dataclasses.replace(context, measurements=Measurements(folder / "measured", depends))

    def run(self, passes: Sequence[Pass]) -> None:
        """Runs passes, except those whose states are kept, and keeps the state after each."""
        found = self.pipeline.context.candidates
        # All places are computed before any pass runs, as a pass may record in its class what it did.
        places = self._places(passes)
        for count in range(self._take_up(passes, places) + 1, len(passes) + 1):
            place, before = places[count], len(found)
            self.pipeline.run(passes[count - 1])
            if interrupted := self.pipeline.context.interrupted:
                note = Note(
                    f"{interrupted[0]} was interrupted, so that from there on no state is kept in {self.folder}"
                )
                self.pipeline.context.notes.extend([note] * (note not in self.pipeline.context.notes))
                continue
            if place is None:
                note = Note(f"{_UNKNOWN}, so that no state is kept in {self.folder}")
                self.pipeline.context.notes.extend([note] * (note not in self.pipeline.context.notes))
                continue
            plan = next((candidate.pass_.plan for candidate in found[before:] if candidate.chosen), None)
            try:
                if plan is not None:
                    plan.save(place.with_name(place.name + _PLAN))
                saving.write(saving.Saved(self.pipeline.program, self.pipeline.report("", []), []), place)
            except InvalidInput as error:  # a full disk, say: what was computed is worth more than its copy
                self.pipeline.context.notes.append(Note(f"a state could not be kept: {error}"))

    def _take_up(self, passes: Sequence[Pass], places: Sequence[Path | None]) -> int:
        """Loads the state after as many passes as possible; returns how many."""
        context, damaged, done = self.pipeline.context, list[Note](), 0
        start, earlier = self.pipeline.program, len(self.pipeline.rows)
        for count in range(len(passes), 0, -1):
            place = places[count]
            if place is None or not (place / saving.MANIFEST_FILE).is_file():
                continue
            try:
                saved = saving.read(place)
            except InvalidInput as error:
                damaged.append(Note(f"a state in {self.folder} is of no use: {error}"))
                continue
            context.notes[:], context.sheets[:] = saved.report.notes, saved.report.sheets
            self.pipeline.go_on_from(saved.program, saved.report.rows)
            after, done = passes[count - 1].name, count
            context.notes.append(Note(f"went on after {after}, which an earlier run left in {self.folder}"))
            self._take_up_plan(passes[:count], places, start, self.pipeline.rows[earlier:])
            break
        context.notes.extend(damaged)
        return done

    def _take_up_plan(
        self, passes: Sequence[Pass], places: Sequence[Path | None], start: Program, rows: Sequence[Row]
    ) -> None:
        """Restores the candidate that the last search chose; its other candidates are lost.

        Args:
            passes: the passes that are not run again.
            places: where the states are kept, the one before all passes first.
            start: the program before all passes.
            rows: a row for each pass.
        """
        for count in range(len(passes), 0, -1):
            pass_, place = passes[count - 1], places[count]
            file = place.with_name(place.name + _PLAN) if place else None
            if isinstance(pass_, Plans) and file and file.is_file():
                before, row, context = places[count - 1], rows[count - 1], self.pipeline.context
                try:
                    start, planned = saving.read(before).program if before else start, pass_.planned(file)
                except InvalidInput as error:
                    context.notes.append(Note(f"what {pass_.name} chose can't be compiled again: {error}"))
                    return
                expected = planned.plan.expected
                latency = next((value for name, value in expected.items() if name.startswith("latency")), 1.0)
                context.candidates.append(
                    Candidate("kept", planned, pass_.name, start, latency, None, row.bytes, row.snr, row.score, True)
                )
                return

    def _places(self, passes: Sequence[Pass]) -> list[Path | None]:
        """Where the state before and after each pass is kept; None where its dependencies are not known."""
        settings = [checksum_of(type(pass_), pass_.all_settings) for pass_ in passes]
        places: list[Path | None] = [None]
        for count, pass_ in enumerate(passes, 1):
            described = f"{self.start}{settings[:count]}{checksum_of_code(*map(type, passes[:count]))}"
            name = f"{pass_.name}-{hashlib.sha256(described.encode()).hexdigest()[:_DIGITS]}"
            places.append(self.folder / name if self.start and all(settings[:count]) else None)
        return places
