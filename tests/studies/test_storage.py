"""Storages: what is opened, what a study remembers, and passwords that never show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lobo_fx.errors import InvalidInput
from lobo_fx.studies.storage import check_identity, open_study, shown, storage_errors

BASE = {"model": "net", "space": "passes:\n- a\n- b\n"}


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se/cr@et@host/db", "postgresql://me:***@host/db"),
        ("mysql+pymysql://:secret@host:3306/db", "mysql+pymysql://:***@host:3306/db"),
        ("postgresql://host/db?password=secret&a=b", "postgresql://host/db?password=***&a=b"),
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("sqlite:////tmp/study.db", "sqlite:////tmp/study.db"),
        ("study.journal", "study.journal"),
    ],
)
def test_passwords_are_not_shown(storage: str, expected: str) -> None:
    assert shown(storage) == expected


@pytest.mark.parametrize("url", ["postgresql://me:secret@localhost:1/db", "nothing://me:secret@localhost/db"])
def test_errors_of_a_database_hide_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"the storage .*://me:\*\*\*@localhost") as caught:
        open_study("study", url, ["minimize"])
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(InvalidInput, match=r"OSError: no way to a://b:\*\*\*@c"), storage_errors(url):
        raise OSError("no way to a://b:secret@c")


@pytest.mark.parametrize("url", ["redis://localhost", "grpc://localhost"])
def test_storages_that_hold_pickles_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="give a file for a journal, or an SQL database"):
        open_study("study", url, ["minimize"])


def test_a_journal_holds_json_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = open_study("study", path, ["minimize"])
    check_identity(study, BASE)
    study.tell(study.ask(), 1.0)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no journal\nat all\n")
    with pytest.raises(InvalidInput, match=r"the storage .*text can't be used"):
        open_study("study", tmp_path / "text", ["minimize"])
    with pytest.raises(InvalidInput, match="does not exist"):
        open_study("study", tmp_path / "no" / "study.journal", ["minimize"])


def test_without_optuna_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InvalidInput, match=r"pip install 'lobo-fx\[search\]'"):
        open_study("study", None, ["minimize"])


def test_a_study_goes_on_with_the_same_objectives_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    open_study("study", path, ["maximize", "minimize"])
    open_study("study", path, ["maximize", "minimize"])
    open_study("other", path, ["minimize"])
    with pytest.raises(InvalidInput, match=r"the study 'study' in .* has other objectives"):
        open_study("study", path, ["minimize", "minimize"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "web"}, "is of another model: 'net' there, 'web' here"),
        ({"space": "passes:\n- a\n- c\n"}, "is of another space: '- b' there, '- c' here"),
        ({"space": "passes:\n- a\n- b\n- c\n"}, "is of another space: '' there, '- c' here"),
        ({"data": "0123"}, "is of another data: '' there, '0123' here"),
    ],
)
def test_a_study_of_something_else_is_refused_with_the_first_difference(change: dict[str, str], message: str) -> None:
    study = open_study("study", None, ["minimize"])
    check_identity(study, BASE)
    check_identity(study, dict(BASE))
    with pytest.raises(InvalidInput, match=message):
        check_identity(study, BASE | change)
