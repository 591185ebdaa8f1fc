"""A run goes on with the data that it began with, or with others on purpose and on the record."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megadit.checkpoint.read import StoredCheckpoint
from megadit.config import RunConfig
from megadit.data import ImageSet
from megadit.data.identity import Identity, config_differences, crop_note, differences, identify
from megadit.errors import UserError
from megadit.files.json_text import JsonError, parse_json

_IDENTITY, _CHANGES = "data", "data_changes"  # of state.json


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


def data_record(
    stored: StoredCheckpoint | None, config: RunConfig, train_set: ImageSet, val_set: ImageSet
) -> DataRecord:
    """The record of a run that goes on from ``stored`` (None: it begins) with these sets. Tells what it accepts.

    Raises:
        UserError: the data are others than the checkpoint's, and ``data.on_change`` is not accept.
    """
    record = DataRecord(identify(config, train_set, val_set))
    return record if stored is None else held_against(stored, record, config, train_set)


def held_against(stored: StoredCheckpoint, record: DataRecord, config: RunConfig, train_set: ImageSet) -> DataRecord:
    """``record`` of the present sets with the history of ``stored``. Raises UserError as ``data_record`` does."""
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
