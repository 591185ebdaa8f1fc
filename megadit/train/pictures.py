"""Pictures of a run: sample grids from fixed noise, and the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megadit.diffusion.sampling.pictures import (
    Subjects,
    class_subjects,
    sample_pictures,
    save_subject_grid,
    text_subjects,
)

if TYPE_CHECKING:
    from megadit.train.run import TrainingRun


def draw_samples(run: TrainingRun) -> Path | None:
    """Draw ``sample.count`` pictures, from ``sample.weights``, into ``samples/step-XXXXXXXX.png``.

    Returns the path on rank 0 and None elsewhere.

    Pictures are divided among the data-parallel ranks, the same number for each (ZeRO-3 gathers parameters in every
    forward pass, so no rank may make fewer). Picture i does not depend on the number of ranks.
    """
    context, count = run.context, run.config.sample.count
    replicas = run.layout.ranks  # the ranks of one replica draw the same pictures together
    padded = -(-count // replicas) * replicas
    numbers = [min(number, count - 1) for number in range(run.layout.rank, padded, replicas)]
    subjects = run_subjects(run)
    with run.engine.sampling_model(run.config.sample.weights) as model:
        drawn = sample_pictures(
            model, run.config, run.engine.loss.codec, subjects=subjects, numbers=numbers, device=context.device
        )
    parts = context.gather_objects((numbers, drawn))
    if not context.is_main:
        return None
    pictures = torch.empty(count, *drawn.shape[1:], dtype=drawn.dtype)
    for part_numbers, part in parts:
        pictures[part_numbers] = part
    path = run.directory.grid(run.position.step)
    return save_subject_grid(pictures, subjects, path, notice=run.train_set.notice)


def run_subjects(run: TrainingRun) -> Subjects:
    """The subjects of a run's pictures: its classes, or its prompts (by default held-out captions)."""
    conditions = run.engine.loss.conditions
    if conditions.prompts is None:
        return class_subjects(run.config, run.train_set.classes)
    return text_subjects(run.config, conditions.prompts.texts, conditions.prompts.cond, conditions.null)


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss (with validation), loss by timestep bin, gradient norm and learning rates over steps, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (loss, bins), (norm, rate) = axes
    loss.plot(steps, [row["loss"] for row in rows], label="training", lw=1)
    for key in sorted({key for row in rows for key in row if key.startswith("val_loss")}):
        vals = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if vals:
            name = key.removeprefix("val_loss").removeprefix("_").replace("/", " ")
            label = f"validation (fixed noise{name and ', '}{name})"
            loss.plot(*zip(*vals, strict=True), "o-", ms=3, label=label)
    loss.legend()
    loss.set(title="loss", yscale="log")
    latest = [value if value is not None else float("nan") for value in rows[-1]["loss_bins"]]
    first = [value if value is not None else float("nan") for value in rows[min(1, len(rows) - 1)]["loss_bins"]]
    width = 1 / len(latest)
    centres = [(i + 0.5) * width for i in range(len(latest))]
    bins.bar(centres, first, width * 0.9, alpha=0.3, label=f"step {rows[min(1, len(rows) - 1)]['step']}")
    bins.bar(centres, latest, width * 0.9, alpha=0.8, label=f"step {steps[-1]}")
    bins.set(title="loss by timestep (0: clean, 1: noise)", yscale="log")
    bins.legend()
    norms = [(row["step"], row["grad_norm"]) for row in rows if row["grad_norm"] is not None]
    if norms:
        norm.plot(*zip(*norms, strict=True), lw=1)
    norm.set(title="gradient norm (global, before clipping)", yscale="log", xlabel="step")
    for name in rows[-1]["lr_groups"]:
        rate.plot(steps, [row["lr_groups"][name] for row in rows], label=name, lw=1)
    rate.set(title="learning rate by group", yscale="log", xlabel="step")
    rate.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
