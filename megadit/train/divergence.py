"""The end of a run whose numbers are no longer finite: what was seen, where, and how a later start hears of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.data.order import SampleOrder
from megadit.data.windows import Window, as_value, joined, shown, without
from megadit.files.json_text import JsonError, parse_json
from megadit.mup.spec import Role
from megadit.train.run_dir import write_json

if TYPE_CHECKING:
    from megadit.train.run import TrainingRun

FILE = "diverged.json"
EVENT, LEFT_OUT = "non-finite", "samples left out"  # kinds of events in metrics
_IMAGES_TOLD = 16


class TrainingDiverged(RuntimeError):
    """A loss or gradients were not finite: the update was left out and the run ends, with nothing saved after it.

    ``event`` is what the metrics and ``diverged.json`` hold of it; None where no step can be named.
    """

    def __init__(self, message: str, event: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.event = event


def describe(
    run: TrainingRun, broken: Mapping[int, float], roles: Sequence[Role], at_scale: float | None = None
) -> TrainingDiverged:
    """The error for the step where ``run`` stands.

    broken: its samples whose losses are not finite; roles: those whose gradients are not; at_scale: fp16's smallest
    loss scale, where gradients overflowed at it.
    """
    step, windows = run.position.step, run.layout.windows(run.position.step - 1)
    event: dict[str, Any] = {"kind": EVENT, "step": step, "samples": [list(window) for window in windows]}
    if broken:
        samples = joined((number, number + 1) for number in broken)
        order = SampleOrder(len(run.train_set), run.config.train.seed)
        images = order.indices(list(broken)[:_IMAGES_TOLD])
        value = "nan" if any(map(math.isnan, broken.values())) else str(next(iter(broken.values())))
        event |= {"what": "loss", "value": value, "broken_samples": [list(w) for w in samples], "images": images}
        total = run.config.train.global_batch
        which = f"image {images[0]} of the training set" if len(broken) == 1 else f"{len(broken)} of the step's {total}"
        what = f"the loss at step {step} is {value} for {shown(samples)} ({which})"
    else:
        samples = joined(windows)
        event |= {"what": "gradients", "roles": list(roles)}
        some = 0 < len(roles) < len(set(run.engine.optimizer.clip.roles))
        where = f" (of {', '.join(roles)} parameters)" if some else ""
        scale = "" if at_scale is None else f" at the smallest loss scale, {at_scale:g}"
        what = (
            f"the gradients at step {step} are not finite{scale}{where}, though its loss is; it took {shown(samples)}"
        )
    value = as_value(joined((*run.layout.left_out, *samples)))
    return TrainingDiverged(
        f"{what}. That update was not made, and nothing is saved after it. Look at these samples; "
        f"train.skip_samples={value} leaves them out after a resume",
        event,
    )


def remember(run_dir: Path, event: Mapping[str, Any]) -> None:
    """Add an event to ``diverged.json``, for later starts."""
    events = [*recorded(run_dir), {**event, "time": time.strftime("%FT%T%z")}]
    write_json(run_dir / FILE, events)


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The events that ended earlier starts in this run directory; what is not such a file tells nothing."""
    try:
        found = parse_json((run_dir / FILE).read_bytes())
    except (OSError, JsonError):
        return []
    return [event for event in found if _is_event(event)] if isinstance(found, list) else []


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or type(event.get("step")) is not int or not isinstance(event.get("what"), str):
        return False
    windows = [event.get("samples"), event.get("broken_samples") or []]
    return all(isinstance(part, list) and all(map(_is_window, part)) for part in windows)


def _is_window(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)


def notes_of_earlier_ends(run_dirs: Iterable[Path], next_number: int, left_out: Sequence[Window]) -> list[str]:
    """What a start says that is about to take samples at which an earlier one ended."""
    notes = []
    for event in {json.dumps(event): event for run_dir in run_dirs for event in recorded(run_dir)}.values():
        samples = joined((int(first), int(stop)) for first, stop in event.get("broken_samples") or event["samples"])
        ahead = without(samples, [(0, next_number)])
        if not ahead:
            continue
        rest, step, what = without(ahead, left_out), event["step"], event["what"]
        verb = "were" if what == "gradients" else "was"
        said = f"an earlier start ended at step {step}, where the {what} of {shown(samples)} {verb} not finite"
        if rest:
            value = as_value(joined((*left_out, *rest)))
            notes.append(f"{said}; this run will take them again: train.skip_samples={value} leaves them out")
        else:
            notes.append(f"{said}; train.skip_samples leaves them out")
    return notes
