"""``TrainingRun``: the parts of one run, built once and passed to the loop and its callbacks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megadit.checkpoint.format import Position
from megadit.checkpoint.write import save_checkpoint
from megadit.config import RunConfig
from megadit.data import BatchLayout, ImageSet, describe
from megadit.data.codecs.codec import build_codec
from megadit.data.conditions import Conditions, build_conditions, trained_null_caption
from megadit.data.features.targets import TargetFeatures
from megadit.data.windows import Window, merge_windows, windows_before
from megadit.diffusion import build_objective
from megadit.engine.engine import TrainingEngine
from megadit.engine.float8 import check_float8, describe_float8
from megadit.engine.kernels import adds_across_blocks, check_kernels, describe_kernels, select_kernels
from megadit.engine.loss import TrainingLoss
from megadit.engine.optimizer import check_implementation
from megadit.engine.pipeline import PipelineTrainingEngine
from megadit.engine.schedule import Schedule
from megadit.engine.tf32 import describe_tf32, set_tf32
from megadit.errors import say
from megadit.models import build_model
from megadit.models.chunk import ModelChunk, build_chunk
from megadit.models.float8 import set_float8
from megadit.models.stages import StagedModel
from megadit.mup.table import rows
from megadit.parallel import ProcessContext
from megadit.parallel.topology import ProcessGroups, Topology, balanced_cuts
from megadit.plan.flops import stage_flops
from megadit.train.divergence import TrainingDiverged
from megadit.train.prepare import StartPoint, TrainingJob
from megadit.train.resume import DataRecord, restore, samples_left_out, start_from_weights
from megadit.train.run_dir import RunDirectory


@dataclass
class TrainingRun:
    """One run. ``position`` and ``saved_step`` (of the newest checkpoint of this start) advance; all else is fixed.

    data: the record of the training data for checkpoints, or None.
    """

    config: RunConfig
    context: ProcessContext
    engine: TrainingEngine
    train_set: ImageSet
    val_set: ImageSet
    layout: BatchLayout
    directory: RunDirectory
    total_steps: int
    position: Position
    data: DataRecord | None = None
    saved_step: int | None = None

    def save(self) -> Path:
        """Write a checkpoint of the current position (all ranks must call).

        Raises:
            OwnershipLost: another process has taken the run directory over.
            TrainingDiverged: a weight, moment or average is not finite, as after an update of a huge learning rate.
            UserError: it cannot be written.
        """
        nonfinite = self.engine.partitions.nonfinite_parameters([self.engine.ema.tensors])
        names = sorted({name for names in self.context.gather_objects(nonfinite) for name in names})
        if names:
            raise TrainingDiverged(
                f"step {self.position.step} cannot be saved: values of {len(names)} parameters are not finite, of "
                f"{names[0]} among them; earlier checkpoints stay"
            )
        if self.context.is_main:
            self.directory.flush_metrics()  # after a crash there is a row for every step that the checkpoint holds
        until = self.layout.next_number(self.position.step)
        samples = {"next": until, "left_out": [list(window) for window in windows_before(self.layout.left_out, until)]}
        path = save_checkpoint(
            self.directory.path,
            self.engine.partitions,
            self.config,
            self.position,
            self.engine.optimizer.table,
            self.context,
            [self.engine.ema],
            self.directory.ownership,
            {**({} if self.data is None else self.data.state()), "samples": samples},
        )
        self.saved_step = self.position.step
        return path


def build_run(
    job: TrainingJob, context: ProcessContext, directory: RunDirectory, total_steps: int, start: StartPoint
) -> TrainingRun:
    """Build the parts of a job on this rank, and bring them to ``start`` (all ranks must call).

    Raises:
        UserError: files of an encoder or a checkpoint are broken or do not fit this run; a fused kernel does not work.
    """
    config = job.config
    check_kernels(config.kernels, context.device.type)
    if context.device.type == "cuda":
        check_implementation(config.optim.implementation, context.device)
    select_kernels(config.kernels)
    set_tf32(config.train, context.device.type)
    check_float8(config, context.device)
    topology = Topology(
        context.world_size, context.rank, config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence
    )
    groups = ProcessGroups(topology) if topology.data < topology.world else None  # else every rank has the whole model
    codec = build_codec(config.data.vae, context.device, job.train_set.stored)
    conditions = _build_conditions(job, start, context)
    model = _build_model(config, groups, context.device.type)
    float8_layers = set_float8(model, config.train.fp8) if config.train.precision == "fp8" else 0
    if context.is_main:
        recompute, precision = config.train.activation_checkpointing, config.train.precision
        say(describe_kernels(config.kernels, context.device.type, recompute, precision))
        if (tf32 := describe_tf32(config.train, context.device.type)) is not None:
            say(tf32)
        if float8_layers:
            say(describe_float8(config, float8_layers, context.device))
        _write_description(job, directory, topology)
        conditions.write(directory.path)
    computes_loss = not isinstance(model, ModelChunk) or model.is_last
    loss = TrainingLoss(
        build_objective(config.objective, learn_sigma=config.model.learn_sigma, null=conditions.null),
        codec,
        conditions,
        config.train.seed,
        context.device,
        _build_features(config, context) if computes_loss else None,
        config.objective.repa_weight,
    )
    schedule = Schedule.from_config(config.optim, total_steps)
    engine: TrainingEngine
    if isinstance(model, ModelChunk):
        assert groups is not None  # a chunk is one of a group
        engine = PipelineTrainingEngine(model, loss, config, schedule, job.ds_config, context, groups)
    else:
        engine = TrainingEngine(model, loss, config, schedule, job.ds_config, context, groups)
    position, data, left_out = _restore(job, start, engine, directory, context, total_steps)
    return TrainingRun(
        config=config,
        context=context,
        engine=engine,
        train_set=job.train_set,
        val_set=job.val_set,
        layout=BatchLayout(config.train.global_batch, topology.data, topology.data_rank, job.micro_batch, left_out),
        directory=directory,
        total_steps=total_steps,
        position=position,
        data=data,
    )


def _build_conditions(job: TrainingJob, start: StartPoint, context: ProcessContext) -> Conditions:
    null, note = trained_null_caption(job.config, start.source)
    if note and context.is_main:
        print(f"note: {note}", file=sys.stderr)
    return build_conditions(job.config, job.train_set, job.val_set, context.device, null=null)


def _build_model(config: RunConfig, groups: ProcessGroups | None, device: str) -> StagedModel | ModelChunk:
    """This rank's part of the model, initialised, with recomputation and compilation set."""
    seed, recompute = config.train.seed, config.train.activation_checkpointing
    across_blocks = adds_across_blocks(config.kernels, device, recompute)
    layout = None if groups is None else groups.tensor_layout
    if groups is None or groups.topology.pipeline == 1:
        model = build_model(config.model, layout, seed)
        model.recompute, model.residual_across_blocks = recompute, across_blocks
        if config.train.compile:
            model.compile_blocks()
        return model
    cuts = balanced_cuts(stage_flops(config.model), groups.topology.pipeline)
    chunk = build_chunk(config.model, cuts, groups.topology.pipeline_rank, layout, seed)
    chunk.model.recompute, chunk.model.residual_across_blocks = recompute, across_blocks
    if config.train.compile:
        chunk.compile_blocks()
    return chunk


def _write_description(job: TrainingJob, directory: RunDirectory, topology: Topology) -> None:
    """Write configuration, muP table and layout into the run directory."""
    table = rows(build_model(job.config.model, device="meta"), job.config.optim)
    layout = {
        "ranks": topology.world,
        "tensor": topology.tensor,
        "pipeline": topology.pipeline,
        "zero_stage": job.config.parallel.zero_stage,
        "micro_batch": job.micro_batch,
    }
    facts = describe(job.train_set)
    directory.describe(job.config, job.ds_config, table, job.train_set.classes, facts.notice, layout)


def _build_features(config: RunConfig, context: ProcessContext) -> TargetFeatures | None:
    """The targets of the REPA loss, on the model's grid of tokens; None without REPA."""
    if not config.objective.repa_weight:
        return None
    assert config.data.features is not None  # the configuration holds the two together
    return TargetFeatures(config.data.features, config.model.input_size // config.model.patch_size, context.device)


def _restore(
    job: TrainingJob,
    start: StartPoint,
    engine: TrainingEngine,
    directory: RunDirectory,
    context: ProcessContext,
    total_steps: int,
) -> tuple[Position, DataRecord | None, tuple[Window, ...]]:
    """Load a checkpoint, or its weights alone, into the engine; returns position, data record and skipped samples."""
    config = job.config
    if start.checkpoint is not None:
        paths = (start.checkpoint, *start.earlier)
        stored, data = restore(directory, paths, engine, config, context, start.data, job.train_set, total_steps)
        return stored.position, data, samples_left_out(stored, config)
    if start.weights_from is not None:
        start_from_weights(start.weights_from, engine, config, context)
    return Position(), start.data, merge_windows(config.train.skip_samples)
