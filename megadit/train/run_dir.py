"""A run directory: all files of a run, enough to understand and resume it.

``config.yaml`` (resolved), ``ds_config.json``, ``mup.json`` (one row per parameter), ``environment.json``
(versions, command, layout), ``classes.json``, ``metrics.jsonl``, ``tensorboard/``, ``samples/``,
``curves.png``, ``summary.json``, ``changes.jsonl`` (what had changed at each resume),
``diverged.json`` (losses and gradients that were not finite), ``checkpoints/`` and ``exit.json`` (how the run ended:
scripts read this, since torchrun hides exit codes). ``owner.json`` is there while a run writes into it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megadit import __version__
from megadit.config import RunConfig, save_config
from megadit.config.loading.sources import is_resolved
from megadit.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_PREEMPTED, UserError, say
from megadit.files.json_text import JsonError, parse_json
from megadit.files.ownership import Ownership, is_owned_by_other
from megadit.files.paths import atomic_write
from megadit.files.text import replace_surrogates
from megadit.plugins import loaded_plugins

_LARGEST_COUNT = 2**63 - 1  # of steps and samples in a row of metrics


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# Files that a run writes into its folder; people have files of the same names.
_RUN_FILES = (
    *("config.yaml", "ds_config.json", "mup.json", "environment.json", "classes.json", "metrics.jsonl"),
    *("summary.json", "curves.png", "DATA-NOTICE.txt"),
)


def refuse_foreign(folder: Path) -> None:
    """Check that a run may write into ``folder``; a run's own is recognised by its resolved ``config.yaml``.

    Raises:
        UserError: it is no run directory and holds a file that a run would replace, such as a configuration; or it is
            inside another run's checkpoints.
    """
    if is_resolved(folder / "config.yaml") or (folder / "checkpoints").is_dir():
        return
    absolute = Path(os.path.abspath(folder))
    root = next((path for path in (absolute, absolute.parent) if path.name == "checkpoints"), None)
    if root is not None and is_resolved(root.parent / "config.yaml"):
        raise UserError(
            f"--run_dir: '{folder}' is among the checkpoints of run '{root.parent}'; name that run's folder to go on "
            "with it, or choose another folder"
        )
    occupied = next((name for name in _RUN_FILES if (folder / name).exists()), None)
    if occupied is not None:
        raise UserError(
            f"--run_dir: '{folder / occupied}' was not written by a run and would be replaced; choose another folder"
        )


class RunDirectory:
    """Paths and small files of one run; only rank 0 writes. Leaving its ``with`` block releases the directory.

    ownership: rank 0's, None before it owns the directory.
    token: on every rank, to check whether the run still owns it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ownership: Ownership | None = None
        self.token: str | None = None
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.tensorboard = path / "tensorboard"
        self.curves = path / "curves.png"
        self.changes = path / "changes.jsonl"

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ownership is not None:
            self.ownership.release()

    def check_ownership(self) -> None:
        """Check on rank 0, before files are changed, that no other run has taken the directory over.

        Raises:
            OwnershipLost: another process has taken the directory over.
        """
        if self.ownership is not None:
            self.ownership.check()

    def grid(self, step: int) -> Path:
        """Path of the sample grid drawn after ``step``."""
        return self.samples / f"step-{step:08d}.png"

    def create(self) -> None:
        """Create the folder, test that it is writable, and delete ``exit.json`` of an earlier start.

        Raises:
            UserError: it cannot be created or written, with the reason.
        """
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-test"
            probe.write_text("", encoding="utf-8")
            probe.unlink()
            (self.path / "exit.json").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"--run_dir: '{self.path}' cannot be written ({error.strerror or error}); choose a writable one"
            ) from error

    def describe(
        self,
        config: RunConfig,
        ds_config: dict[str, Any],
        mup_rows: list[dict[str, Any]],
        classes: tuple[str, ...],
        notice: str,
        layout: dict[str, Any],
    ) -> None:
        """Write configuration, muP table, classes and environment, before the first step."""
        save_config(config, self.path / "config.yaml")
        write_json(self.path / "ds_config.json", ds_config)
        write_json(self.path / "mup.json", {"parameters": mup_rows})
        if classes:
            write_json(self.path / "classes.json", list(classes))
        if notice:
            (self.path / "DATA-NOTICE.txt").write_text(replace_surrogates(notice) + "\n", encoding="utf-8")
        write_json(self.path / "environment.json", {**_environment(), **layout})

    def wandb_id(self) -> str:
        """The run's id at Weights & Biases, stored in ``wandb.json`` so that a resumed run continues the same one.

        A first start takes WANDB_RUN_ID, or the id in ``wandb/latest-run``, or a new one.
        """
        file = self.path / "wandb.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = parse_json(file.read_bytes())["id"]
            if isinstance(stored, str) and stored:
                return stored
        latest = self.path / "wandb" / "latest-run"  # a link to run-DATE_TIME-ID
        parts = latest.resolve().name.split("-", 2) if latest.is_symlink() else []
        run_id = os.environ.get("WANDB_RUN_ID") or (parts[2] if len(parts) == 3 else secrets.token_hex(4))
        write_json(file, {"id": run_id})
        return run_id

    def record_changes(self, step: int, checkpoint: Path, data: Sequence[str], notes: Sequence[str]) -> None:
        """Append what has changed since ``checkpoint``, from which the run resumes, to ``changes.jsonl``; if anything.

        data: accepted changes of the data.  notes: all other notes that were printed.
        """
        if not data and not notes:
            return
        line = {"step": step, "time": time.strftime("%FT%T%z"), "checkpoint": str(checkpoint)}
        with open(self.changes, "a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "data": list(data), "notes": list(notes)}) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drop metric rows beyond ``step``: a resumed run writes them again."""
        if not self.metrics.is_file():
            return
        metrics = read_rows(self.metrics)
        lines = [line for row, line in zip(metrics.rows, metrics.lines, strict=True) if row["step"] <= step]
        if metrics.broken:
            say(
                f"warning: '{self.metrics}' has {len(metrics.broken)} lines that are no rows of metrics, first line "
                f"{metrics.broken[0]}; they are left out"
            )
        with atomic_write(self.metrics) as temporary, open(temporary, "wb") as file:
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def flush_metrics(self) -> None:
        """Flush the metrics written so far to the disk (fsync)."""
        if self.metrics.is_file():
            with open(self.metrics, "rb") as file:
                os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metric rows so far, without broken lines."""
        return read_rows(self.metrics).rows

    def write_exit(self, code: int, reason: str, step: int) -> None:
        """Write ``exit.json`` (rank 0, or the rank that failed), unless another run owns the directory."""
        if is_owned_by_other(self.path, self.token):
            return
        record = {"code": code, "reason": reason, "step": step, "time": time.strftime("%FT%T%z")}
        write_json(self.path / "exit.json", record)

    def write_refusal(self, reason: str, step: int) -> None:
        """Record that a start was refused, over the ``exit.json`` of an earlier one; in no other folder.

        ``step`` is where the next start resumes. A directory that a live process owns keeps its record.
        Never raises OSError: the caller reports the refusal itself.
        """
        with contextlib.suppress(OSError):
            if self._has_record():
                self.write_exit(EXIT_BAD_INPUT, reason, step)

    def write_no_rendezvous(self, reason: str, step: int) -> None:
        """Record that ranks were missing, over the ``exit.json`` of an earlier start. Never raises OSError."""
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_exit(EXIT_FAILURE, reason, step)

    def write_preempted(self, step: int, *, make: bool) -> None:
        """Record that a signal ended the run before its first step; ``make``: in a new folder, too.

        Never raises OSError.
        """
        with contextlib.suppress(OSError):
            if make:
                self.path.mkdir(parents=True, exist_ok=True)
            if make or self._has_record():
                self.write_exit(EXIT_PREEMPTED, "preempted", step)

    def recorded_since(self, when: float) -> bool:
        """Whether ``exit.json`` is newer than ``when`` (``time.time()``)."""
        with contextlib.suppress(OSError):
            return (self.path / "exit.json").stat().st_mtime > when
        return False

    def _has_record(self) -> bool:
        return is_resolved(self.path / "config.yaml") or (self.path / "exit.json").is_file()

    def write_failure(self, code: int, reason: str, step: int) -> None:
        """Record a failure, unless the rank that failed first has done so.

        Never raises OSError: the caller reports the failure itself.
        """
        if self.path.is_dir() and not (self.path / "exit.json").exists():
            with contextlib.suppress(OSError):
                self.write_exit(code, reason, step)


def _environment() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.argv,
        "megadit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "plugins": list(map(asdict, loaded_plugins())),
        "device": cuda or platform.processor() or platform.machine(),
        "started": time.strftime("%FT%T%z"),
    }


@dataclass(frozen=True)
class MetricRows:
    """The valid rows of ``metrics.jsonl``, each with an integer ``step``, and their bytes.

    broken: numbers of the other lines, without a torn last one, which a killed run leaves, or one that still writes.
    """

    rows: list[dict[str, Any]]
    lines: list[bytes]
    broken: tuple[int, ...]


def read_rows(file: Path) -> MetricRows:
    """The rows of a file; none where there is no file. Raises OSError where it cannot be read."""
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return MetricRows([], [], ())
    rows, valid, broken = [], [], []
    for number, line in enumerate(lines, 1):
        row = _parse_row(line)
        if row is not None:
            rows.append(row)
            valid.append(line)
        elif line.strip():
            broken.append(number)
    torn = bool(broken) and not any(line.strip() for line in lines[broken[-1] :])
    return MetricRows(rows, valid, tuple(broken[:-1] if torn else broken))


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number in the range of a float; the metrics have null for one that was not finite."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line.decode("utf-8", "replace"))
    except JsonError:
        return None
    counted = isinstance(row, dict) and all(_is_count(row.get(key, 0)) for key in ("step", "samples_seen"))
    if not counted or "step" not in row:
        return None
    losses = (key for key in row if key == "val_loss" or (key.startswith("loss") and key != "loss_bins"))
    return row if all(row[key] is None or is_number(row[key]) for key in losses) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT
