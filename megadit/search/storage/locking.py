"""The lock around a study's writes, and the optuna storage behind them.

optuna's claiming on SQLite reads and then sets, so two processes may claim one trial; a lock of ours makes it one act.
On one host it is ``flock``, which the kernel releases when its holder dies. On a shared file system it is optuna's lock
file, which others break when its holder has been gone for a while.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megadit.errors import UserError
from megadit.files.file_kind import file_instead

FILES = {"sqlite": "study.db", "journal": "journal.log"}
_BUSY_S = 120  # how long SQLite waits for another reader or writer
_ERROR_CHARS = 200  # of an error of optuna's, which may quote a whole record
_BROKEN_AFTER_S = 30  # a lock file this old, on a shared file system, belongs to a holder that was killed


def study_lock(folder: Path, kind: str) -> contextlib.AbstractContextManager[None]:
    """In the block no other process writes the study in ``folder`` (sqlite or journal). It does not nest.

    Raises:
        UserError: the file system has no locks for sqlite.
    """
    file = folder / "study.lock"
    return _shared_lock(file, folder / FILES[kind]) if kind == "journal" else _host_lock(file)


@contextlib.contextmanager
def _host_lock(path: Path) -> Iterator[None]:
    # Not filelock's: where there is no flock it makes a lock file of another kind, beside which older workers go on.
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"storage: sqlite needs a file system that locks files, and '{path}' cannot be locked "
                f"({error.strerror or error}); set storage: journal, or choose a --study_dir on a local disk"
            ) from error
        yield


@contextlib.contextmanager
def _shared_lock(path: Path, journal: Path) -> Iterator[None]:
    from optuna.storages.journal import JournalFileOpenLock

    lock = JournalFileOpenLock(str(path.with_suffix("")), grace_period=_BROKEN_AFTER_S)
    lock.acquire()
    try:
        _drop_torn_line(journal)
        yield
    finally:
        # Another process may have broken a lock that was held for too long; then it is not ours to release.
        with contextlib.suppress(RuntimeError):
            lock.release()


def _drop_torn_line(journal: Path) -> None:
    """Truncate the unfinished last line of a writer that was killed; the next line would be lost with it."""
    if not journal.is_file():
        return
    with open(journal, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


@contextlib.contextmanager
def damage_as_user_error(file: Path) -> Iterator[None]:
    """Turn what optuna, SQLAlchemy or SQLite raise over a damaged ``file`` or a full disk into a UserError.

    optuna checks little of what it reads, and raises whatever that leads to. So the block holds reading and nothing
    else, lest defects of our own be reported as damage.

    Raises:
        UserError: the file is no such storage.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--study_dir: '{file}' cannot be opened ({error.strerror or error})") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("sqlalchemy", "sqlite3", "optuna", "json", "builtins"):
            other = file_instead(file, *(("sqlite",) if file.name == FILES["sqlite"] else ("json", "text")))
            if other:
                raise UserError(f"--study_dir: '{file}' is not a study's storage: {other}") from error
            raise UserError(
                f"--study_dir: '{file}' is not a study's storage, or is damaged ({_first_line(error)}); copy it again, "
                "or move the folder away to start anew"
            ) from error
        raise


def open_storage(folder: Path, kind: str, *, read_only: bool = False) -> Any:
    """The optuna storage of the study in ``folder`` (sqlite or journal), made unless ``read_only``.

    Raises:
        UserError: the file is no such storage.
    """
    quiet_optuna()
    from optuna.storages import JournalStorage, RDBStorage, get_storage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    file = folder / FILES[kind]
    with damage_as_user_error(file):
        if kind == "journal":
            lock = JournalFileOpenLock(str(file), grace_period=_BROKEN_AFTER_S)
            return JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
        # By a function and not by SQLAlchemy's URL, which would read the ?, # and % of a folder's name as its own.
        uri = f"file:{quote(os.fsencode(file.resolve()))}?mode={'ro' if read_only else 'rwc'}"
        connect = functools.partial(sqlite3.connect, uri, uri=True, timeout=_BUSY_S, check_same_thread=False)
        return get_storage(RDBStorage(f"sqlite:///{FILES['sqlite']}", engine_kwargs={"creator": connect}))


def _first_line(error: Exception) -> str:
    kind = type(error)
    line = (str(error).splitlines() or [kind.__name__])[0][:_ERROR_CHARS]
    return f"{kind.__name__}: {line}" if kind.__module__ == "builtins" else line


def quiet_optuna() -> None:
    """Silence the progress chatter of optuna, SQLAlchemy and alembic, and optuna's notices of young features."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("sqlalchemy", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
