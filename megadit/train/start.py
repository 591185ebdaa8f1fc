"""What a job is, and where it begins: at a checkpoint of the data that it has, with weights alone, or at step 0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadit.checkpoint.find import open_checkpoint
from megadit.checkpoint.names import checkpoint_root, has_checkpoints
from megadit.checkpoint.read import StoredCheckpoint
from megadit.config import RunConfig
from megadit.data import ImageSet
from megadit.data.windows import Window, joined
from megadit.engine.schedule import steps_of_epochs
from megadit.errors import UserError
from megadit.train.resume import check_weights_start, samples_left_out
from megadit.train.same_data import DataRecord, data_record


@dataclass(frozen=True)
class Job:
    """What the command line asked for: a resolved config, DeepSpeed's dict, where to write, how to resume."""

    config: RunConfig
    ds_config: dict[str, Any]
    run_dir: Path
    resume: str
    train_set: ImageSet
    val_set: ImageSet


def total_steps(config: RunConfig, train_images: int) -> int:
    """Optimizer steps of the run, from ``train.steps`` or ``train.epochs``."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None  # the config holds exactly one of the two
    return steps_of_epochs(config.train.epochs, train_images, config.train.global_batch)


@dataclass(frozen=True)
class Start:
    """Where a job begins: at a checkpoint (with those before it, should it prove broken), or at step 0.

    ``weights_from`` is the checkpoint whose weights alone a new run takes. Of the sample numbers those from
    ``next_sample`` on come next, but for ``left_out``. ``data`` is what the job's checkpoints are to keep of what it is
    trained on, ``token`` names the ownership of the run directory.
    """

    checkpoint: Path | None = None
    step: int = 0
    earlier: tuple[Path, ...] = ()
    weights_from: Path | None = None
    token: str | None = None
    data: DataRecord | None = None
    next_sample: int = 0
    left_out: tuple[Window, ...] = ()

    @property
    def source(self) -> Path | None:
        """The run directory of the checkpoint that the job goes on from or takes its weights of."""
        checkpoint = self.checkpoint or self.weights_from
        return None if checkpoint is None else checkpoint.parent.parent


def resume_point(job: Job) -> Start:
    """Where the job begins; only reads.

    Raises:
        UserError: --resume asks for what is not there or must not be overwritten, or for another model's checkpoint;
            train.init_from does, at a first start.
    """
    return _resume_point(job)[0]


def checked_start(job: Job, steps: int, *, dry: bool = False) -> Start:
    """``resume_point`` with the data held against the checkpoint's, unless nothing is left to do; only reads.

    dry: no checkpoint will be written, so that the data of a new run need no record.

    Raises:
        UserError: as ``resume_point`` does, or the data are others than those of the checkpoint.
    """
    start, stored = _resume_point(job)
    if start.step >= steps or (dry and stored is None):
        return start
    return replace(start, data=data_record(stored, job.config, job.train_set, job.val_set))


def _resume_point(job: Job) -> tuple[Start, StoredCheckpoint | None]:
    if job.resume in ("auto", "never"):
        found = open_checkpoint(job.run_dir)
        if job.resume == "never" and found is not None:
            raise UserError(
                f"--resume: never, but '{job.run_dir}' holds {found.stored.path.name}; choose another --run_dir, or "
                "--resume auto"
            )
    else:
        found = open_checkpoint(job.run_dir, job.resume)
        if found is None:
            raise UserError(f"--resume: '{job.resume}' has no checkpoint; give one, or --resume auto")
        own = checkpoint_root(job.run_dir)
        if found.stored.path.resolve().parent != own.resolve() and has_checkpoints(job.run_dir):
            raise UserError(
                f"--resume: '{job.resume}' is of another run, but '{job.run_dir}' has checkpoints of its own; choose "
                "another --run_dir, or --resume auto to go on with these"
            )
    if found is None:
        left_out = joined(job.config.train.skip_samples)
        return Start(weights_from=check_weights_start(job.config), left_out=left_out), None
    stored = found.stored
    stored.check_same_model(job.config)
    left_out = samples_left_out(stored, job.config)
    step, upto = stored.position.step, stored.next_sample
    return Start(stored.path, step, found.earlier, next_sample=upto, left_out=left_out), stored
