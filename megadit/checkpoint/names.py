"""Paths of a run's checkpoints, which ones exist by their names, and the run's configuration. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from megadit.config import RunConfig, load_config
from megadit.errors import UserError
from megadit.files.folder_kind import run_instead

INDEX, STATE, LATEST = "index.json", "state.json", "latest"


def checkpoint_root(run_dir: Path) -> Path:
    """The folder that holds a run's checkpoints and the ``latest`` file."""
    return run_dir / "checkpoints"


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """All checkpoints, the oldest first."""
    folders = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a folder's name; -1 where the name is another."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def has_checkpoints(run_dir: Path) -> bool:
    """Whether the run has saved any, be it broken or without a ``latest``."""
    root = checkpoint_root(run_dir)
    return (root / LATEST).is_file() or any((path / INDEX).is_file() for path in step_folders(root))


def saved_step(run_dir: Path) -> int:
    """The step that ``latest`` names, 0 if none: where a start without a word about resuming goes on."""
    try:
        return max(0, step_of(Path((checkpoint_root(run_dir) / LATEST).read_text(encoding="utf-8").strip())))
    except (OSError, UnicodeDecodeError):
        return 0


def check_checkpoint_path(checkpoint: str, key: str) -> None:
    """Raise UserError unless ``checkpoint`` looks like a checkpoint or a run directory; ``key`` is its origin."""
    path = Path(checkpoint)
    if not (checkpoint_root(path).is_dir() or (path / INDEX).is_file()):
        other = run_instead(path)
        remedy = "; give a folder such as RUN/checkpoints/step-00001000" if other is None else f": {other}"
        raise UserError(f"{key}: '{checkpoint}' is no checkpoint{remedy}")


def run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run directory. Raises UserError if the folder is none, or its configuration is broken."""
    if not (run_dir / "config.yaml").is_file():
        other = run_instead(run_dir)
        remedy = "; give the --run_dir of a training run" if other is None else f": {other}"
        raise UserError(f"'{run_dir}' is no run directory (it has no config.yaml){remedy}")
    return load_config(run_dir / "config.yaml")
