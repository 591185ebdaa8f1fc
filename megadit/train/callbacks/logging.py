"""Callbacks that log the metrics: progress bar, ``metrics.jsonl``, TensorBoard and wandb."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import IO, TYPE_CHECKING, Any

from megadit.errors import UserError, say
from megadit.files.json_text import null_nonfinite
from megadit.files.text import has_lone_surrogate
from megadit.train.callbacks.base import Callback, Record, due

if TYPE_CHECKING:
    from megadit.train.run import TrainingRun


_SLOW_DATA = 0.01  # fraction of a step's time spent waiting for data, above which it is shown


class RecordCallback(Callback):
    """Logs the record of the step at which a run diverged like any other."""

    def on_divergence(self, run: TrainingRun, record: Record) -> None:
        """Log the record."""
        self.on_log(run, record)


class ProgressBar(RecordCallback):
    """A bar with loss, learning rate, images/s, ETA and waiting for data; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._begin = 0.0
        self._first = 0

    def on_start(self, run: TrainingRun) -> None:
        """Open the bar at the resumed step."""
        if not run.context.is_main:
            return
        self._begin, self._first = time.monotonic(), run.position.step
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=run.total_steps, initial=run.position.step, unit="step", dynamic_ncols=True)

    def on_step(self, run: TrainingRun) -> Record | None:
        """Advance the bar."""
        if self._bar is not None:
            with _ignore_closed_terminal():
                self._bar.update(1)
        return None

    def on_log(self, run: TrainingRun, record: Record) -> None:
        """Show the record's main numbers."""
        if not run.context.is_main:
            return
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['images_per_s']:.0f} img/s"
        text += data_wait_text(record)
        if "val_loss" in record:
            text += f"  val {record['val_loss']:.4f}"
        if self._bar is not None:
            with _ignore_closed_terminal():
                self._bar.set_postfix_str(text)
            return
        done = max(1, record["step"] - self._first)
        left = (time.monotonic() - self._begin) / done * (run.total_steps - record["step"])
        minutes, seconds = divmod(int(left), 60)
        say(f"step {record['step']}/{run.total_steps}  {text}  ETA {minutes}:{seconds:02d}")

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            with _ignore_closed_terminal():
                self._bar.close()


def _ignore_closed_terminal() -> contextlib.AbstractContextManager[None]:
    """Ignore a terminal that is gone: a progress bar must not fail the run."""
    return contextlib.suppress(OSError, ValueError)


def data_wait_text(record: Record) -> str:
    """``  data wait 3.2%  step 0.412 s`` where steps waited for data for more than 1% of their time, else nothing."""
    share = record["data_wait_s"] / record["step_s"]
    return f"  data wait {share:.1%}  step {record['step_s']:.3f} s" if share > _SLOW_DATA else ""


class JsonLines(RecordCallback):
    """``metrics.jsonl``: one object per logged step, flushed as it is written."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def on_start(self, run: TrainingRun) -> None:
        """Drop rows beyond the resumed step and append from there."""
        if run.context.is_main:
            run.directory.truncate_metrics(run.position.step)
            self._file = open(run.directory.metrics, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def on_log(self, run: TrainingRun, record: Record) -> None:
        """Append the record."""
        if self._file is not None:
            self._file.write(json.dumps(null_nonfinite(record), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def scalars(record: Record) -> dict[str, float]:
    """A record flattened for curve viewers: ``train/loss``, ``lr/hidden``, ``loss_bin/3``, ``val/loss_ema/0.999``, …"""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if key == "lr_groups":
            flat |= {f"lr/{name}": rate for name, rate in value.items()}
        elif key == "grad_norms":
            flat |= {f"grad_norm/{role}": norm for role, norm in (value or {}).items()}
        elif key == "loss_bins":
            flat |= {f"loss_bin/{i}": loss for i, loss in enumerate(value) if loss is not None}
        elif key.startswith("val_"):
            flat[key.replace("_", "/", 1)] = value
        elif key not in ("step", "events") and value is not None:
            flat[f"train/{key}"] = value
    return flat


class TensorBoard(RecordCallback):
    """Scalars and sample grids under ``tensorboard/``."""

    def __init__(self) -> None:
        self._writer: Any = None

    def on_start(self, run: TrainingRun) -> None:
        """Open the event file; entries beyond a resumed step are purged by the viewer."""
        if run.context.is_main and run.config.train.tensorboard:
            folder = str(run.directory.tensorboard)
            if has_lone_surrogate(folder):
                say(f"warning: train.tensorboard: TensorBoard cannot write into {folder}, whose name is not UTF-8")
                return
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=run.position.step + 1)

    def on_log(self, run: TrainingRun, record: Record) -> None:
        """Write the record's scalars."""
        if self._writer is not None:
            for name, value in scalars(record).items():
                self._writer.add_scalar(name, value, record["step"])

    def after_log(self, run: TrainingRun) -> None:
        """Add the grid that was drawn after this step, if one was."""
        step = run.position.step
        if self._writer is None or not due(step, run.config.train.sample_every, run.total_steps):
            return
        grid = run.directory.grid(step)
        if not grid.is_file():  # a run may go without pictures
            return
        import numpy as np

        from megadit.data.image_files import decode

        try:
            picture = np.asarray(decode(grid, str(grid), key="train.tensorboard", longest=None))
        except UserError as error:  # a grid of very many pictures, or one that was changed since
            say(f"warning: {error}")
            return
        self._writer.add_image("samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()


class Wandb(RecordCallback):
    """The same scalars to Weights & Biases, if ``train.wandb`` is set; a resumed run continues its own."""

    def __init__(self) -> None:
        self._run: Any = None

    def on_start(self, run: TrainingRun) -> None:
        """Start the wandb run; its folder lies in the run directory."""
        if not (run.context.is_main and run.config.train.wandb):
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "train.wandb: true, but wandb is not installed; pip install 'megadit[tracking]' or set it to false"
            ) from error
        self._run = wandb.init(
            project="megadit",
            id=run.directory.wandb_id(),
            name=run.directory.path.name,
            dir=str(run.directory.path),
            config=run.config.model_dump(mode="json"),
            resume="allow",
        )

    def on_log(self, run: TrainingRun, record: Record) -> None:
        """Send the record."""
        if self._run is not None:
            self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        """Finish the wandb run."""
        if self._run is not None:
            self._run.finish()
