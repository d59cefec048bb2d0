"""Storages of studies: Optuna's journal files, or any SQL database that SQLAlchemy opens."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.files import check_writable
from lobo_fx.terminal.quiet import quiet

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

Direction = Literal["maximize", "minimize"]
__all__ = ["Direction", "check_identity", "open_study", "shown", "storage_errors", "unless_taken"]

_URL = re.compile(r"[a-z0-9_+]+://", re.IGNORECASE)
_PASSWORD = re.compile(r"(://[^:/@\s]*:)\S*(?=@)|([?&;]\w*(?:pass|pwd|secret|token)\w*=)[^&;\s]*", re.IGNORECASE)
_IDENTITY = "lobo_fx"
_TRIES, _PAUSE = 5, 0.2
"""Tries to open tables, in case several processes create them at once, and seconds between tries."""
_WAIT = 60
"""Seconds that SQLite waits for the write of another process."""


def shown(storage: str) -> str:
    """A storage without its password, for messages."""
    return _PASSWORD.sub(lambda found: f"{found[1] or found[2]}***", storage)


@contextlib.contextmanager
def storage_errors(storage: str) -> Iterator[None]:
    """Turns errors of a storage into our own, without its password.

    Raises:
        InvalidInput: names the storage.
        UpdateFinishedTrialError: a trial has already ended.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    try:
        with quiet():
            yield
    except (LoboError, UpdateFinishedTrialError):
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        # without a cause, whose text may hold the password
        raise InvalidInput(
            f"the storage {shown(storage)} can't be used: {type(error).__name__}: {shown(first)}"
        ) from None


@contextlib.contextmanager
def unless_taken() -> Iterator[None]:
    """Leaves the block if a trial has already ended: its process was silent too long, and another one took it."""
    from optuna.exceptions import UpdateFinishedTrialError

    with contextlib.suppress(UpdateFinishedTrialError):
        yield


def open_study(name: str, storage: str | Path | None, directions: Sequence[Direction]) -> Study:
    """Opens a study, creating it if missing.

    Args:
        name: name of the study.
        storage: path of a journal file, or the URL of an SQL database; None keeps the study in memory.
        directions: `maximize` or `minimize`, one for each objective.

    Raises:
        InvalidInput: Optuna is not installed; the storage is of another kind, damaged or out of reach; or the study
            there has other objectives.
    """
    try:
        with quiet():
            import optuna
    except ImportError:
        raise InvalidInput("a search needs Optuna: pip install 'lobo-fx[search]'") from None
    where = "memory" if storage is None else str(storage)
    with storage_errors(where):
        study = optuna.create_study(
            storage=_storage(where, storage is None), study_name=name, directions=directions, load_if_exists=True
        )
        if [direction.name.lower() for direction in study.directions] != list(directions):
            raise InvalidInput(
                f"the study '{name}' in {shown(where)} has other objectives; give the same ones, or another name with "
                "--study (study=)"
            )
        return study


def _storage(where: str, in_memory: bool) -> BaseStorage | None:
    """Opens the storage; journals and tables hold text, numbers and JSON, no pickles."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    if in_memory:
        return None
    if not _URL.match(where):
        path = Path(where).absolute()
        check_writable(path)
        return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
    if where.lower().startswith(("redis", "grpc")):  # Redis keeps snapshots of a journal as pickles
        raise InvalidInput(f"{shown(where)} is no storage for a study; give a file for a journal, or an SQL database")
    options: dict[str, Any] = {"connect_args": {"timeout": _WAIT}} if where.startswith("sqlite") else {}
    for _ in range(_TRIES):
        try:
            return RDBStorage(where, engine_kwargs=options)
        except Exception as error:
            if "exist" not in str(error) and "UNIQUE" not in str(error):
                raise
            time.sleep(_PAUSE)
    return RDBStorage(where, engine_kwargs=options)


def check_identity(study: Study, identity: Mapping[str, str]) -> None:
    """Refuses to continue a study of another model or space; a new study records its own.

    Args:
        study: the study.
        identity: by aspect ("model", "space"), a text that is equal in every process.

    Raises:
        InvalidInput: names the first difference; for texts of several lines, the first line that differs.
    """
    if _IDENTITY not in study.user_attrs:
        study.set_user_attr(_IDENTITY, dict(identity))
    known = study.user_attrs[_IDENTITY]
    for what, text in identity.items():
        if (there := known.get(what, "")) == text:
            continue
        lines = zip([*there.split("\n"), ""], [*text.split("\n"), ""], strict=False)
        one, other = next(((one, other) for one, other in lines if one != other), (there, text))
        raise InvalidInput(
            f"the study '{study.study_name}' is of another {what}: '{one.strip()}' there, '{other.strip()}' here; "
            "give what it was started with, or another name with --study (study=)"
        )
