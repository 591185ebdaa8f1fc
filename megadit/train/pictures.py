"""Pictures of a run: the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss (with validation), loss by timestep bin, gradient norm and learning rates over steps, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (loss, bins), (norm, rate) = axes
    loss.plot(steps, [row["loss"] for row in rows], label="training", lw=1)
    vals = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if vals:
        loss.plot(*zip(*vals, strict=True), "o-", ms=3, label="validation (fixed noise)")
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
