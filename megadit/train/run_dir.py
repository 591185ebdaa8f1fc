"""A run directory: everything that a run wrote, and all that is needed to understand and resume it.

``config.yaml`` (resolved), ``ds_config.json``, ``mup.json`` (one row per parameter), ``environment.json``
(versions, command, layout), ``classes.json``, ``metrics.jsonl``, ``tensorboard/``, ``samples/``,
``curves.png``, ``summary.json``, ``changes.jsonl`` (what was not as before where the run went on),
``diverged.json`` (losses and gradients that were not finite), ``checkpoints/`` and ``exit.json`` (how the run ended:
scripts read this, since torchrun hides exit codes). ``owner.json`` lies there as long as a run writes into it.
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
    """Write JSON so that a reader sees the old file or the whole new one, whoever else writes it."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# What a run writes into its folder, and what people keep under the same names.
_OWN = (
    *("config.yaml", "ds_config.json", "mup.json", "environment.json", "classes.json", "metrics.jsonl"),
    *("summary.json", "curves.png", "DATA-NOTICE.txt"),
)


def refuse_foreign(folder: Path) -> None:
    """Whether a run may write into ``folder``, which is known for a run's by its resolved ``config.yaml``.

    Raises:
        UserError: it is no run's, and holds a file that a run would replace: a configuration that somebody wrote, or
            the DeepSpeed file beside it; or it is where another run keeps its checkpoints, or one of these.
    """
    if is_resolved(folder / "config.yaml") or (folder / "checkpoints").is_dir():
        return
    place = Path(os.path.abspath(folder))
    root = next((path for path in (place, place.parent) if path.name == "checkpoints"), None)
    if root is not None and is_resolved(root.parent / "config.yaml"):
        raise UserError(
            f"--run_dir: '{folder}' is among the checkpoints of run '{root.parent}'; name that run's folder to go on "
            "with it, or choose another folder"
        )
    found = next((name for name in _OWN if (folder / name).exists()), None)
    if found is not None:
        raise UserError(
            f"--run_dir: '{folder / found}' was not written by a run and would be replaced; choose another folder"
        )


class RunDirectory:
    """Paths and small files of one run; only rank 0 writes. Leaving its ``with`` block gives the directory back.

    ``ownership`` is rank 0's, None before it owns the directory; ``token`` is every rank's, by which it knows whether
    the run still owns it.
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
        """On rank 0, before files change that a run after this one may be writing.

        Raises:
            OwnershipLost: another process has taken the directory over.
        """
        if self.ownership is not None:
            self.ownership.check()

    def grid(self, step: int) -> Path:
        """The sample grid drawn after ``step``."""
        return self.samples / f"step-{step:08d}.png"

    def create(self) -> None:
        """Make the folder, try to write into it, and take away the record of how an earlier start ended.

        Raises:
            UserError: it cannot be made or written, naming the reason.
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
        """Write what the run is, before its first step."""
        save_config(config, self.path / "config.yaml")
        write_json(self.path / "ds_config.json", ds_config)
        write_json(self.path / "mup.json", {"parameters": mup_rows})
        if classes:
            write_json(self.path / "classes.json", list(classes))
        if notice:
            (self.path / "DATA-NOTICE.txt").write_text(replace_surrogates(notice) + "\n", encoding="utf-8")
        write_json(self.path / "environment.json", {**_environment(), **layout})

    def wandb_id(self) -> str:
        """The run's id at Weights & Biases, kept in ``wandb.json``, so that a resumed run goes on in the same one.

        At first WANDB_RUN_ID, or the id of a run that began before the file was kept, or a new one.
        """
        file = self.path / "wandb.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = parse_json(file.read_bytes())["id"]
            if isinstance(stored, str) and stored:
                return stored
        latest = self.path / "wandb" / "latest-run"  # a link to run-DATE_TIME-ID
        earlier = latest.resolve().name.split("-", 2) if latest.is_symlink() else []
        own = earlier[2] if len(earlier) == 3 else secrets.token_hex(4)
        name = os.environ.get("WANDB_RUN_ID") or own
        write_json(file, {"id": name})
        return name

    def record_changes(self, step: int, checkpoint: Path, data: Sequence[str], notes: Sequence[str]) -> None:
        """Add a line to ``changes.jsonl``: what is not as the checkpoint had it that the run goes on from, if anything.

        data: changes of the data that ``data.on_change`` accepted.  notes: what else people were told.
        """
        if not data and not notes:
            return
        line = {"step": step, "time": time.strftime("%FT%T%z"), "checkpoint": str(checkpoint)}
        with open(self.changes, "a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "data": list(data), "notes": list(notes)}) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drop metric lines beyond ``step``: a resumed run writes them again, without a seam."""
        if not self.metrics.is_file():
            return
        found = read_rows(self.metrics)
        kept = [line for row, line in zip(found.rows, found.lines, strict=True) if row["step"] <= step]
        if found.broken:
            say(
                f"warning: '{self.metrics}' has {len(found.broken)} lines that are no rows of metrics, first line "
                f"{found.broken[0]}; they are left out"
            )
        with atomic_write(self.metrics) as temporary, open(temporary, "wb") as file:
            file.write(b"".join(line + b"\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())

    def flush_metrics(self) -> None:
        """Bring the metrics written so far to the disk."""
        if self.metrics.is_file():
            with open(self.metrics, "rb") as file:
                os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metric rows so far; lines that are none are passed over."""
        return read_rows(self.metrics).rows

    def write_exit(self, code: int, reason: str, step: int) -> None:
        """Record how the run ended (rank 0, or the rank that failed); a directory that is another's is left alone."""
        if is_owned_by_other(self.path, self.token):
            return
        ended = {"code": code, "reason": reason, "step": step, "time": time.strftime("%FT%T%z")}
        write_json(self.path / "exit.json", ended)

    def write_refusal(self, reason: str, step: int) -> None:
        """Record that a start was refused, where an earlier one left a record or a run: that record is of the past.

        ``step`` is where the next start goes on. A directory that a living process owns keeps its record.
        Never raises OSError: the refusal itself is what the caller tells.
        """
        with contextlib.suppress(OSError):
            if self._has_record():
                self.write_exit(EXIT_BAD_INPUT, reason, step)

    def write_no_rendezvous(self, reason: str, step: int) -> None:
        """Record that not all ranks came, over the record of an earlier start. Never raises OSError."""
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_exit(EXIT_FAILURE, reason, step)

    def write_preempted(self, step: int, *, make: bool) -> None:
        """Record that a signal ended the run before its first step; ``make``: in a new folder, too.

        Never raises OSError: a script that reads the record sees its absence.
        """
        with contextlib.suppress(OSError):
            if make:
                self.path.mkdir(parents=True, exist_ok=True)
            if make or self._has_record():
                self.write_exit(EXIT_PREEMPTED, "preempted", step)

    def recorded_since(self, when: float) -> bool:
        """Whether the record of an end is newer than ``when`` (``time.time()``)."""
        with contextlib.suppress(OSError):
            return (self.path / "exit.json").stat().st_mtime > when
        return False

    def _has_record(self) -> bool:
        return is_resolved(self.path / "config.yaml") or (self.path / "exit.json").is_file()

    def write_failure(self, code: int, reason: str, step: int) -> None:
        """Record a failure, unless the rank that failed first has; a folder that takes no file keeps the old record.

        Never raises OSError: the failure itself is what the caller is about to tell.
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
    """rows: those that are such, each with a whole ``step``.  lines: the bytes of each.  broken: numbers of the others.

    ``torn``: the last line is not whole, as a killed run leaves it, or one that is still writing; it is not among
    ``broken``.
    """

    rows: list[dict[str, Any]]
    lines: list[bytes]
    broken: tuple[int, ...]
    torn: bool


def read_rows(file: Path) -> MetricRows:
    """The rows of a file; none where there is no file. Raises OSError where it cannot be read."""
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return MetricRows([], [], (), False)
    rows, whole, broken = [], [], []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
            whole.append(line)
        elif line.strip():
            broken.append(number)
    torn = bool(broken) and not any(line.strip() for line in lines[broken[-1] :])
    return MetricRows(rows, whole, tuple(broken[:-1] if torn else broken), torn)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float holds; the metrics have null for one that was not finite."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line.decode("utf-8", "replace"))
    except JsonError:
        return None
    whole = isinstance(row, dict) and all(_is_whole(row.get(key, 0)) for key in ("step", "samples_seen"))
    if not whole or "step" not in row:
        return None
    losses = (key for key in row if key == "val_loss" or (key.startswith("loss") and key != "loss_bins"))
    return row if all(row[key] is None or is_number(row[key]) for key in losses) else None


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT
