"""Bringing a stored state into a new engine: going on from a checkpoint, or beginning with its weights alone.

A run goes on with the data that it began with, or with others on purpose and on the record. What of its config is not
as the checkpoint had it is told with numbers: rates, averages, then the rest.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megadit.checkpoint.compatibility import (
    changed_values,
    check_initial_weights,
    check_same_model,
    check_shapes,
    describe_changes,
    shapes_of,
)
from megadit.checkpoint.find import no_sound_checkpoint, open_checkpoint, warn_fallback
from megadit.checkpoint.format import BrokenCheckpoint
from megadit.checkpoint.read import StoredCheckpoint
from megadit.checkpoint.restore import open_on_all_ranks, restore_training_state, restore_weights
from megadit.checkpoint.write import set_latest
from megadit.config import OptimConfig, RunConfig
from megadit.config.schema.run import ONLINE
from megadit.config.schema.values import plain_text
from megadit.data import ImageSet
from megadit.data.identity import Identity, config_differences, crop_note, differences
from megadit.data.windows import Window, format_windows, merge_windows, subtract_windows, windows_before
from megadit.engine.engine import TrainingEngine
from megadit.engine.schedule import Schedule, steps_of_epochs
from megadit.errors import UserError
from megadit.files.json_text import JsonError, parse_json
from megadit.parallel import ProcessContext
from megadit.plugins import loaded_plugins, plugin_changes
from megadit.train.run_dir import RunDirectory

# Of what the rate at a step is made, beside lr_mult; and what says where files lie, which changes nothing.
_SCHEDULE = tuple(f"optim.{key}" for key in ("lr", "schedule", "warmup_steps", "decay_steps", "min_lr_ratio"))
_LENGTH = ("train.steps", "train.epochs")
_ELSEWHERE = ("data.on_change", "data.path", "data.workers", "data.vae.path", "data.text.path", "data.text.pooled_path")
_CLOSE = 1e-9  # relative; rates that differ by less are one
_IDENTITY, _CHANGES = "data", "data_changes"  # of state.json


def restore(
    directory: RunDirectory,
    paths: Sequence[Path],
    engine: TrainingEngine,
    config: RunConfig,
    context: ProcessContext,
    data: DataRecord | None,
    train_set: ImageSet,
    total: int,
) -> tuple[StoredCheckpoint, DataRecord | None]:
    """Go on from the first of ``paths`` that is sound on every rank, and return it; what is passed over is told.

    A single path is what a person named, or the only one there is: then nothing is tried after it. ``data`` is the
    record of the present data, held against the first of them; the one returned is held against the one taken.
    ``total`` is the run's length in steps.

    Raises:
        UserError: none is sound, or one is of another model or of other data.
    """
    first_problem = ""
    for number, path in enumerate(paths):
        try:
            stored = open_on_all_ranks(path, context)
            check_same_model(stored, config)
            check_shapes(stored, shapes_of(config))  # on every rank alike, where each will see its own parameters only
            if number and data is not None:
                data = context.on_main(functools.partial(check_data_against, stored, data, config, train_set))
            notes = restore_training_state(stored, engine.partitions, [engine.ema], context)
        except BrokenCheckpoint as error:
            if len(paths) == 1:
                raise
            first_problem = first_problem or str(error)
            if context.is_main and number + 1 < len(paths):
                warn_fallback(str(error), paths[number + 1])
            continue
        engine.after_restore(stored.position.step)
        context.on_main(functools.partial(set_latest, directory.path, path))
        if context.is_main:
            print(f"resuming from {path} at step {stored.position.step}", file=sys.stderr)
            notes += config_notes(stored, config, total)
            notes += group_notes(stored.state["groups"], engine.optimizer.table)
            _tell(notes)
            directory.record_changes(stored.position.step, path, () if data is None else data.new, notes)
        return stored, data
    raise no_sound_checkpoint(first_problem)


def samples_left_out(stored: StoredCheckpoint, config: RunConfig) -> tuple[Window, ...]:
    """Sample numbers that a run leaves out which goes on from ``stored``: of its past, then those of the config.

    Raises:
        UserError: train.skip_samples names samples that were trained on.
    """
    asked, upto = merge_windows(config.train.skip_samples), stored.next_sample
    late = subtract_windows(windows_before(asked, upto), stored.left_out)
    if late:
        raise UserError(
            f"train.skip_samples: {format_windows(late)} come before sample {upto}, where checkpoint {stored.path} "
            "goes on, and have been trained on; name samples from there on, or --resume an earlier checkpoint"
        )
    return merge_windows((*stored.left_out, *subtract_windows(asked, [(0, upto)])))


def check_weights_start(config: RunConfig) -> Path | None:
    """The checkpoint that ``train.init_from`` names, if it does, checked against the model.

    Raises:
        UserError: no checkpoint is there, it lacks the average, or its parameters have other shapes.
    """
    if config.train.init_from is None:
        return None
    path = Path(config.train.init_from)
    found = open_checkpoint(path, str(path), "train.init_from")
    if found is None:
        raise UserError(f"train.init_from: '{path}' has no checkpoint yet; give one that has")
    found.stored.kind_of(config.train.init_from_ema or ONLINE)
    check_initial_weights(found.stored, shapes_of(config))
    return found.stored.path


def start_from_weights(path: Path, engine: TrainingEngine, config: RunConfig, context: ProcessContext) -> None:
    """Begin a new run with a checkpoint's weights; optimizer, averages, schedule and data begin afresh.

    Raises:
        UserError: it is broken or of another shape.
    """
    stored = open_on_all_ranks(path, context)
    weights = config.train.init_from_ema or ONLINE
    restore_weights(stored, engine.partitions, [engine.ema], context, weights)
    if context.is_main:
        what = "weights" if weights == ONLINE else f"weights (average {weights})"
        print(f"beginning at step 0 with the {what} of {path}, step {stored.position.step}", file=sys.stderr)
        projector = check_initial_weights(stored, shapes_of(config))
        _tell([projector] if projector is not None else [])
        changes = describe_changes(stored.config, config.model_dump(mode="json"))
        _tell([f"the model differs: {change}" for change in changes if change.startswith("model.")])


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def config_notes(stored: StoredCheckpoint, config: RunConfig, total: int) -> list[str]:
    """What differs between the checkpoint's config and ``config``, of a run of ``total`` steps; nothing twice."""
    changed = changed_values(stored.config, config.model_dump(mode="json"))
    plugins = stored.config.get("plugins", [])
    step, notes = stored.position.step, plugin_changes(plugins)
    changed.pop("plugins", None)
    known = {record["name"] for record in plugins}
    notes += [f"plugin {plugin} was not there before" for plugin in loaded_plugins() if plugin.name not in known]
    rate = _rate_note(stored, config, total, changed)
    if rate is not None:  # nothing to tell where the same course is written otherwise: 5% of 1000 steps for 50
        notes += [rate] * bool(rate)
        changed = {key: values for key, values in changed.items() if key not in (*_SCHEDULE, *_LENGTH)}
    if "ema.every" in changed and config.ema.names:
        old, new = changed.pop("ema.every")
        notes.append(f"ema.every {old} → {new} from step {step} on: averages follow the weights every {new} updates")
    rest = [_change(key, changed) for key in changed if key not in _ELSEWHERE]
    if rest:
        notes.append(f"the config has changed since the checkpoint: {', '.join(rest)}")
    return notes


def group_notes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Multipliers of optimizer groups that are not as they were; two groups of one name are told apart by order."""
    notes, earlier = [], list(before)
    for row in after:
        old = next((other for other in earlier if other["name"] == row["name"]), None)
        if old is not None:
            earlier.remove(old)
        for key in ("lr_mult", "wd_mult", "eps_mult"):
            if old is None or old.get(key) != row[key]:
                was = None if old is None else old.get(key)
                notes.append(f"group {row['name']} has {key} {row[key]:g} from the config (checkpoint: {was})")
    return notes


def _rate_note(
    stored: StoredCheckpoint, config: RunConfig, total: int, changed: Mapping[str, tuple[Any, Any]]
) -> str | None:
    """How the learning rate goes on where its course is another; empty where it is the same.

    None where the run is longer or shorter at the same rates, or where its former length is not known.
    """
    old_total = _old_total(stored)
    old = _old_schedule(stored, old_total)
    if old is None or old_total is None:
        return None
    before, lr_before = old
    after, lr_after = Schedule.from_config(config.optim, total), config.optim.lr
    if (before, lr_before) == (after, lr_after):
        return ""
    step = stored.position.step
    cause = _cause(changed, before, after)
    last = min(step, old_total - 1)  # of a finished run: the rate of its last update
    here = lr_before * before.factor(last), lr_after * after.factor(step)
    if not _same(lr_before * before.factor(step), here[1]) and rate_text(here[0]) != rate_text(here[1]):
        return f"the learning rate goes from {rate_text(here[0])} to {rate_text(here[1])} at step {step}{cause}"
    for later in range(step, min(old_total, total)):
        rates = lr_before * before.factor(later), lr_after * after.factor(later)
        if not _same(*rates):
            return (
                f"the learning rate stays at {rate_text(here[1])} at step {step} and leaves its former course at step "
                f"{later}{cause}"
            )
    return None


def _old_total(stored: StoredCheckpoint) -> int | None:
    """The length that the checkpoint's run was to have; None where it followed from data that are not known."""
    train = stored.config["train"]
    if train.get("steps") is not None:
        return int(train["steps"])
    images = stored.state.get("data", {}).get("training_images")
    return None if images is None else steps_of_epochs(train["epochs"], images, train["global_batch"])


def _old_schedule(stored: StoredCheckpoint, total: int | None) -> tuple[Schedule, float] | None:
    if total is None:
        return None
    try:
        optim = OptimConfig.model_validate_json(json.dumps(stored.config["optim"]))
        return Schedule.from_config(optim, total), optim.lr
    except (ValidationError, UserError, KeyError):  # of an earlier time, when other values were allowed
        return None


def _cause(changed: Mapping[str, tuple[Any, Any]], before: Schedule, after: Schedule) -> str:
    keys = [key for key in (*_SCHEDULE, *_LENGTH) if key in changed]
    words = [_change(key, changed) for key in keys]
    if before.total != after.total:
        if not any(key in changed for key in _LENGTH):
            words.append(f"the run's steps {before.total} → {after.total}")
        if before.kind == after.kind and before.kind != "constant":
            verb = "lengthens" if after.total > before.total else "shortens"
            words[-1] += f" {verb} the {'cosine' if after.kind == 'cosine' else 'schedule'}"
    return f" ({', '.join(words)})" if words else ""


def _change(key: str, changed: Mapping[str, tuple[Any, Any]]) -> str:
    old, new = changed[key]
    return f"{key} {plain_text(old)} → {plain_text(new)}"


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= _CLOSE * max(abs(one), abs(other))


def rate_text(rate: float) -> str:
    """A learning rate for people: 1.14e-3."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}" if rate else "0"


@dataclass(frozen=True)
class DataRecord:
    """What a run is trained on, as its checkpoints keep it, and the changes that were accepted: step, time, what.

    new: of this start alone, as words.
    """

    identity: Identity
    changes: tuple[Mapping[str, Any], ...] = ()
    new: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """What ``state.json`` keeps."""
        return {_IDENTITY: self.identity, _CHANGES: list(self.changes)}


def check_data_against(
    stored: StoredCheckpoint, record: DataRecord, config: RunConfig, train_set: ImageSet
) -> DataRecord:
    """``record`` of the present sets with the history of ``stored``, from which the run goes on. Tells what it accepts.

    Raises:
        UserError: the data are others than the checkpoint's, and ``data.on_change`` is not accept.
    """
    before = stored.state.get(_IDENTITY)
    history = tuple(stored.state.get(_CHANGES, ()))
    if before is None:
        print(
            f"note: {stored.path} does not keep what it was trained on (an older megadit or a conversion wrote it), so "
            "that images are not compared; the next checkpoint keeps it",
            file=sys.stderr,
        )
        told = _data_section(stored)
        found = config_differences(told, _classes_of(stored), config, train_set)
        cut = crop_note(told, config, train_set)
        if cut is not None:
            print(f"note: {cut}", file=sys.stderr)
    else:
        found = differences(before, record.identity, train_set)
    if not found:
        return replace(record, changes=history, new=())
    if config.data.on_change != "accept":
        raise UserError(
            f"data.on_change: refuse, and the data are not those of checkpoint {stored.path}: {'; '.join(found)}; give "
            "it its own data again, or set data.on_change=accept to go on with these"
        )
    print(f"note: data.on_change accept: going on with other data: {'; '.join(found)}", file=sys.stderr)
    change = {"step": stored.position.step, "time": time.strftime("%FT%T%z"), "changes": found}
    return replace(record, changes=(*history, change), new=tuple(found))


def _data_section(stored: StoredCheckpoint) -> dict[str, Any]:
    """``data`` of the checkpoint's config, but for a crop that it does not tell itself."""
    section = dict(stored.config["data"])
    if "crop" not in stored.state["config"]["data"]:
        section.pop("crop", None)
    return section


def _classes_of(stored: StoredCheckpoint) -> list[str] | None:
    """The names of its classes that the run of a checkpoint wrote; None where it wrote none."""
    file = stored.path.parent.parent / "classes.json"
    try:
        names = parse_json(file.read_bytes())
    except (OSError, JsonError):
        return None
    return list(map(str, names)) if isinstance(names, list) else None
