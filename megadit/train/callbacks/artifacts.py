"""Callbacks for validation, sample grids, checkpoints, curves and the summary."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from megadit.config.schema.run import ONLINE
from megadit.errors import say, warn_on_failure
from megadit.models import count_parameters
from megadit.train.callbacks.base import Callback, Record, due
from megadit.train.run_dir import write_json
from megadit.train.validation import validation_losses

if TYPE_CHECKING:
    from megadit.train.run import TrainingRun


class Validation(Callback):
    """The fixed-noise validation loss, every ``train.validate_every`` steps and at the end."""

    def on_step(self, run: TrainingRun) -> Record | None:
        """Return ``val_loss`` (and ``val_repa``), and ``val_loss_ema/NAME`` of averages, when due."""
        if not due(run.position.step, run.config.train.validate_every, run.total_steps):
            return None
        addition: Record = {}
        for name in run.config.train.validate_with:
            for what, loss in validation_losses(run, name).items():
                addition[f"val_{what}" if name == ONLINE else f"val_{what}_ema/{name}"] = loss
        return addition


class Samples(Callback):
    """A grid of pictures from fixed noise, every ``train.sample_every`` steps and at the end."""

    def after_log(self, run: TrainingRun) -> None:
        """Draw when due, unless stored latents came without the codec that makes pictures of them.

        The pictures are divided among the ranks. It comes after the checkpoint, so that a failure does not cost that.
        """
        if run.engine.loss.codec.decodes and due(run.position.step, run.config.train.sample_every, run.total_steps):
            from megadit.train.pictures import draw_samples

            draw_samples(run)


class Checkpoints(Callback):
    """A checkpoint every ``train.checkpoint_every`` steps and at the end."""

    def after_log(self, run: TrainingRun) -> None:
        """Save when due, after the metrics of the step are written."""
        if due(run.position.step, run.config.train.checkpoint_every, run.total_steps):
            run.save()


class Summary(Callback):
    """``curves.png`` and ``summary.json`` at the end, and a few lines with losses and paths."""

    def __init__(self) -> None:
        self._begin = 0.0

    def on_start(self, run: TrainingRun) -> None:
        """Start the clock."""
        self._begin = time.monotonic()

    def on_end(self, run: TrainingRun) -> None:
        """Write the two files and print the summary."""
        if not run.context.is_main:
            return
        rows = run.directory.read_metrics()
        if not rows:
            return
        seconds = time.monotonic() - self._begin
        vals = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
        summary = {
            "steps": run.position.step,
            "samples_seen": run.position.samples_seen,
            "first_loss": rows[0]["loss"],
            "final_loss": rows[-1]["loss"],
            "val_loss": vals[-1] if vals else None,
            "images_per_s": rows[-1]["images_per_s"],
            "seconds": round(seconds, 1),
            "parameters": count_parameters(run.config.model, fixed=False),
        }
        with warn_on_failure("summary.json"):
            write_json(run.directory.path / "summary.json", summary)
        with warn_on_failure("drawing curves.png"):
            from megadit.train.pictures import draw_curves

            draw_curves(rows, run.directory.curves)
        grids = sorted(run.directory.samples.glob("step-*.png"))
        val = f", validation {summary['val_loss']:.4f}" if vals else ""
        lines = [
            "",
            f"trained to step {run.position.step} of {run.total_steps} in {seconds:.0f} s",
            f"  loss       {summary['first_loss']:.4f} → {summary['final_loss']:.4f}{val}",
            *([f"  samples    {grids[-1]}"] if grids else []),
            f"  curves     {run.directory.curves}   (tensorboard --logdir {run.directory.path})",
            f"  checkpoint {run.directory.path / 'checkpoints'}",
        ]
        say("\n".join(lines), sys.stdout)
