"""Losses far above those before, and the end of a run whose numbers are no longer finite: what was seen, and where."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.data.order import BatchLayout, SampleOrder
from megadit.data.windows import Window, format_windows, merge_windows, subtract_windows, windows_option
from megadit.files.json_text import JsonError, parse_json
from megadit.mup.spec import Role
from megadit.train.run_dir import write_json

FILE = "diverged.json"
EVENT, LEFT_OUT, SPIKE = "non-finite", "samples left out", "loss spike"  # kinds of events in metrics
_IMAGES_TOLD = 16
# Of spikes.
_REMEMBERED = 100  # steps
_TIMES = 10.0  # the median
_DEVIATIONS = 30.0  # above the median: losses of few samples scatter by themselves
_OF_NORMAL = 1.4826  # standard deviations in a median absolute deviation


class TrainingDiverged(RuntimeError):
    """A loss or gradients were not finite: the update was left out and the run ends, with nothing saved after it.

    ``event`` is what the metrics and ``diverged.json`` hold of it; None where no step can be named.
    """

    def __init__(self, message: str, event: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.event = event


def describe(
    step: int,
    layout: BatchLayout,
    order: SampleOrder,
    broken: Mapping[int, float],
    roles: Sequence[Role],
    all_roles: Collection[Role],
    at_scale: float | None = None,
) -> TrainingDiverged:
    """The error for optimizer step ``step`` (counted from 1), whose samples ``layout`` and ``order`` tell.

    broken: those whose losses are not finite; roles: of ``all_roles`` those whose gradients are not; at_scale: fp16's
    smallest loss scale, where gradients overflowed at it.
    """
    windows = layout.windows(step - 1)
    event: dict[str, Any] = {"kind": EVENT, "step": step, "samples": [list(window) for window in windows]}
    if broken:
        samples = merge_windows((number, number + 1) for number in broken)
        images = order.indices(list(broken)[:_IMAGES_TOLD])
        value = "nan" if any(map(math.isnan, broken.values())) else str(next(iter(broken.values())))
        event |= {"what": "loss", "value": value, "broken_samples": [list(w) for w in samples], "images": images}
        some = f"{len(broken)} of the step's {layout.global_batch}"
        which = f"image {images[0]} of the training set" if len(broken) == 1 else some
        what = f"the loss at step {step} is {value} for {format_windows(samples)} ({which})"
    else:
        samples = merge_windows(windows)
        event |= {"what": "gradients", "roles": list(roles)}
        where = f" (of {', '.join(roles)} parameters)" if 0 < len(roles) < len(all_roles) else ""
        scale = "" if at_scale is None else f" at the smallest loss scale, {at_scale:g}"
        what = (
            f"the gradients at step {step} are not finite{scale}{where}, though its loss is; it took "
            f"{format_windows(samples)}"
        )
    value = windows_option(merge_windows((*layout.left_out, *samples)))
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
        windows = event.get("broken_samples") or event["samples"]
        samples = merge_windows((int(first), int(stop)) for first, stop in windows)
        ahead = subtract_windows(samples, [(0, next_number)])
        if not ahead:
            continue
        rest, step, what = subtract_windows(ahead, left_out), event["step"], event["what"]
        verb = "were" if what == "gradients" else "was"
        said = f"an earlier start ended at step {step}, where the {what} of {format_windows(samples)} {verb} not finite"
        if rest:
            value = windows_option(merge_windows((*left_out, *rest)))
            notes.append(f"{said}; this run will take them again: train.skip_samples={value} leaves them out")
        else:
            notes.append(f"{said}; train.skip_samples leaves them out")
    return notes


@dataclass(frozen=True)
class Spike:
    """The mean loss of optimizer step ``step`` (counted from 1), far above those of ``count`` steps before."""

    step: int
    loss: float
    median: float
    count: int


class SpikeDetector:
    """Holds each step's loss against the median of the steps before it.

    A spike is more than ten times that median, and more than thirty standard deviations (by the median absolute
    deviation) above it. As long as losses stay there, it is one; a level that lasts becomes the median.
    """

    def __init__(self, earlier: Iterable[float] = ()) -> None:
        self._before: deque[float] = deque(earlier, maxlen=_REMEMBERED)
        self._above = False

    def look(self, first: int, losses: Sequence[float]) -> list[Spike]:
        """Take the losses of the steps ``first``, ``first + 1``, …; returns where spikes begin."""
        found = []
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):  # of an update that fp16 skipped, or the end of the run
                continue
            if self._before:
                median = statistics.median(self._before)
                spread = _OF_NORMAL * statistics.median(abs(value - median) for value in self._before)
                above = loss > median + max((_TIMES - 1) * abs(median), _DEVIATIONS * spread)
                if above and not self._above:
                    found.append(Spike(step, loss, median, len(self._before)))
                self._above = above
            self._before.append(loss)
        return found
