"""Small runs for tests: the real parts of a run on digits, and a plain torch loop to hold them against."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megadit.config import LoadedConfig, RunConfig
from megadit.config.deepspeed.merge import merge_ds_config
from megadit.data import BatchLayout, BatchStream, build_datasets
from megadit.engine.schedule import Schedule
from megadit.slices import contiguous_spans

if TYPE_CHECKING:
    from megadit.train.run import TrainingRun

BASE: dict[str, Any] = {
    "model": {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "patch_size": 2,
        "in_channels": 1,
        "input_size": 8,
        "num_classes": 10,
        "learn_sigma": False,
        "parametrization": "mup",
        "base_width": 16,
    },
    "objective": {"kind": "flow"},
    "data": {"name": "digits"},
    "optim": {"lr": 4e-3, "weight_decay": 0.05, "betas": (0.9, 0.99), "clip": {"value": 0.5}, "warmup_steps": 4},
    "train": {"steps": 10, "global_batch": 16, "seed": 3, "log_every": 1, "tensorboard": False, "validation_images": 0},
    "sample": {"count": 4, "steps": 4},
}


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """BASE with keys of whole sections replaced."""
    merged = {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {*BASE, *sections}}
    return RunConfig.model_validate(merged)


def layout_of(config: RunConfig, world: int, ds: dict[str, Any] | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """The config and DeepSpeed dict of ``world`` ranks, as the command makes them of the DeepSpeed file ``ds``."""
    merged = merge_ds_config(LoadedConfig(config), ds, world)
    return merged.config, merged.ds_config


def assemble_rank(
    config: RunConfig, folder: str, checkpoint: str | None = None, ds: dict[str, Any] | None = None
) -> TrainingRun:
    """This rank's part of a run, as the command assembles it, from ``checkpoint`` if given."""
    from megadit.parallel import start_processes
    from megadit.train.prepare import StartPoint, TrainingJob
    from megadit.train.run import build_run
    from megadit.train.run_dir import RunDirectory

    context = start_processes()
    config, ds_config = layout_of(config, context.world_size, ds)
    train_set, val_set = build_datasets(config.data)
    job = TrainingJob(config, ds_config, Path(folder), "auto", train_set, val_set)
    directory = RunDirectory(Path(folder))
    context.on_main(directory.create)
    assert config.train.steps is not None
    start = StartPoint(Path(checkpoint) if checkpoint else None)
    return build_run(job, context, directory, config.train.steps, start)


def train_on(run: TrainingRun, until: int) -> list[dict[str, Any]]:
    """Train to step ``until`` through the library's own step; a record of every step."""
    from megadit.checkpoint.format import Position
    from megadit.train.metrics import Meter

    seed, size = run.config.train.seed, run.config.train.global_batch
    stream = BatchStream(run.train_set, run.layout, seed, flip=False, workers=0, start_step=run.position.step)
    batches, records = iter(stream), []
    while run.position.step < until:
        meter = Meter(run)
        result = run.engine.train_batch(run.position.step, meter.timed(batches), True)
        meter.add(result.losses)
        step = run.position.step + 1
        run.position = Position(step, step * size, run.engine.skipped_steps)
        records.append(meter.record(result.grad_norm) | {"update_status": result.update_status})
    return records


def train_rank(
    config: RunConfig,
    folder: str,
    steps: int | None = None,
    checkpoint: str | None = None,
    ds: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run on one rank through the library; returns losses, norms and this rank's fragments of all that is kept.

    Training starts from ``checkpoint`` if given, stops after ``steps`` and then saves into ``folder``.
    """
    run = assemble_rank(config, folder, checkpoint, ds)
    records = train_on(run, steps or run.total_steps)
    saved = run.save()
    fragments = run.engine.partitions.fragments()
    pieces = [(f.name, f.shape, f.start, f.stop, f.values.detach().clone(), f.shard_regions) for f in fragments]
    averages: dict[str, list[tuple[Any, ...]]] = {}
    for f in fragments:
        for kind, values in {**run.engine.ema.tensors(f), **run.engine.partitions.moments(f)}.items():
            averages.setdefault(kind, []).append((f.name, f.shape, f.start, f.stop, values.clone(), f.shard_regions))
    working = {n: p.detach().float().clone() for n, p in run.engine.module.named_parameters() if p.numel()}
    return {
        "losses": [r["loss"] for r in records],
        "norms": [r["grad_norm"] for r in records],
        "role_norms": [r["grad_norms"] for r in records],
        "lrs": [r["lr_groups"] for r in records],
        "pieces": pieces,
        **averages,
        "working": working,
        "adam_step": run.engine.partitions.adam_step(),
        "loss_scale": run.engine.partitions.loss_scale_state(),
        "skipped": run.position.skipped_steps,
        "saved": str(saved),
    }


def merge_weights(results: list[dict[str, Any]], kind: str = "pieces") -> dict[str, torch.Tensor]:
    """Whole parameters (or averages, ``ema/NAME``) from all ranks' fragments; every element must be covered."""
    whole: dict[str, torch.Tensor] = {}
    for result in results:
        for name, shape, start, stop, values, shard_regions in result[kind]:
            flat = whole.setdefault(name, torch.full((math.prod(shape),), math.nan))
            for span in contiguous_spans(shape, shard_regions, start, stop):
                flat[span.first : span.first + span.length] = values[span.offset : span.offset + span.length]
    for name, flat in whole.items():
        assert not flat.isnan().any(), f"{name} is not covered by the ranks' fragments"
    return whole


def plain_torch_run(config: RunConfig, steps: int) -> dict[str, Any]:
    """The same training written out in plain torch: one process, whole batch, no DeepSpeed, own clipping.

    Returns losses, norms, the last weights and ``path``, the weights before the first step and after each.
    """
    from megadit.data import SampleOrder, make_batch
    from megadit.data.conditions import build_conditions
    from megadit.diffusion import build_objective
    from megadit.models import build_model
    from megadit.mup.groups import param_groups

    train_set, val_set = build_datasets(config.data)
    conditions = build_conditions(config, train_set, val_set)
    seed, size = config.train.seed, config.train.global_batch
    layout, order = BatchLayout(size, 1, 0, size), SampleOrder(len(train_set), seed)
    model = build_model(config.model, seed=seed)
    groups = param_groups(model, config.optim)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, foreach=False)
    schedule = Schedule.from_config(config.optim, config.train.steps or steps)
    objective = build_objective(config.objective, learn_sigma=config.model.learn_sigma, null=conditions.null)
    losses, norms, role_norms = [], [], []
    path = [{name: p.detach().flatten().clone() for name, p in model.named_parameters()}]
    for step in range(steps):
        batch = make_batch(train_set, order, layout.numbers(step, 0), seed=seed, flip=False)
        noisy = objective.prepare(batch.images, conditions.of(batch), batch.numbers, seed)
        loss = objective.loss(model(noisy.x, noisy.t, noisy.cond), noisy).total.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = (
            torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
        )
        role_norms.append(_clip(model, config))
        for group in optimizer.param_groups:
            group["lr"] = schedule.factor(step) * config.optim.lr * group["lr_mult"]
        optimizer.step()
        losses.append(loss.item())
        norms.append(float(norm))
        path.append({name: p.detach().flatten().clone() for name, p in model.named_parameters()})
    return {"losses": losses, "norms": norms, "role_norms": role_norms, "weights": path[-1], "path": path}


def _clip(model: torch.nn.Module, config: RunConfig) -> dict[str, float]:
    """Clip as the config asks, written out; returns each role's norm before."""
    from megadit.mup.spec import param_specs

    specs, clip = param_specs(model), config.optim.clip
    grads: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads.setdefault(specs[name].role, []).append(p.grad)
    norms = {role: math.sqrt(sum(float(g.double().square().sum()) for g in tensors)) for role, tensors in grads.items()}
    for role, tensors in grads.items():
        norm, limit = math.hypot(*norms.values()), clip.value
        if clip.mode == "per_group":
            norm, limit = norms[role], getattr(clip.groups, role) or clip.value
            if limit is not None and role in ("input", "vector", "output"):
                limit /= math.sqrt(config.model.width_mult)
        if limit is not None:
            for grad in tensors:
                grad.mul_(min(1.0, limit / (norm + 1e-6)))
    return norms
