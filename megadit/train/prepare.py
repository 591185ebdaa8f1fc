"""What ``launch/pretrain.py`` does between its arguments and the training: check everything, report, or train.

What can be refused without torch is refused before it is imported, and DeepSpeed is imported to train alone; so this
module's own imports are light, and the functions import what is heavy.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadit.checkpoint.names import check_named, has_checkpoints, saved_step
from megadit.config import DataConfig, LoadedConfig, RunConfig, load
from megadit.config.deepspeed.merge import MergedConfig, merge_ds_config
from megadit.config.deepspeed.offload import offloads_optimizer
from megadit.config.schema.sampling import check_sampling
from megadit.data.places import check_places
from megadit.engine.deepspeed.check import check_ds_config
from megadit.engine.schedule import Schedule
from megadit.errors import EXIT_BAD_INPUT, EXIT_FAILURE, UserError
from megadit.files.ownership import refuse_occupied
from megadit.files.paths import check_folder
from megadit.parallel import prepare_environment
from megadit.parallel.environment import is_local_main
from megadit.parallel.last_words import explain_timeout, of_another_rank, summary, tell_launcher
from megadit.parallel.lifetime import die_with_launcher
from megadit.parallel.rendezvous import RendezvousFailed
from megadit.streams import result_is_saved
from megadit.train.run_dir import RunDirectory, refuse_foreign

if TYPE_CHECKING:
    from megadit.data import ImageSet
    from megadit.train.start import Job

_ONE_START_S = 60.0  # within which ranks that meet the same error are those of one start


def run(
    config: str | None,
    overrides: Sequence[str],
    ds_config: str | None,
    run_dir: str | None,
    resume: str,
    dry: bool,
    *,
    world_size: int | None = None,
    as_json: bool = False,
    full: bool = False,
) -> int:
    """What the arguments of ``launch/pretrain.py`` ask for; returns the exit code.

    Raises:
        UserError: refused, on the rank that tells it for its host.
    """
    for option, given in (("--world_size", world_size is not None), ("--json", as_json), ("--full", full)):
        if given and not dry:
            raise UserError(f"{option}: belongs to --dry_run; add that, or leave it out")
    if full and as_json:
        raise UserError(
            "--full: is for the printed table, and --json prints the layout alone; leave one of the two out"
        )
    folder = run_folder(config, run_dir)
    _enter(folder, dry)
    if world_size is not None:
        if world_size < 1:
            raise UserError(f"--world_size: {world_size} is no number of ranks; give 1 or more")
        from megadit.train.dry_run import dry_run_elsewhere

        loaded = load(config, overrides)
        return dry_run_elsewhere(loaded, ds_config, folder, resume, world_size, as_json=as_json, full=full)
    try:
        check_folder(folder, "--run_dir")
        refuse_foreign(folder)
        if not dry and os.environ["WORLD_SIZE"] == "1":  # of several ranks only some may see the owner's process
            refuse_occupied(folder, "--run_dir")
        job = check_job(load(config, overrides), ds_config, folder, resume, dry=dry)
        if dry:
            from megadit.train.dry_run import dry_run

            return dry_run(job, as_json=as_json, full=full)
        check_machine(job)
    except UserError as error:
        directory = RunDirectory(folder)
        # One of the ranks alone may meet it; thousands that do write it once or a few times.
        if not dry and (os.environ["RANK"] == "0" or not directory.recorded_since(time.time() - _ONE_START_S)):
            directory.write_refusal(str(error), saved_step(directory.path))
        tell_launcher(f"error: {error}")
        if is_local_main():
            raise
        return EXIT_BAD_INPUT  # the host's other ranks met the same error; one tells it
    return train(job)


def _enter(folder: Path, dry: bool) -> None:
    """Find this process's place among the launcher's, tie its life to it, and say what one process leaves unused.

    Raises:
        UserError: the launcher's variables are none; told on every rank, since which is the first one is not known.
    """
    try:
        ranks = prepare_environment()
    except UserError as error:
        if not dry:
            RunDirectory(folder).write_refusal(str(error), saved_step(folder))
        tell_launcher(f"error: {error}")
        raise
    die_with_launcher(ranks)
    if ranks.note:
        print(f"note: {ranks.note}", file=sys.stderr)


def run_folder(config: str | None, run_dir: str | None) -> Path:
    """``--run_dir``, or ``runs/`` and the config's name."""
    return Path(run_dir) if run_dir else Path("runs") / (Path(config).stem if config else "quickstart")


def check_job(
    loaded: LoadedConfig,
    ds_config: str | None,
    folder: Path,
    resume: str,
    datasets: Callable[[DataConfig, int], tuple[ImageSet, ImageSet]] | None = None,
    *,
    dry: bool = False,
) -> Job:
    """The job of a loaded configuration, checked, in the environment that ``prepare_environment`` completed.

    ``datasets`` takes the place of ``build_datasets`` (a process that trains many jobs keeps their data).
    ``dry``: it will not train.

    Raises:
        UserError: anything in configuration, layout or data that cannot work.
    """
    merged = resolve(loaded, ds_config, int(os.environ["WORLD_SIZE"]))
    check_here(merged.config, folder, resume)
    check_ds_config(merged.ds_config, dry=dry)
    return check_data(merged, folder, resume, datasets)


def resolve(loaded: LoadedConfig, ds_config: str | None, world_size: int) -> MergedConfig:
    """The configuration and DeepSpeed's dict for ``world_size`` ranks, checked as far as no data are needed.

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


def check_here(config: RunConfig, folder: Path, resume: str) -> None:
    """Whether what configuration and ``--resume`` name is on this machine, as far as names tell it.

    Raises:
        UserError: data, a network or a checkpoint is missing.
    """
    check_places(config)
    if resume not in ("auto", "never"):
        check_named(resume, "--resume")
    elif config.train.init_from is not None and not has_checkpoints(folder):
        check_named(config.train.init_from, "train.init_from")


def check_data(
    merged: MergedConfig,
    folder: Path,
    resume: str,
    datasets: Callable[[DataConfig, int], tuple[ImageSet, ImageSet]] | None = None,
) -> Job:
    """The job of a resolved configuration, with its data.

    Raises:
        UserError: data are missing, or are none for this model.
    """
    from megadit.data import build_datasets, check_against_model, describe
    from megadit.data.checks import check_codec, draws_no_pictures, with_stored_codec
    from megadit.data.conditions import check_text
    from megadit.data.dataset import tell_remarks
    from megadit.data.features import check_features
    from megadit.data.sources.webdataset import cut_before_crop
    from megadit.train.start import Job, total_steps

    train_set, val_set = (datasets or build_datasets)(merged.config.data, merged.config.model.num_classes)
    tell_remarks(train_set)
    facts = describe(train_set)
    check_against_model(facts, merged.config)
    check_codec(facts, merged.config)
    check_features(merged.config, train_set)
    check_text(merged.config, train_set, val_set, begun=resume != "never" and has_checkpoints(folder))
    if merged.config.train.steps is None:
        _check_schedule(merged.config, total_steps(merged.config, len(train_set)))
    for note in (draws_no_pictures(facts, merged.config), cut_before_crop(merged.config.data)):
        if note and is_local_main():
            print(f"note: {note}", file=sys.stderr)
    return Job(with_stored_codec(facts, merged.config), merged.ds_config, folder, resume, train_set, val_set)


def check_machine(job: Job) -> None:
    """Whether this machine can do what the configuration asks.

    Raises:
        UserError: fp16 or a GPU optimizer without a GPU, a CPU optimizer on a GPU's weights, wandb not installed, a
            micro batch beyond the memory.
    """
    import torch

    from megadit.engine.optimizer import resolve_implementation
    from megadit.parallel.compilation import check_compiler

    config = job.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.train.precision == "fp16" and device.type != "cuda":
        raise UserError("train.precision: fp16 needs a GPU and there is none here; use bf16 or fp32")
    resolve_implementation(config.optim.implementation, device)
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


def _check_micro_batch(job: Job) -> None:
    """Refuse a micro batch whose images alone, in float32, are more than this machine's memory."""
    config, micro = job.config, int(job.ds_config["train_micro_batch_size_per_gpu"])
    needed = 4 * micro * config.model.in_channels * config.model.input_size**2
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        accumulated = config.train.global_batch > micro
        key = f"train.micro_batch: {micro}" if accumulated else f"train.global_batch: {config.train.global_batch}"
        raise UserError(
            f"{key} makes micro batches of {micro} images, {needed / 1e9:,.0f} GB, more than the {there / 1e9:,.0f} GB "
            "of this machine; set a smaller train.micro_batch"
        )


def train(job: Job) -> int:
    """Train; an error that only this rank met is told with its rank, and that of another rank in one line."""
    from megadit.train.pretrain import pretrain

    result_is_saved()
    rank = os.environ["RANK"]
    try:
        return pretrain(job)
    except UserError as error:
        tell_launcher(f"error: {error}")
        where = "" if os.environ["WORLD_SIZE"] == "1" or error.everywhere else f"[rank {rank}] "
        if not error.everywhere or rank == "0":
            print(f"error: {where}{error}", file=sys.stderr, flush=True)
        return error.code
    except RendezvousFailed as error:
        tell_launcher(f"error: {error}")
        if is_local_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    except Exception as error:
        told = of_another_rank(error)
        if told is None:
            explain_timeout(error, job.config.parallel.timeout_s)
            tell_launcher(summary(error))
            raise
        print(f"[rank {rank}] {told}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
