"""One pretraining run from a resolved configuration to its last checkpoint.

Everything that can be refused is refused before the model is built: configuration, layout, data, run
directory and checkpoint are checked first, in this order.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megadit.checkpoint.format import Position, cannot_write
from megadit.checkpoint.names import saved_step
from megadit.config import RunConfig
from megadit.data import BatchLayout, BatchStream, ImageSet, check_images, describe
from megadit.data.codecs.codec import build_codec
from megadit.data.conditions import build_conditions, kept_null
from megadit.data.features import TargetFeatures
from megadit.data.windows import joined
from megadit.diffusion import build_objective
from megadit.engine.engine import TrainingEngine
from megadit.engine.pipeline import PipelineTrainingEngine
from megadit.engine.schedule import Schedule
from megadit.errors import EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, UserError, harmless, say
from megadit.files.ownership import Claim, Occupied, OwnershipLost
from megadit.files.paths import check_folder
from megadit.models import build_model
from megadit.models.chunk import ModelChunk, build_chunk
from megadit.models.stages import StagedModel
from megadit.mup.spec import param_specs
from megadit.mup.table import rows
from megadit.optional import defer_compiler
from megadit.parallel import ProcessContext, start_processes, stop_processes
from megadit.parallel.agreement import check_agreement, flat
from megadit.parallel.balance import balanced_cuts
from megadit.parallel.compilation import compile_blocks
from megadit.parallel.last_words import explain_timeout, of_another_rank
from megadit.parallel.rendezvous import RendezvousFailed
from megadit.parallel.topology import Groups, Topology
from megadit.plan.flops import stage_flops
from megadit.train.callbacks import Callback, RunStopped, default_callbacks
from megadit.train.divergence import TrainingDiverged, notes_of_earlier_ends, remember
from megadit.train.loop import fit
from megadit.train.preemption import Preempted
from megadit.train.prepare import Job, Start, checked_start, total_steps
from megadit.train.resume import restore, samples_left_out, start_from_weights
from megadit.train.run import TrainingRun
from megadit.train.run_dir import RunDirectory

_PATIENCE_S = 10.0  # of one look at the owner of the run directory
_IMAGE_CHECK_S = 5.0  # for a look at the files before anything is written; what it misses is told when it is read
_checked: weakref.WeakSet[ImageSet] = weakref.WeakSet()  # sets that an earlier job of this process has looked at


def pretrain(job: Job, callbacks: Sequence[Callback] | None = None, *, keep_group: bool = False) -> int:
    """Run the job in this process, one of WORLD_SIZE; returns the exit code.

    ``callbacks`` takes the place of the default ones. With ``keep_group`` the process group stays up for the next
    job of this process.

    The run directory is owned from before the first look at its checkpoints to the end.

    Raises:
        Occupied: a run that lives owns the run directory.
        OwnershipLost: another took it over, since this one was silent for too long.
        UserError: bad input, found before any step or (a broken image) while reading.
    """
    if not job.config.train.compile:
        defer_compiler()
    with RunDirectory(job.run_dir) as directory:
        return _pretrain(job, directory, callbacks, keep_group)


def _pretrain(job: Job, directory: RunDirectory, callbacks: Sequence[Callback] | None, keep_group: bool) -> int:
    steps = total_steps(job.config, len(job.train_set))
    context = _join(job, directory)
    try:
        check_agreement(context, _facts(job))
        start = _begin(context, directory, job, steps)
    except UserError as error:
        if context.is_main:
            directory.write_refusal(str(error), saved_step(job.run_dir))
        raise
    if start.step >= steps:
        if not keep_group:
            with harmless("leaving the process group"):
                stop_processes()
        return EXIT_OK
    run = None
    try:
        run = assemble(job, context, directory, steps, start)
        code, reason = _train(run, default_callbacks() if callbacks is None else callbacks)
        if context.is_main:
            with harmless("exit.json"):
                directory.write_exit(code, reason, run.position.step)
    except Preempted:
        raise
    except BaseException as error:
        told = _full_disk(error, job.run_dir) or error
        code = told.code if isinstance(told, UserError) else EXIT_FAILURE
        step = start.step if run is None else run.position.step
        explain_timeout(told, job.config.parallel.timeout_s)
        said = [f"{type(told).__name__}: {told}", *getattr(told, "__notes__", ())]
        reason = of_another_rank(told) or " ".join(said)
        if not isinstance(told, OwnershipLost):
            directory.write_failure(code, reason, step)
        if told is error:
            raise
        raise told from error
    if not keep_group:
        with harmless("leaving the process group"):
            stop_processes()
    return code


def _join(job: Job, directory: RunDirectory) -> ProcessContext:
    """The process group, once all ranks are there; where they do not meet, a record of why."""
    limits = job.config.parallel
    try:
        return start_processes(limits.timeout_s, limits.rendezvous_timeout_s)
    except UserError as error:
        directory.write_refusal(str(error), saved_step(job.run_dir))
        raise
    except RendezvousFailed as error:  # by every rank that came: the first may be the one that did not
        directory.write_no_rendezvous(str(error), saved_step(job.run_dir))
        raise


def _facts(job: Job) -> dict[str, Any]:
    """What all ranks must have in common: the configuration, and how many samples the data hold for each."""
    found = {**flat(job.config.model_dump(mode="json")), **flat(job.ds_config, "ds_config.")}
    return {**found, "images to train on": len(job.train_set), "images held out": len(job.val_set)}


def _full_disk(error: BaseException, run_dir: Path) -> UserError | None:
    """What to tell where metrics, pictures or other small files of the run found no space; None for other errors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return cannot_write(run_dir, error.strerror or str(error))
    return None


def _begin(context: ProcessContext, directory: RunDirectory, job: Job, steps: int) -> Start:
    """Own the run directory and find where to begin (all ranks must call).

    Raises:
        UserError: the directory is another run's or cannot be written, or as ``resume_point`` does.
    """
    check_folder(job.run_dir, "--run_dir")
    claim = Claim(job.run_dir, "training")
    # The other ranks wait in a collective, which has a time limit, while rank 0 watches a silent owner.
    patience_s = min(_PATIENCE_S, job.config.parallel.timeout_s / 4)
    start: Start | None = None
    while start is None:
        start = context.on_main(lambda: _prepare_directory(claim, directory, job, steps, patience_s))
    directory.token = start.token
    return start


def _prepare_directory(claim: Claim, directory: RunDirectory, job: Job, steps: int, patience_s: float) -> Start | None:
    """On rank 0: where to begin; an owned, writable run directory, unless nothing is left to do.

    None when the owner before must be watched for longer.
    """
    unwritable: UserError | None = None
    try:
        directory.ownership = claim.attempt(patience_s)
        if directory.ownership is None:
            return None
        directory.token = directory.ownership.token
    except Occupied:
        raise
    except UserError as error:  # no obstacle to a run that is complete
        unwritable = error
    start = checked_start(job, steps)
    if start.step >= steps:
        say(
            f"{job.run_dir}: already trained to step {start.step} of {steps}; raise train.steps, "
            "or choose another --run_dir"
        )
        with contextlib.suppress(OSError):  # nothing else is written, so a read-only run directory is no obstacle
            directory.write_exit(EXIT_OK, "complete", start.step)
        return start
    if directory.ownership is None:
        assert unwritable is not None
        raise unwritable
    of_checkpoint = {start.checkpoint.parent.parent} if start.checkpoint is not None else set()
    for note in notes_of_earlier_ends({job.run_dir, *of_checkpoint}, start.next_sample, start.left_out):
        say(f"warning: {note}")
    for images in (job.train_set, job.val_set):
        if images not in _checked:
            check_images(images, seconds=_IMAGE_CHECK_S)
            _checked.add(images)
    directory.create()
    return replace(start, token=directory.token)


def assemble(
    job: Job,
    context: ProcessContext,
    directory: RunDirectory,
    steps: int,
    start: Start,
) -> TrainingRun:
    """Model, engine, objective and data as one ``TrainingRun`` at ``start``."""
    config = job.config
    micro = int(job.ds_config["train_micro_batch_size_per_gpu"])
    schedule = Schedule.from_config(config.optim, steps)
    codec = build_codec(config.data.vae, context.device, job.train_set.stored)
    null, told = kept_null(config, start.source)
    if told and context.is_main:
        print(f"note: {told}", file=sys.stderr)
    conditions = build_conditions(config, job.train_set, job.val_set, context.device, null=null)
    objective = build_objective(config.objective, learn_sigma=config.model.learn_sigma, null=conditions.null)
    place, groups = _places(config, context)
    model = _local_model(config, groups)
    if context.is_main:
        facts = describe(job.train_set)
        table = rows(build_model(config.model, device="meta"), config.optim)
        spread = {
            "ranks": context.world_size,
            "tensor": place.tensor,
            "pipeline": place.pipeline,
            "zero_stage": config.parallel.zero_stage,
            "micro_batch": micro,
        }
        directory.describe(config, job.ds_config, table, job.train_set.classes, facts.notice, spread)
        conditions.write(directory.path)
    engine = _engine(job, model, schedule, context, groups)
    features = _target_features(config, context) if engine.computes_loss else None
    position, data, left_out = Position(), start.data, joined(config.train.skip_samples)
    if start.checkpoint is not None:
        paths = (start.checkpoint, *start.earlier)
        stored, data = restore(directory, paths, engine, config, context, data, job.train_set, steps)
        position, left_out = stored.position, samples_left_out(stored, config)
    elif start.weights_from is not None:
        start_from_weights(start.weights_from, engine, config, context)
    layout = BatchLayout(config.train.global_batch, place.data, place.data_rank, micro, left_out)
    return TrainingRun(
        config=config,
        context=context,
        engine=engine,
        objective=objective,
        codec=codec,
        conditions=conditions,
        train_set=job.train_set,
        val_set=job.val_set,
        layout=layout,
        directory=directory,
        total_steps=steps,
        position=position,
        features=features,
        data=data,
    )


def _places(config: RunConfig, context: ProcessContext) -> tuple[Topology, Groups | None]:
    """Where this rank stands, and the groups of those that share a model; None where every rank has a whole one."""
    parallel = config.parallel
    place = Topology(context.world_size, context.rank, parallel.tensor, parallel.pipeline, parallel.sequence)
    return place, Groups(place) if place.data < place.world else None


def _local_model(config: RunConfig, groups: Groups | None) -> StagedModel | ModelChunk:
    """What this rank holds of the model, initialised, with its ways of running set."""
    seed = config.train.seed
    layout = None if groups is None else groups.tensor_layout
    if groups is None or groups.topology.pipeline == 1:
        model = build_model(config.model, layout, seed)
        model.recompute = config.train.activation_checkpointing
        if config.train.compile:
            compile_blocks(stage for stage in model.stages() if stage.is_block)
        return model
    cuts = balanced_cuts(stage_flops(config.model), groups.topology.pipeline)
    segment = build_chunk(config.model, cuts, groups.topology.pipeline_rank, layout, seed)
    segment.model.recompute = config.train.activation_checkpointing
    return segment


def _engine(
    job: Job, model: StagedModel | ModelChunk, schedule: Schedule, context: ProcessContext, groups: Groups | None
) -> TrainingEngine:
    config = job.config
    if not isinstance(model, ModelChunk):
        return TrainingEngine(model, config.optim, schedule, job.ds_config, context, config.ema, groups)
    assert groups is not None  # a segment is one of a group
    specs = param_specs(build_model(config.model, device="meta"))
    return PipelineTrainingEngine(model, specs, config.optim, schedule, job.ds_config, context, groups, config.ema)


def _target_features(config: RunConfig, context: ProcessContext) -> TargetFeatures | None:
    """The targets of the REPA loss, on the model's grid of tokens; None where nothing asks for them."""
    if not config.objective.repa_weight:
        return None
    assert config.data.features is not None  # the configuration holds the two together
    return TargetFeatures(config.data.features, config.model.input_size // config.model.patch_size, context.device)


def _train(run: TrainingRun, callbacks: Sequence[Callback]) -> tuple[int, str]:
    data, train = run.config.data, run.config.train
    workers = data.workers if run.engine.reads_data else 0  # without them nothing is read before it is asked for
    stream = BatchStream(
        run.train_set,
        run.layout,
        train.seed,
        flip=data.flip,
        workers=workers,
        start_step=run.position.step,
        on_corrupt=data.on_corrupt,
    )
    try:
        complete = fit(run, stream, callbacks)
    except TrainingDiverged as error:
        if run.context.is_main:
            say(f"error: {error}")
            if error.event is not None:
                remember(run.directory.path, error.event)
        return EXIT_FAILURE, f"diverged: {error}"
    except RunStopped as stop:
        return stop.code, stop.reason
    finally:
        with harmless("closing the data"):
            stream.close()
    if complete:
        return EXIT_OK, "complete"
    if run.context.is_main:
        saved = f"saved step {run.position.step} in {run.directory.path / 'checkpoints'}"
        if run.saved_step is None:
            saved = "before the first step: nothing to save"
        say(f"preempted: {saved}; to go on, start the same command with --resume auto")
    return EXIT_PREEMPTED, "preempted"
