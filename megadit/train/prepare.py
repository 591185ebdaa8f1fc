"""A training job: its checks, and its start point (a checkpoint, the weights of one, or step 0).

What can be refused without torch is refused before it is imported; so this module's own imports are light, and the
functions import what is heavy.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.checkpoint.names import check_checkpoint_path, checkpoint_root, has_checkpoints
from megadit.config import DataConfig, LoadedConfig, RunConfig
from megadit.config.deepspeed.file import offloads_optimizer
from megadit.config.deepspeed.merge import MergedConfig, merge_ds_config
from megadit.config.schema.sampling import check_sampling
from megadit.data.prerequisites import check_prerequisites
from megadit.data.windows import Window, merge_windows
from megadit.engine.deepspeed.check import check_ds_config
from megadit.engine.schedule import Schedule, steps_of_epochs
from megadit.errors import UserError
from megadit.parallel.environment import is_local_main

if TYPE_CHECKING:
    from megadit.checkpoint.read import StoredCheckpoint
    from megadit.data import ImageSet
    from megadit.train.resume import DataRecord

    Datasets = Callable[[DataConfig, int], tuple[ImageSet, ImageSet]]  # sets to train on and held out


@dataclass(frozen=True)
class TrainingJob:
    """A resolved config, DeepSpeed's dict, the run directory, ``--resume``, and the data."""

    config: RunConfig
    ds_config: dict[str, Any]
    run_dir: Path
    resume: str
    train_set: ImageSet
    val_set: ImageSet

    @property
    def micro_batch(self) -> int:
        """Images per rank in one forward pass."""
        return int(self.ds_config["train_micro_batch_size_per_gpu"])


def total_steps(config: RunConfig, train_images: int) -> int:
    """Optimizer steps of the run, from ``train.steps`` or ``train.epochs``."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None  # the config holds exactly one of the two
    return steps_of_epochs(config.train.epochs, train_images, config.train.global_batch)


def run_folder(config: str | None, run_dir: str | None) -> Path:
    """``--run_dir``, or ``runs/`` and the config's name."""
    return Path(run_dir) if run_dir else Path("runs") / (Path(config).stem if config else "quickstart")


def check_job(
    loaded: LoadedConfig,
    ds_config: str | None,
    folder: Path,
    resume: str,
    datasets: Datasets | None = None,
    *,
    dry: bool = False,
) -> TrainingJob:
    """Check a loaded configuration in the environment that ``prepare_environment`` completed, and return its job.

    ``datasets`` replaces ``build_datasets`` (a process that trains many jobs keeps their data).
    ``dry``: no training follows.

    Raises:
        UserError: anything in configuration, layout or data that cannot work.
    """
    merged = resolve_config(loaded, ds_config, int(os.environ["WORLD_SIZE"]))
    check_local_files(merged.config, folder, resume)
    check_ds_config(merged.ds_config, dry=dry)
    return check_data(merged, folder, resume, datasets)


def resolve_config(loaded: LoadedConfig, ds_config: str | None, world_size: int) -> MergedConfig:
    """The configuration merged with DeepSpeed's for ``world_size`` ranks; all that needs no data is checked.

    Raises:
        UserError: anything in configuration or layout that cannot work.
    """
    merged = merge_ds_config(loaded, ds_config, world_size)
    for warning in merged.warnings:
        if is_local_main():
            print(f"warning: {warning}", file=sys.stderr)
    check_sampling(merged.config)
    if merged.config.train.steps is not None:
        _check_schedule(merged.config, merged.config.train.steps)
    return merged


def _check_schedule(config: RunConfig, steps: int) -> None:
    warning = Schedule.from_config(config.optim, steps).warning
    if warning and is_local_main():
        print(f"warning: {warning}", file=sys.stderr)


def check_local_files(config: RunConfig, folder: Path, resume: str) -> None:
    """Check that the files named by the configuration and ``--resume`` exist on this machine.

    Raises:
        UserError: data, a network or a checkpoint is missing.
    """
    check_prerequisites(config)
    if resume not in ("auto", "never"):
        check_checkpoint_path(resume, "--resume")
    elif config.train.init_from is not None and not has_checkpoints(folder):
        check_checkpoint_path(config.train.init_from, "train.init_from")


def check_data(merged: MergedConfig, folder: Path, resume: str, datasets: Datasets | None = None) -> TrainingJob:
    """Load the data of a resolved configuration, check them against the model, and return the job.

    Raises:
        UserError: data are missing or do not fit the model.
    """
    from megadit.data import build_datasets, check_against_model, describe
    from megadit.data.checks import check_codec, missing_decoder_note, with_stored_codec
    from megadit.data.conditions import check_text
    from megadit.data.dataset import print_remarks
    from megadit.data.features.targets import check_features
    from megadit.data.shards.tar_set import cut_before_crop

    train_set, val_set = (datasets or build_datasets)(merged.config.data, merged.config.model.num_classes)
    print_remarks(train_set)
    facts = describe(train_set)
    check_against_model(facts, merged.config)
    check_codec(facts, merged.config)
    check_features(merged.config, train_set)
    check_text(merged.config, train_set, val_set, begun=resume != "never" and has_checkpoints(folder))
    if merged.config.train.steps is None:
        _check_schedule(merged.config, total_steps(merged.config, len(train_set)))
    for note in (missing_decoder_note(facts, merged.config), cut_before_crop(merged.config.data)):
        if note and is_local_main():
            print(f"note: {note}", file=sys.stderr)
    return TrainingJob(with_stored_codec(facts, merged.config), merged.ds_config, folder, resume, train_set, val_set)


def check_requirements(job: TrainingJob) -> None:
    """Check that this machine has what the configuration needs.

    Raises:
        UserError: fp16, transformer-engine, a fused kernel or a GPU optimizer without a GPU, a CPU optimizer on a
            GPU's weights, wandb not installed, a micro batch beyond the memory.
    """
    import torch

    from megadit.engine.float8 import check_float8
    from megadit.engine.kernels import check_kernels
    from megadit.engine.optimizer import check_implementation, resolve_implementation
    from megadit.parallel.compilation import check_compiler

    config = job.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.train.precision == "fp16" and device.type != "cuda":
        raise UserError("train.precision: fp16 needs a GPU and there is none here; use bf16 or fp32")
    resolve_implementation(config.optim.implementation, device)
    if device.type != "cuda":  # else when each rank has its own device, since a kernel is launched on it
        check_kernels(config.kernels, device.type)
        check_implementation(config.optim.implementation, device)
        check_float8(config, device)
    if config.train.compile:
        check_compiler(device)
    offloads = offloads_optimizer(job.ds_config["zero_optimization"])
    if config.optim.implementation == "deepspeed-cpu" and device.type == "cuda" and not offloads:
        raise UserError(
            "optim.implementation: deepspeed-cpu steps on the CPU, but the weights are on the GPU; set "
            "zero_optimization.offload_optimizer in a --ds_config, or use auto"
        )
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "train.wandb: true, but wandb is not installed; pip install 'megadit[tracking]' or set it to false"
        )
    _check_micro_batch(job)


def _check_micro_batch(job: TrainingJob) -> None:
    """Refuse a micro batch whose images alone, in float32, are more than this machine's memory."""
    config, micro = job.config, job.micro_batch
    needed = 4 * micro * config.model.in_channels * config.model.input_size**2
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        accumulated = config.train.global_batch > micro
        key = f"train.micro_batch: {micro}" if accumulated else f"train.global_batch: {config.train.global_batch}"
        raise UserError(
            f"{key} makes micro batches of {micro} images, {needed / 1e9:,.0f} GB, more than the "
            f"{memory / 1e9:,.0f} GB of this machine; set a smaller train.micro_batch"
        )


@dataclass(frozen=True)
class StartPoint:
    """Where a job begins: at a checkpoint, or at step 0.

    checkpoint, step: what it resumes from; None and 0 for a new run.
    earlier: older checkpoints, for the case that ``checkpoint`` turns out to be broken.
    weights_from: the checkpoint that a new run takes its weights from.
    token: identifies the ownership of the run directory.
    data: the record of the training data, for the job's checkpoints.
    next_sample, left_out: the first sample number to train on, and the windows of numbers to skip.
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
        """The run directory of the checkpoint that the job resumes from or takes its weights from."""
        checkpoint = self.checkpoint or self.weights_from
        return None if checkpoint is None else checkpoint.parent.parent


def checked_start_point(job: TrainingJob, steps: int, *, dry: bool = False) -> StartPoint:
    """``find_start_point``, and a comparison of the data with the checkpoint's unless training is complete; only reads.

    dry: no checkpoint will be written, so the data of a new run are not recorded.

    Raises:
        UserError: as ``find_start_point`` does, or the data differ from those of the checkpoint.
    """
    start, stored = find_start_point(job)
    if start.step >= steps or (dry and stored is None):
        return start
    from megadit.data.identity import identify
    from megadit.train.resume import DataRecord, check_data_against

    record = DataRecord(identify(job.config, job.train_set, job.val_set))
    if stored is not None:
        record = check_data_against(stored, record, job.config, job.train_set)
    return replace(start, data=record)


def find_start_point(job: TrainingJob) -> tuple[StartPoint, StoredCheckpoint | None]:
    """The start point of the job, and the checkpoint it resumes from, if any; only reads.

    Raises:
        UserError: --resume asks for what is not there or must not be overwritten, or for another model's checkpoint;
            train.init_from does, at a first start.
    """
    from megadit.checkpoint.compatibility import check_same_model
    from megadit.checkpoint.find import open_checkpoint
    from megadit.train.resume import check_weights_start, samples_left_out

    if job.resume in ("auto", "never"):
        opened = open_checkpoint(job.run_dir)
        if job.resume == "never" and opened is not None:
            raise UserError(
                f"--resume: never, but '{job.run_dir}' holds {opened.stored.path.name}; choose another --run_dir, or "
                "--resume auto"
            )
    else:
        opened = open_checkpoint(job.run_dir, job.resume)
        if opened is None:
            raise UserError(f"--resume: '{job.resume}' has no checkpoint; give one, or --resume auto")
        own_root = checkpoint_root(job.run_dir)
        if opened.stored.path.resolve().parent != own_root.resolve() and has_checkpoints(job.run_dir):
            raise UserError(
                f"--resume: '{job.resume}' is of another run, but '{job.run_dir}' has checkpoints of its own; choose "
                "another --run_dir, or --resume auto to go on with these"
            )
    if opened is None:
        left_out = merge_windows(job.config.train.skip_samples)
        return StartPoint(weights_from=check_weights_start(job.config), left_out=left_out), None
    stored = opened.stored
    check_same_model(stored, job.config)
    left_out = samples_left_out(stored, job.config)
    step, next_sample = stored.position.step, stored.next_sample
    return StartPoint(stored.path, step, opened.earlier, next_sample=next_sample, left_out=left_out), stored
