"""Checkpoints: named fragments of master weights and Adam moments, an index, and the run's position.

``checkpoints/step-XXXXXXXX/`` holds one safetensors file per writing rank, ``index.json`` (which rank wrote
which index range of which parameter) and ``state.json`` (step, counters, loss scale, group table). All is
written under a temporary name, flushed, renamed, and only then does ``latest`` point to it, so a run that is
killed while it saves keeps the checkpoint before. Nothing in the format depends on the number of ranks or
on the ZeRO stage: a rank reads the ranges that it owns.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from megadit.config import RunConfig, load_config
from megadit.config.run import ONLINE
from megadit.errors import UserError
from megadit.parallel import ProcessContext
from megadit.train.fragment_io import Piece, PieceReader, piece_to_json, write_pieces
from megadit.train.partitions import Fragment, Partitions

FORMAT = "megadit-checkpoint"
VERSION = 1
WEIGHTS = "weights"
EMA = "ema/"  # the kind of the average NAME is ema/NAME
_LAYOUT_KEYS = ("parallel.zero_stage", "train.micro_batch")  # any layout trains the same model


@dataclass(frozen=True)
class Position:
    """Where a run stands: completed optimizer steps, images drawn, updates skipped for overflow."""

    step: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0


def checkpoint_root(run_dir: Path) -> Path:
    """The folder that holds a run's checkpoints and the ``latest`` file."""
    return run_dir / "checkpoints"


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _pieces(partitions: Partitions, fragments: list[Fragment], file: str) -> list[tuple[Piece, Any]]:
    found = []
    for f in fragments:
        found.append((Piece(WEIGHTS, f.name, f.start, f.stop, file), f.values))
        for kind, values in partitions.moments(f).items():
            found.append((Piece(kind, f.name, f.start, f.stop, file), values))
    return found


def save_checkpoint(
    run_dir: Path,
    partitions: Partitions,
    config: RunConfig,
    position: Position,
    groups: list[dict[str, Any]],
    context: ProcessContext,
    keep_last: int,
) -> Path:
    """Write ``step-XXXXXXXX`` from all ranks, point ``latest`` to it, and drop all but the ``keep_last`` up to it.

    ``groups`` is the plain table of optimizer groups (name, lr_mult, wd_mult, …) stored for comparison at
    resume. Every rank must call this. Returns the checkpoint's folder.

    Raises:
        UserError: the disk is full or not writable; the checkpoint before stays in place.
    """
    root = checkpoint_root(run_dir)
    final, temporary = root / f"step-{position.step:08d}", root / f".step-{position.step:08d}.tmp"

    def prepare() -> None:
        for torn in root.glob(".step-*.tmp"):  # left by a run that was killed while it saved
            shutil.rmtree(torn, ignore_errors=True)
        temporary.mkdir(parents=True)

    context.on_main(lambda: _refuse_disk_errors(prepare, final))
    file = f"fragments-{context.rank:05d}.safetensors"
    owned = [] if partitions.replicated and not context.is_main else partitions.fragments()
    pieces = _pieces(partitions, owned, file)
    problem = ""
    try:
        if pieces:
            write_pieces(temporary / file, pieces)
    except OSError as error:
        problem = f"rank {context.rank}: {error.strerror or error}"
    shapes = {f.name: list(f.shape) for f in owned}
    reports = context.gather_objects((problem, [piece_to_json(p) for p, _ in pieces], shapes))

    def publish() -> None:
        problems = [report[0] for report in reports if report[0]]
        if problems:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"{final}: cannot be written ({'; '.join(problems)}); free space or change --run_dir")
        all_shapes = {name: shape for _, _, part in reports for name, shape in part.items()}
        index = {
            "format": FORMAT,
            "version": VERSION,
            "parameters": all_shapes,
            "pieces": [piece for _, part, _ in reports for piece in part],
        }
        state = {
            "step": position.step,
            "samples_seen": position.samples_seen,
            "skipped_steps": position.skipped_steps,
            "adam_step": partitions.adam_step(),
            "loss_scale": partitions.loss_scale_state(),
            "groups": groups,
            "config": config.model_dump(mode="json"),
            "layout": {"ranks": context.world_size, "zero_stage": partitions.stage},
        }
        _refuse_disk_errors(lambda: _commit(temporary, final, index, state), final)
        _drop_old(final, keep_last)

    context.on_main(publish)
    return final


def _refuse_disk_errors(action: Any, target: Path) -> None:
    try:
        action()
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); free space or change --run_dir"
        ) from error


def _commit(temporary: Path, final: Path, index: dict[str, Any], state: dict[str, Any]) -> None:
    _write_text(temporary / "index.json", json.dumps(index))
    _write_text(temporary / "state.json", json.dumps(state, indent=1))
    _flush_folder(temporary)
    replaced = temporary.with_name(f".{final.name}.old.tmp")
    if final.exists():  # of a course that was left by resuming from an earlier step
        os.replace(final, replaced)
    os.replace(temporary, final)
    _flush_folder(final.parent)
    _write_text(final.parent / "latest", final.name + "\n")
    _flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _drop_old(newest: Path, keep_last: int) -> None:
    """Keep ``newest`` and those just before it; what lies beyond it belongs to a course that the run has left."""
    present = sorted(newest.parent.glob("step-*"))
    kept = [path for path in present if path.name <= newest.name][-keep_last:]
    for path in present:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(run_dir: Path, wanted: str = "latest") -> Path | None:
    """The folder that ``latest`` points to, or the one named by a path; None if the run has saved none.

    Raises:
        UserError: the path is no checkpoint, or ``latest`` points to a folder that is not there.
    """
    if wanted != "latest":
        path = Path(wanted)
        if (path / "checkpoints" / "latest").is_file():  # a run directory is accepted for its latest
            return find_checkpoint(path)
        if not (path / "index.json").is_file():
            raise UserError(
                f"--resume: '{wanted}' is no checkpoint; give a folder such as RUN/checkpoints/step-00001000"
            )
        return path
    pointer = checkpoint_root(run_dir) / "latest"
    if not pointer.is_file():
        return None
    target = pointer.parent / pointer.read_text().strip()
    if not (target / "index.json").is_file():
        raise UserError(
            f"{pointer}: points to '{target.name}', which is not complete; write an earlier step's name in it"
        )
    return target


class StoredCheckpoint:
    """An opened checkpoint: its position, its config and its pieces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            index = json.loads((path / "index.json").read_text())
            self.state: dict[str, Any] = json.loads((path / "state.json").read_text())
            self.config = _completed(self.state["config"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"checkpoint {path}: its index cannot be read ({error}); use an earlier one") from error
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise UserError(
                f"checkpoint {path}: format {index.get('format')} version {index.get('version')} is not "
                f"{FORMAT} version {VERSION}; use the megadit that wrote it"
            )
        self.parameters: dict[str, list[int]] = index["parameters"]
        self.pieces = [Piece(**piece) for piece in index["pieces"]]

    @property
    def position(self) -> Position:
        """Where the run stood."""
        return Position(*(int(self.state[key]) for key in ("step", "samples_seen", "skipped_steps")))

    def check_same_model(self, config: RunConfig) -> None:
        """Refuse a checkpoint of another model: what differs is named.

        Raises:
            UserError: naming the differing model keys, or train.seed or train.global_batch.
        """
        here, there = config.model_dump(mode="json"), self.config
        keys = sorted(set(here["model"]) | set(there["model"]))
        different = [k for k in keys if here["model"].get(k) != there["model"].get(k)]
        if different:
            shown = ", ".join(f"model.{k} {there['model'].get(k)} → {here['model'].get(k)}" for k in different[:4])
            raise UserError(
                f"checkpoint {self.path}: is of another model ({shown}); resume with its own config, or give another "
                "--run_dir to start anew"
            )
        for key in ("seed", "global_batch"):
            if here["train"][key] != there["train"][key]:
                raise UserError(
                    f"train.{key}: {here['train'][key]} differs from {there['train'][key]} of checkpoint {self.path}; "
                    "a resumed run keeps it, since the order of images depends on it"
                )

    def changes(self, config: RunConfig) -> list[str]:
        """Every key whose value in ``config`` is not the stored one, as ``key old → new``; layout keys left out."""
        here, there = _flat(config.model_dump(mode="json")), _flat(self.config)
        keys = [key for key in here if key in there and key not in _LAYOUT_KEYS]
        return [f"{key} {there[key]} → {here[key]}" for key in keys if here[key] != there[key]]

    def restore(self, partitions: Partitions) -> None:
        """Fill this rank's master weights and moments, and the model's working weights from them."""
        with PieceReader(self.path, self.pieces) as reader:
            for fragment in partitions.fragments():
                stored = self.parameters.get(fragment.name)
                if stored != list(fragment.shape):
                    raise UserError(
                        f"checkpoint {self.path}: parameter '{fragment.name}' has shape {stored}, the model needs "
                        f"{list(fragment.shape)}"
                    )
                reader.read_into(fragment.values, WEIGHTS, fragment.name, fragment.start)
                for kind, values in partitions.moments(fragment).items():
                    reader.read_into(values, kind, fragment.name, fragment.start)
        partitions.set_adam_step(int(self.state["adam_step"]))
        partitions.load_loss_scale_state(self.state["loss_scale"])
        position = self.position
        partitions.set_counters(position.step, position.samples_seen, position.skipped_steps)
        partitions.publish_masters()

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the stored moving averages of the weights."""
        kinds = {piece.kind for piece in self.pieces if piece.kind.startswith(EMA)}
        return tuple(sorted(kind.removeprefix(EMA) for kind in kinds))

    def load_weights(self, model: nn.Module, weights: str = ONLINE) -> None:
        """Fill a plain (whole, float32) model's parameters with the stored masters, or an average of them.

        Raises:
            UserError: no such average is stored, or the checkpoint is of another model.
        """
        if weights not in (ONLINE, *self.averages):
            raise UserError(
                f"weights '{weights}': checkpoint {self.path} holds {', '.join((ONLINE, *self.averages))}; "
                "choose one of these with --ema"
            )
        kind = WEIGHTS if weights == ONLINE else EMA + weights
        with PieceReader(self.path, self.pieces) as reader:
            for name, parameter in model.named_parameters():
                if self.parameters.get(name) != list(parameter.shape):
                    raise UserError(
                        f"checkpoint {self.path}: parameter '{name}' has shape {self.parameters.get(name)}, the model "
                        f"needs {list(parameter.shape)}"
                    )
                flat = parameter.data.new_empty(parameter.numel())
                reader.read_into(flat, kind, name)
                parameter.data.copy_(flat.view_as(parameter))


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of keys that are younger than it; as it is where it is no longer valid."""
    try:
        return RunConfig.model_validate_json(json.dumps(stored)).model_dump(mode="json")
    except ValidationError:
        return stored


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def load_model(
    run_dir: str | Path, checkpoint: str = "latest", weights: str | None = ONLINE
) -> tuple[RunConfig, nn.Module]:
    """The config and the float32 model (on the CPU, eval mode) of a run directory's checkpoint.

    weights: online, or the name of a moving average; None: what the run's ``sample.weights`` names.

    Raises:
        UserError: no run there, no checkpoint yet, a checkpoint of another model or without these weights.
    """
    from megadit.models import build_model

    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"'{run_dir}' is no run directory (it has no config.yaml); give the --run_dir of a training run"
        )
    config = load_config(run_dir / "config.yaml")
    found = find_checkpoint(run_dir, checkpoint)
    if found is None:
        raise UserError(f"'{run_dir}' has no checkpoint yet; wait for train.checkpoint_every or the run's end")
    model = build_model(config.model)
    StoredCheckpoint(found).load_weights(model, config.sample.weights if weights is None else weights)
    return config, model.eval()
