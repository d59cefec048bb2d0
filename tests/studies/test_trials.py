"""Trials that processes share: each is counted once, whoever dies, is silent or meets an error."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState as State

from lobo_fx.studies.storage import open_study
from lobo_fx.studies.trials import Ledger, Outcome, Worker

LEASE = 1.0
STORAGES = {"journal": "{}/study.journal", "database": "sqlite:///{}/study.db"}
Run = Callable[[optuna.Trial], Outcome]


def drawn(trial: optuna.Trial) -> float:
    return float(trial.suggest_float("x", 0, 1))


def measured(trial: optuna.Trial) -> Outcome:
    return Outcome([drawn(trial)])


def worker(storage: str | None, run: Run = measured, lease: float = LEASE) -> Worker:
    return Worker(open_study("study", storage, ["minimize"]), "there", run, lease)


def work(storage: str | None, total: int, run: Run = measured, seconds: float = 30) -> Ledger:
    return worker(storage, run).work(total, time.monotonic() + seconds, lambda ledger: None)


def process(task: Callable[[], object]) -> int:
    """Runs a task in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            task()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def numbers(ledger: Ledger) -> list[int]:
    return [trial.number for trial in ledger.done]


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """Once, for all processes made here."""
    importlib.import_module("alembic.command")


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return STORAGES[request.param].format(tmp_path)


# --- several processes -----------------------------------------------------------------------------------


def together(folder: Path, count: int) -> Run:
    """Runs trials, the first of each process only when so many processes have one."""

    def run(trial: optuna.Trial) -> Outcome:
        value = drawn(trial)
        (folder / f"process_{os.getpid()}").touch()
        until = time.monotonic() + 60
        while len(list(folder.glob("process_*"))) < count:
            assert time.monotonic() < until
            time.sleep(0.01)
        return Outcome([value])

    return run


@pytest.mark.parametrize("storage", ["journal", pytest.param("database", marks=pytest.mark.slow)], indirect=True)
def test_of_three_processes_one_is_killed_and_no_trial_is_lost_or_counted_twice(storage: str, tmp_path: Path) -> None:
    run = together(tmp_path, 3)

    def fatal(trial: optuna.Trial) -> Outcome:
        run(trial)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    children = [process(lambda run=run: work(storage, 9, run)) for run in (fatal, run, run)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [signal.SIGKILL, 0, 0]
    trials = open_study("study", storage, ["minimize"]).get_trials()
    ledger = Ledger(trials)
    assert (len(ledger.done), ledger.ended, len(ledger.roots)) == (9, 9, 9)
    killed = next(trial for trial in trials if trial.user_attrs["owner"].endswith(f":{children[0]}"))
    assert killed.state == State.FAIL
    again = trials[ledger.first[killed.number]]
    assert again.params == killed.params
    assert killed.number not in numbers(ledger)
    assert [trial.value for trial in ledger.done if trial.params == killed.params] == [killed.params["x"]]


def test_two_processes_share_the_trials_of_a_study(storage: str, tmp_path: Path) -> None:
    children = [process(lambda: work(storage, 6, together(tmp_path, 2))) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    ledger = Ledger(open_study("study", storage, ["minimize"]).get_trials())
    assert (len(ledger.done), len(ledger.roots)) == (6, 6)
    assert {trial.user_attrs["owner"].rpartition(":")[2] for trial in ledger.done} == {*map(str, children)}


# --- silence ---------------------------------------------------------------------------------------------


def test_a_trial_is_repeated_after_a_silence_of_the_lease_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("lobo_fx.studies.trials.time", SimpleNamespace(monotonic=lambda: clock[0]))
    one = worker(None, lease=10)
    dead, alive = one.study.ask(), one.study.ask()
    states = []
    for number, clock[0] in enumerate((0.0, 9.0, 10.0, 10.5)):
        alive.set_user_attr("beat", number)
        one._take_back()
        states.append([trial.state for trial in one.study.trials])
    running = [State.RUNNING, State.RUNNING]
    assert states == [running, running, running, [State.FAIL, State.RUNNING, State.WAITING]]
    assert one.study.trials[2].user_attrs == {"repeats": dead.number}
    clock[0] = 21.0
    one._take_back()
    assert one.study.trials[1].state == State.FAIL


def test_a_trial_beats_while_it_runs() -> None:
    one, threads = worker(None, lease=0.06), threading.active_count()

    def beats() -> int:
        return int(one.study.trials[0].user_attrs.get("beat", 0))

    def long(trial: optuna.Trial) -> Outcome:
        until = time.monotonic() + 30
        while beats() < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        return measured(trial)

    one.run = long
    assert numbers(one.work(1, time.monotonic() + 30, lambda ledger: None)) == [0]
    assert threading.active_count() == threads


@pytest.mark.parametrize("has_drawn", [True, False])
def test_what_a_process_brings_after_its_trial_was_taken_is_not_counted(has_drawn: bool) -> None:
    one = worker(None)

    def outlived(trial: optuna.Trial) -> Outcome:
        if has_drawn:
            drawn(trial)
        one.study.tell(trial.number, state=State.FAIL)
        one.run = measured
        return Outcome([drawn(trial)])

    one.run = outlived
    ledger = one.work(1, time.monotonic() + 30, lambda ledger: None)
    assert [trial.state for trial in one.study.trials] == [State.FAIL, State.COMPLETE]
    assert numbers(ledger) == [1]


def test_where_two_processes_both_repeat_a_trial_the_first_counts() -> None:
    one = worker(None)
    lost = one.study.ask()
    one.study.tell(lost, state=State.FAIL)
    for _ in range(2):
        one.study.add_trial(optuna.create_trial(state=State.WAITING, user_attrs={"repeats": lost.number}))
    ledger = one.work(2, time.monotonic() + 30, lambda ledger: None)
    assert numbers(ledger) == [1, 3]
    assert "surplus" in one.study.trials[2].user_attrs


def test_a_trial_that_three_processes_died_of_is_an_error_and_one_that_was_interrupted_is_not() -> None:
    one = worker(None)
    for _ in range(3):
        one.study.tell(one.study.ask(), state=State.FAIL)
        one._take_back()
    ledger = one.ledger()
    assert (ledger.ended, ledger.waiting) == (1, 0)
    assert [reason for _, reason in ledger.errors] == ["3 processes died of it, for want of memory maybe"]

    two = worker(None)
    for _ in range(4):
        trial = two.study.ask()
        trial.set_user_attr("interrupted", True)
        two.study.tell(trial, state=State.FAIL)
        two._take_back()
    assert (two.ledger().ended, two.ledger().waiting) == (0, 1)


# --- outcomes --------------------------------------------------------------------------------------------


def test_refusals_and_errors_are_kept_with_their_reasons_and_count() -> None:
    outcomes = [Outcome([1.0]), Outcome(reason="can't", is_refused=True), Outcome(reason="broke"), Outcome([2.0])]
    one = worker(None, lambda trial: outcomes[trial.number])
    ledger = one.work(4, time.monotonic() + 30, lambda ledger: None)
    assert numbers(ledger) == [0, 3]
    assert [(trial.number, trial.state, reason) for trial, reason in ledger.refused] == [(1, State.PRUNED, "can't")]
    assert [(trial.number, trial.state, reason) for trial, reason in ledger.errors] == [(2, State.FAIL, "broke")]


def test_what_interrupts_a_trial_puts_it_back(storage: str) -> None:
    def interrupted(trial: optuna.Trial) -> Outcome:
        drawn(trial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(storage, 2, interrupted)
    trials = open_study("study", storage, ["minimize"]).trials
    assert [trial.state for trial in trials] == [State.FAIL, State.WAITING]
    assert trials[1].params == trials[0].params
    assert numbers(work(storage, 2)) == [1, 2]


def test_a_trial_more_than_the_total_is_not_run() -> None:
    one = worker(None)
    trials = [one.study.ask() for _ in range(3)]
    ledger = one.ledger()
    assert [ledger.is_surplus(trial, 2) for trial in trials] == [False, False, True]


@pytest.mark.parametrize("storage", ["journal", pytest.param("database", marks=pytest.mark.slow)], indirect=True)
def test_a_study_goes_on_to_a_larger_total(storage: str) -> None:
    assert numbers(work(storage, 2)) == [0, 1]
    assert numbers(work(storage, 3)) == [0, 1, 2]
    assert numbers(work(storage, 3)) == [0, 1, 2]
    assert len(work(storage, 5, seconds=0).done) == 3
