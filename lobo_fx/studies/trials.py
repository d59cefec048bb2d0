"""Trials shared by processes: each is run once, by whichever process is free, and again if its process died.

Optuna makes single steps atomic: a trial gets a number, is started, is ended. This module does the rest, in the same
way for every storage, and never relies on two steps happening together:

- A running trial shows that its process is alive by a beat, a growing number. A process that sees the same beat for as
  long as the lease, by its own clock, fails the trial; clocks of different machines need not agree.
- A failed trial without an outcome is repeated by a new one with the same choices. If two processes both add one, the
  first counts.
- Trials that repeat no other count towards the total in the order of their numbers; surplus ones are not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lobo_fx.studies.storage import storage_errors, unless_taken

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["MEASURED", "Ledger", "Outcome", "Worker"]

MEASURED = "measured"
"""User attribute of trials: the facts of their outcome."""
ERROR, REFUSED = "error", "refused"
"""User attributes of trials that ended without values: the reason."""
_REPEATS, _SURPLUS, _INTERRUPTED, _BEAT, _OWNER = "repeats", "surplus", "interrupted", "beat", "owner"
_ATTEMPTS = 3
"""A trial is not repeated after this many processes died of it."""
_BEATS = 6
"""How many times within a lease a process shows that it is alive."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a trial.

    Attributes:
        values: values of the objectives; empty if there are none.
        reason: why there are none.
        is_refused: whether the model can't be compiled this way, from which the search learns; otherwise it is an
            error.
        facts: what else is kept, as JSON data.
    """

    values: Sequence[float] = ()
    reason: str = ""
    is_refused: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Ledger:
    """Which trials count, and their outcomes.

    Attributes:
        done: trials with values, in the order of their numbers.
        refused: trials that can't be compiled, each with the reason.
        errors: trials that failed, each with the reason.
        lost: trials that have to be repeated.
        roots: numbers of the trials that repeat no other one, without surplus ones.
        waiting: how many are waiting to be started.
    """

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        by_number = {trial.number: trial for trial in trials}
        self.done: list[FrozenTrial] = []
        self.refused: list[tuple[FrozenTrial, str]] = []
        self.errors: list[tuple[FrozenTrial, str]] = []
        self.lost: list[FrozenTrial] = []
        self.first: dict[int, int] = {}  # by number of a failed trial, the number of the one that repeats it
        self.roots: list[int] = []
        self.waiting = 0
        for trial in trials:
            if (repeated := trial.user_attrs.get(_REPEATS)) is None:
                self.roots += [] if _SURPLUS in trial.user_attrs else [trial.number]
            elif _is_lost(by_number[repeated]):
                self.first.setdefault(repeated, trial.number)
        for root in self.roots:
            trial, attempts = by_number[root], 1
            while _is_lost(trial) and trial.number in self.first:
                attempts += _INTERRUPTED not in trial.user_attrs
                trial = by_number[self.first[trial.number]]
            self._add(trial, attempts)

    def _add(self, trial: FrozenTrial, attempts: int) -> None:
        state = trial.state.name
        if state == "COMPLETE":
            self.done.append(trial)
        elif REFUSED in trial.user_attrs:
            self.refused.append((trial, trial.user_attrs[REFUSED]))
        elif ERROR in trial.user_attrs:
            self.errors.append((trial, trial.user_attrs[ERROR]))
        elif state == "WAITING":
            self.waiting += 1
        elif state != "RUNNING" and attempts >= _ATTEMPTS and _INTERRUPTED not in trial.user_attrs:
            self.errors.append((trial, f"{attempts} processes died of it, for want of memory maybe"))
        elif state != "RUNNING":
            self.lost.append(trial)

    @property
    def ended(self) -> int:
        """How many trials came to an outcome."""
        return len(self.done) + len(self.refused) + len(self.errors)

    def is_surplus(self, trial: FrozenTrial | Trial, total: int) -> bool:
        """Whether a trial that was just started is surplus."""
        if (repeated := trial.user_attrs.get(_REPEATS)) is not None:
            return self.first.get(repeated) != trial.number
        return sum(number < trial.number for number in self.roots) >= total


def _is_lost(trial: FrozenTrial) -> bool:
    return trial.state.name == "FAIL" and not {ERROR, REFUSED} & trial.user_attrs.keys()


class Worker:
    """A process that works on a study.

    Args:
        study: the study.
        storage: its storage, for messages.
        run: runs a trial; an exception ends the work, and the trial is repeated.
        lease: seconds without a beat after which a trial is taken from its process.
    """

    def __init__(self, study: Study, storage: str, run: Callable[[Trial], Outcome], lease: float) -> None:
        self.study, self.storage, self.run, self.lease = study, storage, run, lease
        self.owner = f"{socket.gethostname()}:{os.getpid()}"
        self.beats: dict[int, tuple[object, float]] = {}

    def ledger(self) -> Ledger:
        """The trials as they are now."""
        with storage_errors(self.storage):
            return Ledger(self.study.get_trials(deepcopy=False))

    def work(self, total: int, until: float, update: Callable[[Ledger], None]) -> Ledger:
        """Runs trials until enough came to an outcome, here or in other processes.

        Args:
            total: number of trials of the study.
            until: time after which none is started, by `time.monotonic`.
            update: called with the ledger each time it was read.
        """
        while True:
            self._take_back()
            ledger = self.ledger()
            update(ledger)
            if ledger.ended >= total or time.monotonic() >= until:
                return ledger
            if not ledger.waiting and len(ledger.roots) >= total:  # others run the last ones
                time.sleep(min(1.0, self.lease / _BEATS))
                continue
            with unless_taken():
                with storage_errors(self.storage):
                    trial = self.study.ask()
                    trial.set_user_attr(_OWNER, self.owner)
                if self.ledger().is_surplus(trial, total):
                    self._end(trial, "FAIL", _SURPLUS, True)
                else:
                    self._run(trial)

    def _run(self, trial: Trial) -> None:
        try:
            with _beating(trial, self.lease / _BEATS):
                outcome = self.run(trial)
        except BaseException:
            with unless_taken():
                self._end(trial, "FAIL", _INTERRUPTED, True)
            self._take_back()
            raise
        with storage_errors(self.storage):
            trial.set_user_attr(MEASURED, outcome.facts)
        if outcome.values:
            with storage_errors(self.storage):
                self.study.tell(trial, list(outcome.values), skip_if_finished=True)
        elif outcome.is_refused:
            self._end(trial, "PRUNED", REFUSED, outcome.reason)
        else:
            self._end(trial, "FAIL", ERROR, outcome.reason)

    def _end(self, trial: Trial, state: str, name: str, reason: object) -> None:
        """Ends a trial without values."""
        from optuna.trial import TrialState

        with storage_errors(self.storage):
            trial.set_user_attr(name, reason)
            self.study.tell(trial, state=TrialState[state], skip_if_finished=True)

    def _take_back(self) -> None:
        """Fails trials whose process was silent for the lease, and adds trials that repeat lost ones."""
        from optuna.trial import TrialState, create_trial

        with storage_errors(self.storage):
            trials = self.study.get_trials(deepcopy=False)
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            now = time.monotonic()
            for trial in running:
                beat, seen = self.beats.get(trial.number, (None, now))
                if (found := (trial.user_attrs.get(_OWNER), trial.user_attrs.get(_BEAT))) != beat:
                    self.beats[trial.number] = (found, now)
                elif now - seen > self.lease:
                    with unless_taken():
                        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            for trial in Ledger(self.study.get_trials(deepcopy=False)).lost:
                again = create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={_REPEATS: trial.number},
                )
                self.study.add_trial(again)


@contextlib.contextmanager
def _beating(trial: Trial, pause: float) -> Iterator[None]:
    """Shows that the process is alive, from a separate thread."""
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.wait(pause):
            number += 1
            # An unreachable storage is tried again at the next beat; if the trial was taken, ending it will tell.
            with contextlib.suppress(Exception):
                trial.set_user_attr(_BEAT, number)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
