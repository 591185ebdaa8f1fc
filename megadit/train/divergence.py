"""Divergence: loss spikes, and losses or gradients that are not finite, with their step and samples."""

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
_MAX_IMAGES_LISTED = 16
# A spike: beyond this factor of the running median, and this many standard deviations above it.
_HISTORY_STEPS = 100
_MEDIAN_FACTOR = 10.0
_MAX_DEVIATIONS = 30.0  # losses of few samples scatter by themselves
_STD_PER_MAD = 1.4826  # of a normal distribution


class TrainingDiverged(RuntimeError):
    """A loss or gradients were not finite: the update was skipped and the run ends, with nothing saved after it.

    ``event`` is its record in the metrics and ``diverged.json``; None where no step can be named.
    """

    def __init__(self, message: str, event: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.event = event


def divergence_error(
    step: int,
    layout: BatchLayout,
    order: SampleOrder,
    broken: Mapping[int, float],
    roles: Sequence[Role],
    all_roles: Collection[Role],
    at_scale: float | None = None,
) -> TrainingDiverged:
    """The error for optimizer step ``step`` (counted from 1).

    layout, order: which samples and images the step took.
    broken: the losses that are not finite, by sample number.
    roles: those of ``all_roles`` whose gradients are not finite.
    at_scale: fp16's smallest loss scale, where gradients overflowed at it.
    """
    windows = layout.windows(step - 1)
    event: dict[str, Any] = {"kind": EVENT, "step": step, "samples": [list(window) for window in windows]}
    if broken:
        samples = merge_windows((number, number + 1) for number in broken)
        images = order.indices(list(broken)[:_MAX_IMAGES_LISTED])
        value = "nan" if any(map(math.isnan, broken.values())) else str(next(iter(broken.values())))
        event |= {"what": "loss", "value": value, "broken_samples": [list(w) for w in samples], "images": images}
        count = f"{len(broken)} of the step's {layout.global_batch}"
        which = f"image {images[0]} of the training set" if len(broken) == 1 else count
        problem = f"the loss at step {step} is {value} for {format_windows(samples)} ({which})"
    else:
        samples = merge_windows(windows)
        event |= {"what": "gradients", "roles": list(roles)}
        where = f" (of {', '.join(roles)} parameters)" if 0 < len(roles) < len(all_roles) else ""
        scale = "" if at_scale is None else f" at the smallest loss scale, {at_scale:g}"
        problem = (
            f"the gradients at step {step} are not finite{scale}{where}, though its loss is; it took "
            f"{format_windows(samples)}"
        )
    value = windows_option(merge_windows((*layout.left_out, *samples)))
    return TrainingDiverged(
        f"{problem}. That update was not made, and nothing is saved after it. Look at these samples; "
        f"train.skip_samples={value} leaves them out after a resume",
        event,
    )


def record_event(run_dir: Path, event: Mapping[str, Any]) -> None:
    """Append an event to ``diverged.json``, which later starts read."""
    events = [*recorded_events(run_dir), {**event, "time": time.strftime("%FT%T%z")}]
    write_json(run_dir / FILE, events)


def recorded_events(run_dir: Path) -> list[dict[str, Any]]:
    """The events that ended earlier starts in this run directory; none where the file is missing or not readable."""
    try:
        events = parse_json((run_dir / FILE).read_bytes())
    except (OSError, JsonError):
        return []
    return [event for event in events if _is_event(event)] if isinstance(events, list) else []


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or type(event.get("step")) is not int or not isinstance(event.get("what"), str):
        return False
    windows = [event.get("samples"), event.get("broken_samples") or []]
    return all(isinstance(part, list) and all(map(_is_window, part)) for part in windows)


def _is_window(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)


def earlier_divergence_notes(run_dirs: Iterable[Path], next_number: int, left_out: Sequence[Window]) -> list[str]:
    """Warnings of a start that is about to train on samples at which an earlier one diverged."""
    notes = []
    for event in {json.dumps(event): event for run_dir in run_dirs for event in recorded_events(run_dir)}.values():
        windows = event.get("broken_samples") or event["samples"]
        samples = merge_windows((int(first), int(stop)) for first, stop in windows)
        ahead = subtract_windows(samples, [(0, next_number)])
        if not ahead:
            continue
        remaining, step, what = subtract_windows(ahead, left_out), event["step"], event["what"]
        verb = "were" if what == "gradients" else "was"
        past = f"an earlier start ended at step {step}, where the {what} of {format_windows(samples)} {verb} not finite"
        if remaining:
            value = windows_option(merge_windows((*left_out, *remaining)))
            notes.append(f"{past}; this run will take them again: train.skip_samples={value} leaves them out")
        else:
            notes.append(f"{past}; train.skip_samples leaves them out")
    return notes


@dataclass(frozen=True)
class Spike:
    """The mean loss of optimizer step ``step`` (counted from 1), far above those of ``count`` steps before."""

    step: int
    loss: float
    median: float
    count: int


class SpikeDetector:
    """Compares each step's loss with the median of the 100 steps before it.

    A spike is more than ten times that median, and more than thirty standard deviations (by the median absolute
    deviation) above it. Consecutive losses above the limit are one spike; a level that lasts becomes the median.
    """

    def __init__(self, earlier: Iterable[float] = ()) -> None:
        self._history: deque[float] = deque(earlier, maxlen=_HISTORY_STEPS)
        self._above = False

    def update(self, first: int, losses: Sequence[float]) -> list[Spike]:
        """Add the losses of the steps ``first``, ``first + 1``, …; returns the spikes that begin in them."""
        spikes = []
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):  # of an update that fp16 skipped, or the end of the run
                continue
            if self._history:
                median = statistics.median(self._history)
                spread = _STD_PER_MAD * statistics.median(abs(value - median) for value in self._history)
                above = loss > median + max((_MEDIAN_FACTOR - 1) * abs(median), _MAX_DEVIATIONS * spread)
                if above and not self._above:
                    spikes.append(Spike(step, loss, median, len(self._history)))
                self._above = above
            self._history.append(loss)
        return spikes
