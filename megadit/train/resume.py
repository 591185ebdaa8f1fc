"""Bringing a stored state into a new engine: going on from a checkpoint, or beginning with its weights alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadit.checkpoint.find import none_sound, open_checkpoint, tell_fallback
from megadit.checkpoint.io import BrokenCheckpoint
from megadit.checkpoint.read import StoredCheckpoint, open_everywhere, shapes_of
from megadit.checkpoint.write import take_up
from megadit.config import RunConfig
from megadit.config.schema.run import ONLINE
from megadit.data import ImageSet
from megadit.data.windows import Window, before, joined, shown, without
from megadit.engine.engine import TrainingEngine
from megadit.errors import UserError
from megadit.parallel import ProcessContext
from megadit.train.changes import config_notes, group_notes
from megadit.train.run_dir import RunDirectory
from megadit.train.same_data import DataRecord, held_against


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
            stored = open_everywhere(path, context)
            stored.check_same_model(config)
            stored.check_shapes(shapes_of(config))  # on every rank alike, where each will see its own parameters only
            if number and data is not None:
                data = context.on_main(functools.partial(held_against, stored, data, config, train_set))
            notes = stored.restore(engine.partitions, [engine.ema], context)
        except BrokenCheckpoint as error:
            if len(paths) == 1:
                raise
            first_problem = first_problem or str(error)
            if context.is_main and number + 1 < len(paths):
                tell_fallback(str(error), paths[number + 1])
            continue
        engine.restored(stored.position.step)
        context.on_main(functools.partial(take_up, directory.path, path))
        if context.is_main:
            print(f"resuming from {path} at step {stored.position.step}", file=sys.stderr)
            notes += _changes(stored, config, total, engine.optimizer.table)
            _tell(notes)
            directory.record_changes(stored.position.step, path, () if data is None else data.new, notes)
        return stored, data
    raise none_sound(first_problem)


def samples_left_out(stored: StoredCheckpoint, config: RunConfig) -> tuple[Window, ...]:
    """Sample numbers that a run leaves out which goes on from ``stored``: of its past, then those of the config.

    Raises:
        UserError: train.skip_samples names samples that were trained on.
    """
    asked, upto = joined(config.train.skip_samples), stored.next_sample
    late = without(before(asked, upto), stored.left_out)
    if late:
        raise UserError(
            f"train.skip_samples: {shown(late)} come before sample {upto}, where checkpoint {stored.path} goes on, and "
            "have been trained on; name samples from there on, or --resume an earlier checkpoint"
        )
    return joined((*stored.left_out, *without(asked, [(0, upto)])))


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
    found.stored.check_start(shapes_of(config))
    return found.stored.path


def start_from_weights(path: Path, engine: TrainingEngine, config: RunConfig, context: ProcessContext) -> None:
    """Begin a new run with a checkpoint's weights; optimizer, averages, schedule and data begin afresh.

    Raises:
        UserError: it is broken or of another shape.
    """
    stored = open_everywhere(path, context)
    weights = config.train.init_from_ema or ONLINE
    stored.start_from(engine.partitions, [engine.ema], context, weights)
    if context.is_main:
        what = "weights" if weights == ONLINE else f"weights (average {weights})"
        print(f"beginning at step 0 with the {what} of {path}, step {stored.position.step}", file=sys.stderr)
        projector = stored.check_start(shapes_of(config))
        _tell([projector] if projector is not None else [])
        _tell([f"the model differs: {change}" for change in stored.changes(config) if change.startswith("model.")])


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _changes(stored: StoredCheckpoint, config: RunConfig, total: int, groups: list[dict[str, Any]]) -> list[str]:
    """A resumed run of ``total`` steps follows the config; what of it is not as the checkpoint had it."""
    return config_notes(stored, config, total) + group_notes(stored.state["groups"], groups)
