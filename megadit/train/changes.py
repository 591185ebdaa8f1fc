"""What of a resumed run's config is not as its checkpoint had it, told with numbers: rates, averages, then the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from megadit.checkpoint.read import StoredCheckpoint, changed_values
from megadit.config import OptimConfig, RunConfig
from megadit.config.values import plain_text
from megadit.engine.schedule import Schedule, steps_of_epochs
from megadit.errors import UserError

# Of what the rate at a step is made, beside lr_mult; and what says where files lie, which changes nothing.
_SCHEDULE = tuple(f"optim.{key}" for key in ("lr", "schedule", "warmup_steps", "decay_steps", "min_lr_ratio"))
_LENGTH = ("train.steps", "train.epochs")
_ELSEWHERE = ("data.on_change", "data.path", "data.workers", "data.vae.path", "data.text.path", "data.text.pooled_path")
_CLOSE = 1e-9  # relative; rates that differ by less are one


def config_notes(stored: StoredCheckpoint, config: RunConfig, total: int) -> list[str]:
    """What differs between the checkpoint's config and ``config``, of a run of ``total`` steps; nothing twice."""
    changed = changed_values(stored.config, config.model_dump(mode="json"))
    step, notes = stored.position.step, []
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
    old_total = _old_total(stored, total)
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


def _old_total(stored: StoredCheckpoint, total: int) -> int | None:
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
