"""Resuming from a checkpoint, or starting a new run from its weights.

A resumed run trains on the same data, or on others if ``data.on_change`` accepts them and records the change. Changed
values of its config are reported: learning rates, averages, then all others.
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

# Keys that determine the rate of a step, beside lr_mult; and keys that say where files are, which change nothing.
_SCHEDULE = tuple(f"optim.{key}" for key in ("lr", "schedule", "warmup_steps", "decay_steps", "min_lr_ratio"))
_LENGTH = ("train.steps", "train.epochs")
_LOCATIONS = ("data.on_change", "data.path", "data.workers", "data.vae.path", "data.text.path", "data.text.pooled_path")
_RATE_TOLERANCE = 1e-9  # relative; rates that differ by less are one
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
    """Resume from the first of ``paths`` that is sound on every rank, and return it; each skipped one is reported.

    data: the record of the present data, compared with the first of ``paths``; the one returned is compared with the
        checkpoint that was used.
    total: the run's length in steps.

    Raises:
        UserError: none is sound, or one is of another model or of other data.
        BrokenCheckpoint: the only one is broken.
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
            _print_notes(notes)
            directory.record_changes(stored.position.step, path, () if data is None else data.new, notes)
        return stored, data
    raise no_sound_checkpoint(first_problem)


def samples_left_out(stored: StoredCheckpoint, config: RunConfig) -> tuple[Window, ...]:
    """Windows of sample numbers that a run resumed from ``stored`` skips: those already skipped, then the config's.

    Raises:
        UserError: train.skip_samples names samples that were trained on.
    """
    requested, next_sample = merge_windows(config.train.skip_samples), stored.next_sample
    trained_on = subtract_windows(windows_before(requested, next_sample), stored.left_out)
    if trained_on:
        raise UserError(
            f"train.skip_samples: {format_windows(trained_on)} come before sample {next_sample}, where checkpoint "
            f"{stored.path} goes on, and have been trained on; name samples from there on, or --resume an earlier "
            "checkpoint"
        )
    return merge_windows((*stored.left_out, *subtract_windows(requested, [(0, next_sample)])))


def check_weights_start(config: RunConfig) -> Path | None:
    """The checkpoint that ``train.init_from`` names, checked against the model; None where it is not set.

    Raises:
        UserError: no checkpoint is there, it lacks the average, or its parameters have other shapes.
    """
    if config.train.init_from is None:
        return None
    path = Path(config.train.init_from)
    opened = open_checkpoint(path, str(path), "train.init_from")
    if opened is None:
        raise UserError(f"train.init_from: '{path}' has no checkpoint yet; give one that has")
    opened.stored.kind_of(config.train.init_from_ema or ONLINE)
    check_initial_weights(opened.stored, shapes_of(config))
    return opened.stored.path


def start_from_weights(path: Path, engine: TrainingEngine, config: RunConfig, context: ProcessContext) -> None:
    """Start a new run from a checkpoint's weights; optimizer state, averages, schedule and data start anew.

    Raises:
        UserError: it is broken, or its parameters have other shapes.
    """
    stored = open_on_all_ranks(path, context)
    weights = config.train.init_from_ema or ONLINE
    restore_weights(stored, engine.partitions, [engine.ema], context, weights)
    if context.is_main:
        what = "weights" if weights == ONLINE else f"weights (average {weights})"
        print(f"starting at step 0 from the {what} of {path}, step {stored.position.step}", file=sys.stderr)
        projector = check_initial_weights(stored, shapes_of(config))
        _print_notes([projector] if projector is not None else [])
        changes = describe_changes(stored.config, config.model_dump(mode="json"))
        _print_notes([f"the model differs: {change}" for change in changes if change.startswith("model.")])


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def config_notes(stored: StoredCheckpoint, config: RunConfig, total: int) -> list[str]:
    """Differences between the checkpoint's config and ``config``, of a run of ``total`` steps, as sentences."""
    changed = changed_values(stored.config, config.model_dump(mode="json"))
    plugins = stored.config.get("plugins", [])
    step, notes = stored.position.step, plugin_changes(plugins)
    changed.pop("plugins", None)
    known = {record["name"] for record in plugins}
    notes += [f"plugin {plugin} was not there before" for plugin in loaded_plugins() if plugin.name not in known]
    rate = _rate_note(stored, config, total, changed)
    if rate is not None:  # empty where the same schedule is written differently: 5% of 1000 steps for 50
        notes += [rate] * bool(rate)
        changed = {key: values for key, values in changed.items() if key not in (*_SCHEDULE, *_LENGTH)}
    if "ema.every" in changed and config.ema.names:
        old, new = changed.pop("ema.every")
        notes.append(f"ema.every {old} → {new} from step {step} on: averages follow the weights every {new} updates")
    others = [_change_text(key, changed) for key in changed if key not in _LOCATIONS]
    if others:
        notes.append(f"the config has changed since the checkpoint: {', '.join(others)}")
    return notes


def group_notes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences for changed multipliers of optimizer groups; groups of equal name are matched in order."""
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
    """A sentence on how the learning rate changes at the resumed step; empty where the schedule is the same.

    None where the run is longer or shorter at the same rates, or where its former length is not known.
    """
    old_total = _old_total(stored)
    old_schedule = _old_schedule(stored, old_total)
    if old_schedule is None or old_total is None:
        return None
    before, lr_before = old_schedule
    after, lr_after = Schedule.from_config(config.optim, total), config.optim.lr
    if (before, lr_before) == (after, lr_after):
        return ""
    step = stored.position.step
    cause = _cause(changed, before, after)
    last = min(step, old_total - 1)  # after a finished run, the rate of its last update
    rates = lr_before * before.factor(last), lr_after * after.factor(step)
    if not _rates_equal(lr_before * before.factor(step), rates[1]) and rate_text(rates[0]) != rate_text(rates[1]):
        return f"the learning rate goes from {rate_text(rates[0])} to {rate_text(rates[1])} at step {step}{cause}"
    for later in range(step, min(old_total, total)):
        if not _rates_equal(lr_before * before.factor(later), lr_after * after.factor(later)):
            return (
                f"the learning rate stays at {rate_text(rates[1])} at step {step} and leaves its former course at step "
                f"{later}{cause}"
            )
    return None


def _old_total(stored: StoredCheckpoint) -> int | None:
    """The planned length of the checkpoint's run in steps; None where it depended on data of unknown size."""
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
    except (ValidationError, UserError, KeyError):  # an older config, with values that are no longer valid
        return None


def _cause(changed: Mapping[str, tuple[Any, Any]], before: Schedule, after: Schedule) -> str:
    keys = [key for key in (*_SCHEDULE, *_LENGTH) if key in changed]
    words = [_change_text(key, changed) for key in keys]
    if before.total != after.total:
        if not any(key in changed for key in _LENGTH):
            words.append(f"the run's steps {before.total} → {after.total}")
        if before.kind == after.kind and before.kind != "constant":
            verb = "lengthens" if after.total > before.total else "shortens"
            words[-1] += f" {verb} the {'cosine' if after.kind == 'cosine' else 'schedule'}"
    return f" ({', '.join(words)})" if words else ""


def _change_text(key: str, changed: Mapping[str, tuple[Any, Any]]) -> str:
    old, new = changed[key]
    return f"{key} {plain_text(old)} → {plain_text(new)}"


def _rates_equal(one: float, other: float) -> bool:
    return abs(one - other) <= _RATE_TOLERANCE * max(abs(one), abs(other))


def rate_text(rate: float) -> str:
    """A learning rate for people: 1.14e-3."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}" if rate else "0"


@dataclass(frozen=True)
class DataRecord:
    """What a run is trained on, as its checkpoints record it.

    changes: those accepted so far, each with ``step``, ``time`` and ``changes``.
    new: those accepted at this start, as sentences.
    """

    identity: Identity
    changes: tuple[Mapping[str, Any], ...] = ()
    new: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """The entries of ``state.json``."""
        return {_IDENTITY: self.identity, _CHANGES: list(self.changes)}


def check_data_against(
    stored: StoredCheckpoint, record: DataRecord, config: RunConfig, train_set: ImageSet
) -> DataRecord:
    """``record`` of the present data, with the history of ``stored``. Accepted changes are printed.

    Raises:
        UserError: the data differ from the checkpoint's, and ``data.on_change`` is not accept.
    """
    before = stored.state.get(_IDENTITY)
    history = tuple(stored.state.get(_CHANGES, ()))
    if before is None:
        print(
            f"note: {stored.path} does not keep what it was trained on (an older megadit or a conversion wrote it), so "
            "that images are not compared; the next checkpoint keeps it",
            file=sys.stderr,
        )
        section = _data_section(stored)
        changes = config_differences(section, _classes_of(stored), config, train_set)
        crop = crop_note(section, config, train_set)
        if crop is not None:
            print(f"note: {crop}", file=sys.stderr)
    else:
        changes = differences(before, record.identity, train_set)
    if not changes:
        return replace(record, changes=history, new=())
    if config.data.on_change != "accept":
        raise UserError(
            f"data.on_change: refuse, and the data are not those of checkpoint {stored.path}: {'; '.join(changes)}; "
            "give it its own data again, or set data.on_change=accept to go on with these"
        )
    print(f"note: data.on_change accept: going on with other data: {'; '.join(changes)}", file=sys.stderr)
    change = {"step": stored.position.step, "time": time.strftime("%FT%T%z"), "changes": changes}
    return replace(record, changes=(*history, change), new=tuple(changes))


def _data_section(stored: StoredCheckpoint) -> dict[str, Any]:
    """``data`` of the checkpoint's config, without a crop that was filled in later."""
    section = dict(stored.config["data"])
    if "crop" not in stored.state["config"]["data"]:
        section.pop("crop", None)
    return section


def _classes_of(stored: StoredCheckpoint) -> list[str] | None:
    """The class names that the checkpoint's run wrote; None where there are none."""
    file = stored.path.parent.parent / "classes.json"
    try:
        names = parse_json(file.read_bytes())
    except (OSError, JsonError):
        return None
    return list(map(str, names)) if isinstance(names, list) else None
