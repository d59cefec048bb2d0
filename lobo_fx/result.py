"""`Result`, which `compile` returns: holds the module and the report; exports, benchmarks and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lobo_fx import saving
from lobo_fx.axes.kept import kept_indices
from lobo_fx.contracts.candidates import CANDIDATES, Candidate, pareto
from lobo_fx.contracts.confirmation import confirm as confirm_file
from lobo_fx.contracts.pipeline import Pipeline
from lobo_fx.contracts.tuning import read_tuning, runtime_of
from lobo_fx.contracts.tuning import tune as tune_file
from lobo_fx.errors import InvalidInput
from lobo_fx.file_facts import file_facts
from lobo_fx.file_module import FileModule
from lobo_fx.files import check_folder, check_writable, temporary_folder, write_files, written_beside
from lobo_fx.graph.facts import KeptIndices
from lobo_fx.graph.notes import Note, note_of
from lobo_fx.graph.program import Program, ProgramModule
from lobo_fx.graph.randomness import drawing, random_state_kept
from lobo_fx.graph.sized_inputs import named_arrays, with_rows
from lobo_fx.measures.latency import MEGABYTE, Benchmark, benchmark, check_counts
from lobo_fx.measures.machine import machine, versions
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.plugins.exporters import exporter_of
from lobo_fx.plugins.file_nodes import ListsNodes
from lobo_fx.plugins.kernels import ProfilesNodes
from lobo_fx.plugins.protocols import Exporter, LoadsExactly, Session
from lobo_fx.plugins.registry import EXPORTERS, PASSES, RUNTIMES
from lobo_fx.plugins.tuning import ChecksFiles, Tuning
from lobo_fx.report.card import model_card
from lobo_fx.report.node_data import node_data, with_times
from lobo_fx.report.report import Report
from lobo_fx.terminal.progress import spinner
from lobo_fx.terminal.tables import decimals

__all__ = ["CARD", "SAMPLE", "Alternative", "Result", "load"]

CARD, SAMPLE = "model_card.md", "sample.npz"


_DRAWS = "draws random numbers, other ones in a file than in PyTorch: outputs made of them were not compared"

_LOUD = 20.0
"""A file below this signal-to-noise ratio raises a warning: its error is then a tenth of its outputs or more."""


@dataclasses.dataclass
class Result:
    """A compiled model.

    Attributes:
        program: the compiled program.
        pipeline: the pipeline that ran the passes; also holds the original. None after `lobo_fx.load`.
        report: what was done and what it changed; `print(result)` shows it.
        passes: name and settings of every pass, in order; the same list object as the report's `settings`.
        progress: whether to draw progress on the terminal.
    """

    program: Program
    pipeline: Pipeline | None
    report: Report
    passes: list[tuple[str, dict[str, Any]]]
    progress: bool = True

    @property
    def original(self) -> Program | None:
        """The program as traced; it shares the user's weights. None after `lobo_fx.load`."""
        return None if self.pipeline is None else self.pipeline.original

    @property
    def interrupted(self) -> tuple[str, ...]:
        """Names of the passes whose training Ctrl-C ended before its time."""
        return () if self.pipeline is None else tuple(self.pipeline.context.interrupted)

    @property
    def front(self) -> list[Alternative]:
        """Candidates of the last search that no other beats in latency, size and loss, fastest first; see `FitGoal`."""
        return [Alternative(candidate, self) for candidate in pareto(self._candidates)]

    @property
    def plan(self) -> Any:
        """The plan that the last search chose, which `save` can write to a file; None without a search."""
        return next((getattr(c.pass_, "plan", None) for c in self._candidates if c.chosen), None)

    @property
    def _candidates(self) -> list[Candidate]:
        """The candidates of the last search."""
        found = [] if self.pipeline is None else self.pipeline.context.candidates
        return [candidate for candidate in found if candidate.start is found[-1].start]

    @property
    def module(self) -> ProgramModule:
        """The compiled model as an `nn.Module`: call it, train it, deep-copy it; parameters keep their names.

        Quantized weights are buffers of integers under the same names; train before quantizing.
        """
        return self.program.module

    @property
    def kept_indices(self) -> KeptIndices:
        """By parameter and dimension, the original indices that structured pruning kept; uncut ones are left out."""
        return kept_indices(self.module)

    def __str__(self) -> str:
        return str(self.report)

    @random_state_kept
    def export(
        self,
        path: str | Path,
        exporter: str | Exporter = EXPORTERS.default,
        *,
        confirm: bool = True,
        storage: str | None = None,
        values: str | None = None,
        tune: bool | Tuning = False,
    ) -> Artifact:
        """Writes the compiled model; the file is compared with PyTorch in the runtime before the call returns.

        Args:
            path: the file to write; nothing is left there when anything goes wrong.
            exporter: name of the format, or an exporter with settings of its own.
            confirm: where integer kernels were chosen by estimated costs, measure the file in turn with the original's,
                and with a float version of itself if the network was pruned or the file is slower than the original's.
                If the float version is faster, it is written instead, with weights still int8, and the report says so.
            storage: `packed` stores a pruned weight as a bit mask and its nonzero values, where that is smaller; the
                file runs as fast, and loads a little later. None is the exporter's default: `dense`.
            values: `float16` or `bfloat16`: packed weights are rounded to this type, and widened on loading.
            tune: try the choices of the runtime one after the other, and keep those that are measured faster and still
                agree with PyTorch. `Tuning` sets the counts of threads and rows. The report names every trial. Options
                of the runtime are written beside the model (`lobo_fx.exporters.onnxruntime.session_options` shows how
                to load both). Takes a minute or more, and the file may run in that runtime only.

        Raises:
            InvalidInput: the path is not writable, the exporter has no such storage, or the runtime can't tune.
            ExportError: the program can't be written, or the file disagrees with PyTorch.
        """
        exporter = exporter_of(exporter, storage=storage, values=values)
        tuning = read_tuning(tune, exporter)
        artifact = self._write(self.program, Path(path), exporter)
        estimated = self.program.module.program_facts.estimated and self.pipeline is not None
        if confirm and estimated and isinstance(exporter, EXPORTERS.ours(EXPORTERS.default)):
            artifact = self._confirmed(artifact, exporter)
        if tuning is not None:
            artifact = self._tuned(artifact, exporter, tuning)
        if (packed := artifact.details.get("packed")) is not None:
            self._note(_packed(artifact, **packed))
        artifact = self._scored(self.program, self._told(self.program, artifact), exporter)
        self.report.artifacts["compiled"] = artifact
        return artifact

    def _scored(self, program: Program, artifact: Artifact, exporter: str | Exporter) -> Artifact:
        """The artifact with the score that `evaluate` gives the file, where the default runtime can read it."""
        context = None if self.pipeline is None else self.pipeline.context
        writer = exporter_of(exporter)
        if context is None or context.evaluate is None or not isinstance(writer, EXPORTERS.ours(EXPORTERS.default)):
            return artifact
        session = _session(artifact, torch.get_num_threads())
        try:
            with spinner(f"evaluate {artifact.path.name}", self.progress):
                return dataclasses.replace(artifact, score=context.score_of(FileModule(session, program)))
        except InvalidInput as error:
            self._note(Note(f"{artifact.path.name} was not scored, which calls it as the module: {error}"))
            return artifact

    def _confirmed(self, artifact: Artifact, exporter: str | Exporter) -> Artifact:
        """Keeps the file, or writes a float version where that is faster; the result then has one more pass."""
        assert self.pipeline is not None
        trial = dataclasses.replace(self.pipeline, program=self.program).fork()
        pass_ = PASSES.ours("compute_in_float")()
        with temporary_folder() as folder:
            known = self.report.artifacts.get("original")
            if known is None or not known.path.is_file():
                known = self._write(trial.original, folder / "original.onnx", exporter)
            found = confirm_file(
                known.path,
                artifact.path,
                lambda: self._write(trial.run(pass_), folder / "floating.onnx", exporter).path,
                RUNTIMES.ours(RUNTIMES.default)(),
                named_arrays(self.program, with_rows(self.program, 1)),
                self.progress,
                same_macs=self.report.rows[-1].macs == self.report.rows[0].macs,
            )
        if found.takes_back:
            self.pipeline, self.program, self.report.rows = trial, trial.program, trial.rows
            self.report.modules = trial.modules()
            self.passes.append((pass_.name, pass_.settings))
            self._note(
                Note(
                    f"integer kernels taken back: the file took {found.compiled:.2f} times the original's latency, "
                    f"in float it takes {found.floating:.2f} times; weights stay int8"
                )
            )
            return self._write(self.program, artifact.path, exporter)
        if round(found.compiled, 2) > 1:
            self._note(_slower(found.compiled))
        return artifact

    def _tuned(self, artifact: Artifact, exporter: Exporter, tuning: Tuning) -> Artifact:
        """The artifact of the tuned file, or the given one where no choice is faster."""
        assert isinstance(exporter, ChecksFiles)
        arrays = named_arrays(self.program, with_rows(self.program, tuning.batch))
        with temporary_folder() as folder:
            found = tune_file(
                artifact.path,
                tuning,
                runtime_of(tuning),
                arrays,
                lambda path, session: exporter.check(self.program, path, session),
                folder,
                self.progress,
            )
            self._note(Note(f"{artifact.path.name} tuned: {found}"))
            if found.path is None:
                return dataclasses.replace(artifact, details={**artifact.details, "tuning": found.as_json()})
            with written_beside(artifact.path) as draft:
                for file in found.path.parent.iterdir():
                    shutil.move(file, draft)
                names = sorted(file.name for file in draft.iterdir())
                size = sum(file.stat().st_size for file in draft.iterdir())
        files = tuple(artifact.path.with_name(name) for name in names)
        details = {**artifact.details, **found.details, "tuning": found.as_json()}
        return Artifact(artifact.path, files, size, found.parity, details)

    def _note(self, note: Note) -> None:
        if note not in self.report.notes:
            self.report.notes.append(note)

    @random_state_kept
    def export_original(self, path: str | Path, exporter: str | Exporter = EXPORTERS.default) -> Artifact:
        """Writes the model as it was before compilation, for comparison.

        Raises:
            InvalidInput: the path is not writable, or the result was loaded and has no original.
            ExportError: the program can't be written, or the file disagrees with PyTorch.
        """
        if self.original is None:
            raise InvalidInput("this result was loaded from a folder, which does not hold the original model")
        artifact = self._told(self.original, self._write(self.original, Path(path), exporter))
        artifact = self._scored(self.original, artifact, exporter)
        self.report.artifacts = {"original": artifact} | self.report.artifacts
        return artifact

    def _write(self, program: Program, path: Path, exporter: str | Exporter) -> Artifact:
        writer = exporter_of(exporter)
        check_writable(path)
        with spinner(f"export {path.name}", self.progress):
            return writer.export(program, path, self.metadata(original=program is self.original))

    def _told(self, program: Program, artifact: Artifact) -> Artifact:
        """Notes what users of a file have to know; of a file that another one replaces, nothing is noted."""
        path = artifact.path
        for node in drawing(program.module):
            self._note(note_of(node, _DRAWS))
        if (decibels := artifact.details.get("decibels", math.inf)) < _LOUD:
            where = f", in {part}" if (part := artifact.details.get("worst_part")) else ""
            note = Note(
                f"WARNING: {path.name} agrees with PyTorch to {decibels:.1f} dB only{where}: rounding explains it, "
                "since the network amplifies what rounds the other way, but such outputs say little; quantize less of "
                "it, as MixedPrecision does within a budget"
            )
            self._note(note)
            warnings.warn(str(note), stacklevel=2)
        if (saturated := artifact.details.get("saturated")) is not None:
            self._note(
                Note(
                    f"{path.name} is for another CPU: this one has no VNNI, its sums of products of 8-bit integers "
                    f"saturate, and the file agrees with PyTorch to {saturated:.1f} dB here; it was checked with exact "
                    'sums. For this CPU, quantize with target="x86-avx2"'
                )
            )
        if (state := artifact.details.get("state")) is not None:
            self._note(_stateless(**state))
        return artifact

    def metadata(self, original: bool = False) -> dict[str, str]:
        """The metadata of the exported file: what was done to the model; nothing was to the original."""
        return file_facts(self.report, self.pipeline, self.passes, original)

    @random_state_kept
    def save_card(self, folder: str | Path) -> list[Path]:
        """Writes `model_card.md`, which says what the exported file is and how to run it, and `sample.npz`, one call.

        The sample holds one row of each example input under `input:NAME`, and the outputs of the file under
        `output:NAME`.

        Raises:
            InvalidInput: nothing was exported, its file is gone, or the folder can't be written to.
        """
        artifact = self.report.artifacts.get("compiled")
        if artifact is None or not artifact.path.is_file():
            raise InvalidInput("a card is of a file: export the result first")
        signature = self.program.signature
        arrays = named_arrays(self.program, with_rows(self.program, 1))
        outputs = _session(artifact, 1).run(arrays)
        names = [spec.name for spec in signature.outputs if spec]
        sample = {f"input:{name}": array for name, array in arrays.items()}
        sample |= {f"output:{name}": array for name, array in zip(names, outputs, strict=True)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **sample)
        card = model_card(self.report, self.metadata(), signature, str(artifact.details.get("needs", "")))
        return write_files(Path(folder), {SAMPLE: buffer.getvalue(), CARD: card})

    @random_state_kept
    def benchmark(
        self,
        *,
        threads: int = 1,
        batch: int = 1,
        rounds: int = 30,
        warmup: int = 3,
        runtime: str = RUNTIMES.default,
        exporter: str | Exporter = EXPORTERS.default,
        memory: bool = True,
    ) -> Benchmark:
        """Measures the original and the compiled file in turn, in one run, on CPU.

        Uses the files that `export` and `export_original` wrote; writes missing ones to a temporary folder.

        Args:
            threads: threads of the runtime.
            batch: rows of the input, where the batch is free.
            rounds: how many times each file runs.
            warmup: calls that are not counted.
            runtime: name of the runtime.
            exporter: format to measure, where files are missing.
            memory: also measure peak memory in fresh processes.

        Raises:
            InvalidInput: a number makes no sense, or the runtime is unknown.
        """
        check_counts(threads, batch, rounds, warmup)
        engine = RUNTIMES.get(runtime)()
        with self._files(exporter) as files:
            measured = benchmark(
                files,
                engine,
                arrays=named_arrays(self.program, with_rows(self.program, batch)),
                threads=threads,
                batch=batch,
                rounds=rounds,
                warmup=warmup,
                memory=memory,
                progress=self.progress,
            )
        self.report.benchmark, self.report.machine, self.report.versions = measured, machine(), versions()
        if len(files) > 1 and (ratio := round(measured.ratio("compiled", "p50"), 2)) > 1:
            self._note(_slower(ratio))
        return measured

    @contextlib.contextmanager
    def _files(self, exporter: str | Exporter) -> Iterator[dict[str, Path]]:
        """The files of the original and of the compiled model; missing ones are written to a temporary folder."""
        writer = exporter_of(exporter)
        with temporary_folder() as folder:
            files = {}
            for label, program in {"original": self.original, "compiled": self.program}.items():
                known = self.report.artifacts.get(label)
                if known is not None and known.path.is_file():
                    files[label] = known.path
                elif program is not None:
                    written = self._write(program, folder / f"{label}{writer.suffix}", writer)
                    files[label] = self._told(program, written).path
            yield files

    @random_state_kept
    def save_node_data(self, folder: str | Path, *, rounds: int = 5) -> list[Path]:
        """Writes node data for Model Explorer to overlay on the graphs: microseconds, bytes, precision and decibels.

        Both files run on one row and one thread under the runtime's profiler; the report's modules also get the times.
        Files are named `compiled.microseconds.json` and so on, and `original.microseconds.json` for the original.

        Args:
            folder: to write into; made if missing.
            rounds: how many times each file runs under the profiler.

        Raises:
            InvalidInput: the folder can't be made or written to, or `rounds` is less than one.
        """
        check_counts(1, 1, rounds, 0)
        check_folder(Path(folder))
        engine, writer = RUNTIMES.ours(RUNTIMES.default)(), exporter_of(EXPORTERS.default)
        assert isinstance(engine, ProfilesNodes)
        assert isinstance(writer, ListsNodes)
        arrays = named_arrays(self.program, with_rows(self.program, 1))
        texts: dict[str, str] = {}
        with self._files(writer) as files, spinner("profile", self.progress):
            for label, path in files.items():
                graph = writer.nodes(path)
                names = {key: node.name for node in graph.nodes for key in (node.name, *node.outputs)}
                times = {name: sum(spent) for name, spent in engine.node_times(path, arrays, names, rounds).items()}
                self.report.modules = with_times(self.report.modules, label, graph, times)
                found = node_data(graph, times, self.report.modules, label)
                texts |= {f"{label}.{name}.json": text for name, text in found.items()}
        return write_files(Path(folder), texts)

    @random_state_kept
    def save(self, folder: str | Path) -> Path:
        """Saves the program and the report; `lobo_fx.load` reads them without unpickling.

        Raises:
            InvalidInput: the folder holds something else, or can't be written.
        """
        return saving.write(saving.Saved(self.program, self.report, self.passes), Path(folder))


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A candidate of a search, compiled only on request.

    Attributes:
        candidate: what the search knows of it.
        result: the result of the search.
    """

    candidate: Candidate
    result: Result

    @property
    def plan(self) -> Any:
        """The plan of the candidate, which `save` can write to a file."""
        return getattr(self.candidate.pass_, "plan", None)

    @random_state_kept
    def compile(self) -> Result:
        """Compiles the candidate, without searching again."""
        pipeline, pass_ = self.result.pipeline, self.candidate.pass_
        assert pipeline is not None
        names = [name for name, _ in self.result.passes]
        before = len(names) - 1 - names[::-1].index(self.candidate.made_by)
        trial = pipeline.fork()
        trial.go_on_from(self.candidate.start, pipeline.rows[: before + 1])  # the first row is the original's
        trial.context.candidates[:] = [dataclasses.replace(self.candidate, chosen=True)]
        later = {*names[before + 1 :]} - {*names[:before]} | {self.candidate.made_by}
        trial.context.notes[:] = [note for note in trial.context.notes if note.made_by not in later]
        titles = CANDIDATES, *later
        trial.context.sheets[:] = [sheet for sheet in trial.context.sheets if not sheet.title.startswith(titles)]
        trial.run(pass_)
        done = [*self.result.passes[:before], (pass_.name, pass_.settings)]
        report = trial.report(self.result.report.model, done)
        return Result(trial.program, trial, report, done, self.result.progress)

    def export(self, path: str | Path, exporter: str | Exporter = EXPORTERS.default) -> Artifact:
        """Compiles the candidate and writes its file, as `Result.export` does.

        Raises:
            InvalidInput: the path is not writable.
            ExportError: the program can't be written, or the file disagrees with PyTorch.
        """
        check_writable(Path(path))
        return self.compile().export(path, exporter)


@random_state_kept
def load(folder: str | Path) -> Result:
    """Loads what `Result.save` wrote as a module that runs, trains and exports, without the model's class.

    Args:
        folder: the saved folder.

    Returns:
        A result with its report; the original model is not part of it.

    Raises:
        InvalidInput: the folder is not one, its files hold more than data, or they are damaged.
    """
    saved = saving.read(Path(folder))
    saved.report.settings = saved.passes
    return Result(saved.program, None, saved.report, saved.passes)


def _session(artifact: Artifact, threads: int) -> Session:
    """A session of the default runtime whose outputs are those of the file, on whichever CPU that is to run."""
    runtime = RUNTIMES.ours(RUNTIMES.default)()
    if "saturated" in artifact.details and isinstance(runtime, LoadsExactly):
        return runtime.load_exact(artifact.path)
    session: Session = runtime.load(artifact.path, threads)
    return session


def _slower(ratio: float) -> Note:
    return Note(f"the compiled file is slower than the original: {ratio:.2f} times its latency")


def _stateless(buffers: list[str], second_call: float) -> Note:
    names = " and ".join(f"'{name}'" for name in buffers[:2]) + f" and {len(buffers) - 2} more" * (len(buffers) > 2)
    off = f"differs from the model's by {second_call:.1e} of the outputs' range" if second_call else "gives the same"
    return Note(f"the file keeps no state: {names}, which forward writes, stays as it is; a second call {off}")


def _packed(
    artifact: Artifact,
    saved: int,
    weights: dict[str, Any],
    values: str = "",
    decibels: float = math.inf,
    out_of_range: Sequence[str] = (),
) -> Note:
    counts = Counter(form for form, _, _ in weights.values())
    forms = " and ".join(f"{count} as {form}" for form, count in counts.most_common())
    said = (
        f"{artifact.path.name} is packed: {forms}, {decimals(saved / MEGABYTE)} MB saved"
        if weights
        else f"{artifact.path.name} stays dense: no weight is smaller packed"
    )
    if values:
        loss = f"leaves {decibels:.1f} dB" if math.isfinite(decibels) else "changes no output"
        said += f"; rounding to {values} {loss} on the example inputs"
    if out_of_range:
        said += f"; not rounded, since the type can't hold them: {', '.join(out_of_range)}"
    return Note(said)
