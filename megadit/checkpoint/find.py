"""Which checkpoint to read: the one that ``latest`` names, and where it is broken the sound one before it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megadit.checkpoint.format import BrokenCheckpoint
from megadit.checkpoint.names import (
    INDEX,
    LATEST,
    check_checkpoint_path,
    checkpoint_root,
    run_config,
    step_folders,
    step_of,
)
from megadit.checkpoint.read import StoredCheckpoint
from megadit.checkpoint.restore import load_weights
from megadit.config import RunConfig
from megadit.config.schema.run import ONLINE
from megadit.errors import UserError, say
from megadit.plugins import plugin_changes

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class OpenedCheckpoint:
    """An opened checkpoint, and those before it, newest first, should its tensors prove to be broken.

    ``problems`` is what was wrong with ``latest`` and with newer ones, where it takes their place.
    """

    stored: StoredCheckpoint
    earlier: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()


def find_checkpoint(run_dir: Path, checkpoint: str = LATEST) -> Path | None:
    """The folder of the checkpoint that ``open_checkpoint`` opens; None if the run has saved none."""
    opened = open_checkpoint(run_dir, checkpoint)
    return None if opened is None else opened.stored.path


def open_checkpoint(run_dir: Path, checkpoint: str = LATEST, key: str = "--resume") -> OpenedCheckpoint | None:
    """The run's latest sound checkpoint, or the one named by a path; None if the run has saved none.

    A path to a run directory means its latest. What is passed over is reported on stderr. ``key`` is how an error
    names the origin of ``checkpoint``.

    Raises:
        BrokenCheckpoint: the path is a broken one, or no checkpoint of the run is sound.
        UserError: the path is no checkpoint.
    """
    if checkpoint == LATEST:
        return _open_newest(run_dir)
    path = Path(checkpoint)
    if checkpoint_root(path).is_dir():
        return _open_newest(path)
    check_checkpoint_path(checkpoint, key)
    return OpenedCheckpoint(StoredCheckpoint(path))


def _open_newest(run_dir: Path) -> OpenedCheckpoint | None:
    paths, problem = _candidates(checkpoint_root(run_dir))
    problems = [problem] if problem else []
    for number, path in enumerate(paths):
        try:
            opened = OpenedCheckpoint(StoredCheckpoint(path), tuple(paths[number + 1 :]), tuple(problems))
        except BrokenCheckpoint as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn_fallback(problem, path)
        return opened
    if problems:
        raise no_sound_checkpoint(problems[0])
    return None


def _candidates(root: Path) -> tuple[list[Path], str]:
    """Complete checkpoints up to the one that ``latest`` names, newest first, and what is wrong with ``latest``."""
    complete = [path for path in reversed(step_folders(root)) if (path / INDEX).is_file()]
    pointer = root / LATEST
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # of a run that was copied without it or killed as it first saved, or damaged
        return complete, f"{pointer}: cannot be read" if complete else ""
    target = root / name
    upto = [path for path in complete if step_of(path) <= step_of(target)] if step_of(target) >= 0 else complete
    problem = "" if upto and upto[0].name == name else f"{pointer}: points to '{name}', which is not complete"
    return upto, problem


def warn_fallback(problem: str, path: Path) -> None:
    """Say on stderr that an earlier checkpoint takes the place of a broken one."""
    print(f"warning: {problem.removesuffix('; use an earlier one')}; going on from {path.name}", file=sys.stderr)


def no_sound_checkpoint(problem: str) -> BrokenCheckpoint:
    """The sentence for a run none of whose checkpoints can be read."""
    return BrokenCheckpoint(
        f"{problem.removesuffix('; use an earlier one')}, and no earlier checkpoint of the run is sound; give one of "
        "another run with --resume PATH and another --run_dir, or move the folder away to start anew"
    )


def load_model(
    run_dir: str | Path, checkpoint: str = "latest", weights: str | None = ONLINE
) -> tuple[RunConfig, nn.Module]:
    """The config and the float32 model (on the CPU, eval mode) of a run directory's checkpoint.

    weights: online, or the name of a moving average; None: what the run's ``sample.weights`` names.

    Raises:
        UserError: no run there, no checkpoint yet, a broken one or one of another model or without these weights.
    """
    import torch

    from megadit.engine.kernels import select_for_inference
    from megadit.engine.tf32 import set_tf32
    from megadit.models import build_model

    run_dir = Path(run_dir)
    config = run_config(run_dir)
    opened = open_checkpoint(run_dir, checkpoint, "--checkpoint")
    if opened is None:
        raise UserError(f"'{run_dir}' has no checkpoint yet; wait for train.checkpoint_every or the run's end")
    for change in plugin_changes(opened.stored.index.plugins):
        say(f"warning: {change}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (fallback := select_for_inference(config.kernels, device)) is not None:
        say(f"note: {fallback}")
    set_tf32(config.train, device)
    model = build_model(config.model)
    load_weights(opened.stored, model, config.sample.weights if weights is None else weights)
    return config, model.eval()
