"""Trials that processes share: each is counted once, whoever dies, is silent or meets an error."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import alembic.command  # noqa: F401  once, for all processes made here
import optuna
import pytest
from optuna.trial import TrialState as State

from lobo_fx.studies.storage import open_study
from lobo_fx.studies.trials import Ledger, Outcome, Worker

LEASE = 0.6
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
        finally:
            os._exit(0)
    return child


def numbers(ledger: Ledger) -> list[int]:
    return [trial.number for trial in ledger.done]


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return STORAGES[request.param].format(tmp_path)


# --- several processes -----------------------------------------------------------------------------------


def test_of_three_processes_one_is_killed_and_no_trial_is_lost_or_counted_twice(storage: str, tmp_path: Path) -> None:
    """The first one is killed in the middle of its second trial."""

    def noted(trial: optuna.Trial) -> Outcome:
        value = drawn(trial)
        (tmp_path / f"{os.getpid()}_{trial.number}_{time.monotonic_ns()}").write_text(str(value))
        time.sleep(0.05)
        return Outcome([value])

    def fatal(trial: optuna.Trial) -> Outcome:
        if list(tmp_path.glob(f"{os.getpid()}_*")):
            noted(trial)
            os.kill(os.getpid(), signal.SIGKILL)
        return noted(trial)

    children = [process(lambda run=run: work(storage, 12, run)) for run in (fatal, noted, noted)]  # type: ignore[misc]
    ends = [os.waitpid(child, 0)[1] for child in children]
    assert ends == [signal.SIGKILL, 0, 0]
    study = open_study("study", storage, ["minimize"])
    trials = study.get_trials()
    ledger = Ledger(trials)
    assert (len(ledger.done), ledger.ended, len(ledger.roots)) == (12, 12, 12)
    (killed,) = [trial for trial in trials if trial.number in ledger.first]
    again = trials[ledger.first[killed.number]]
    assert (killed.state, again.state) == (State.FAIL, State.COMPLETE)
    assert again.params == killed.params
    assert again.value == killed.params["x"]
    ran = {path.name.split("_")[0] for path in tmp_path.glob("*_*_*")}
    assert ran == {str(child) for child in children}


def test_two_processes_share_the_trials_of_a_study(storage: str) -> None:
    def slow(trial: optuna.Trial) -> Outcome:
        time.sleep(0.03)
        return measured(trial)

    children = [process(lambda: work(storage, 8, slow)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    trials = open_study("study", storage, ["minimize"]).get_trials()
    assert len(Ledger(trials).done) == 8
    assert len({trial.user_attrs["owner"] for trial in trials}) == 2


# --- silence ---------------------------------------------------------------------------------------------


def test_a_silent_trial_is_repeated_after_the_lease_and_not_before() -> None:
    one = worker(None)
    one.study.ask().suggest_float("x", 0, 1)  # of a process that died
    started = time.monotonic()
    one.work(1, started + LEASE / 2, lambda ledger: None)
    assert [trial.state for trial in one.study.trials] == [State.RUNNING]
    ledger = one.work(1, started + 30, lambda ledger: None)
    assert time.monotonic() - started > LEASE
    assert [trial.state for trial in one.study.trials] == [State.FAIL, State.COMPLETE]
    assert numbers(ledger) == [1]


def test_a_trial_that_takes_longer_than_the_lease_is_left_to_its_process(storage: str) -> None:
    def long(trial: optuna.Trial) -> Outcome:
        time.sleep(2 * LEASE)
        return measured(trial)

    child = process(lambda: work(storage, 1, long))
    ledger = work(storage, 1)
    os.waitpid(child, 0)
    assert [trial.number for trial in open_study("study", storage, ["minimize"]).trials] == [0]
    assert numbers(ledger) == [0]


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


def test_a_study_goes_on_to_a_larger_total(storage: str) -> None:
    assert numbers(work(storage, 2)) == [0, 1]
    assert numbers(work(storage, 3)) == [0, 1, 2]
    assert numbers(work(storage, 3)) == [0, 1, 2]
    assert len(work(storage, 5, seconds=0).done) == 3
