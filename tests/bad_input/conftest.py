"""Fixtures of all tables of bad input."""

import fcntl
import shutil
from pathlib import Path

import pytest

from helpers.bad_input import make_run, refused

__all__ = ["refused", "run_folder", "trained"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that is not to be changed; made once, also where several processes run the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    with open(shared / "trained.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "trained").is_dir():
            make_run(shared / "making")
            (shared / "making").rename(shared / "trained")
    return shared / "trained"


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, as ``run`` in the folder where the commands start."""
    folder = tmp_path / "here" / "run"
    shutil.copytree(trained, folder)
    return folder
