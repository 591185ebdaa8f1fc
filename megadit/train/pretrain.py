"""One pretraining run from a resolved configuration to its last checkpoint.

Everything that can be refused is refused before the model is built: configuration, layout, data, run
directory and checkpoint are checked first, in this order.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.config import RunConfig
from megadit.data import BatchLayout, BatchStream, ImageSet, describe
from megadit.data.latents import build_codec
from megadit.diffusion import build_objective
from megadit.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, UserError
from megadit.models import build_model
from megadit.mup.table import rows
from megadit.parallel import ProcessContext, start_processes, stop_processes
from megadit.train.callbacks import default_callbacks
from megadit.train.checkpoint import Position, StoredCheckpoint, find_checkpoint
from megadit.train.engine import TrainingEngine
from megadit.train.loop import TrainingDiverged, fit
from megadit.train.run import TrainingRun
from megadit.train.run_dir import RunDirectory
from megadit.train.schedule import Schedule


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
    return max(1, math.ceil(config.train.epochs * train_images / config.train.global_batch))


def pretrain(job: Job) -> int:
    """Run the job in this process, one of WORLD_SIZE; returns the exit code.

    Raises:
        UserError: bad input, found before any step or (a broken image) while reading.
    """
    steps = total_steps(job.config, len(job.train_set))
    context = start_processes()
    directory = RunDirectory(job.run_dir)
    step = 0
    try:
        checkpoint = context.on_main(lambda: _prepare_directory(directory, job))
        run = assemble(job, context, directory, steps, checkpoint)
        step = run.position.step
        if step >= steps:
            if context.is_main:
                print(
                    f"{job.run_dir}: already trained to step {step} of {steps}; raise train.steps, "
                    "or choose another --run_dir",
                    file=sys.stderr,
                )
            return EXIT_OK
        code, reason = _train(run)
        step = run.position.step
    except BaseException as error:
        code = EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
        directory.write_exit(code, f"{type(error).__name__}: {error}", step)
        raise
    if context.is_main:
        directory.write_exit(code, reason, step)
    stop_processes()
    return code


def _prepare_directory(directory: RunDirectory, job: Job) -> Path | None:
    """On rank 0: the checkpoint to resume from, if any, and a writable run directory."""
    found = find_checkpoint(directory.path)
    if job.resume == "never" and found is not None:
        raise UserError(
            f"--resume: never, but '{directory.path}' holds {found.name}; choose another --run_dir, or --resume auto"
        )
    if job.resume not in ("auto", "never"):
        found = find_checkpoint(directory.path, job.resume)
        if found is None:
            raise UserError(f"--resume: '{job.resume}' has no checkpoint; give one, or --resume auto")
    if found is not None:
        StoredCheckpoint(found).check_same_model(job.config)
    directory.create()
    return found


def assemble(
    job: Job,
    context: ProcessContext,
    directory: RunDirectory,
    steps: int,
    checkpoint: Path | None,
) -> TrainingRun:
    """Model, engine, objective and data as one ``TrainingRun``, restored from ``checkpoint`` if given."""
    config = job.config
    micro = int(job.ds_config["train_micro_batch_size_per_gpu"])
    schedule = Schedule.from_config(config.optim, steps)
    codec = build_codec(config.data.vae, context.device)
    objective = build_objective(
        config.objective, learn_sigma=config.model.learn_sigma, num_classes=config.model.num_classes
    )
    model = build_model(config.model, seed=config.train.seed)
    if context.is_main:
        facts = describe(job.train_set)
        table = rows(model, config.optim)
        spread = {"ranks": context.world_size, "zero_stage": config.parallel.zero_stage, "micro_batch": micro}
        directory.describe(config, job.ds_config, table, job.train_set.classes, facts.notice, spread)
    engine = TrainingEngine(model, config.optim, schedule, job.ds_config, context)
    position = Position()
    if checkpoint is not None:
        stored = StoredCheckpoint(checkpoint)
        stored.restore(engine.partitions)
        position = stored.position
        engine.restored(position.step)
        if context.is_main:
            print(f"resuming from {checkpoint} at step {position.step}", file=sys.stderr)
            _tell_group_changes(stored.state["groups"], engine.optimizer.table)
    layout = BatchLayout(config.train.global_batch, context.world_size, context.rank, micro)
    return TrainingRun(
        config, context, engine, objective, codec, job.train_set, job.val_set, layout, directory, steps, position
    )


def _tell_group_changes(stored: list[dict[str, Any]], present: list[dict[str, Any]]) -> None:
    """Groups always follow the config; say so where that differs from what the checkpoint had."""
    before = {row["name"]: row for row in stored}
    for row in present:
        old = before.get(row["name"], {})
        for key in ("lr_mult", "wd_mult", "eps_mult"):
            if old.get(key) != row[key]:
                print(
                    f"note: group {row['name']} has {key} {row[key]:g} from the config (checkpoint: {old.get(key)})",
                    file=sys.stderr,
                )


def _train(run: TrainingRun) -> tuple[int, str]:
    data, train = run.config.data, run.config.train
    stream = BatchStream(
        run.train_set, run.layout, train.seed, flip=data.flip, workers=data.workers, start_step=run.position.step
    )
    try:
        complete = fit(run, stream, default_callbacks())
    except TrainingDiverged as error:
        if run.context.is_main:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE, f"diverged: {error}"
    finally:
        stream.close()
    if complete:
        return EXIT_OK, "complete"
    if run.context.is_main:
        print(f"preempted: saved step {run.position.step}; start the same command again to go on", file=sys.stderr)
    return EXIT_PREEMPTED, "preempted"
