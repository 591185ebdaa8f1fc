"""How a study stands: counts, what runs now, the best point so far and the time that is left."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megadit.errors import UserError
from megadit.search.results import TrialCounts, TrialResult
from megadit.search.selection import SelectedPoint, select
from megadit.search.storage.records import RunningTrial
from megadit.search.storage.store import StudyStore
from megadit.search.study.plan import PlannedTrial
from megadit.search.study.study import Cell, Study
from megadit.search.wording import point_text
from megadit.train.run_dir import read_rows

_SHOWN_TRIALS = 30


@dataclass(frozen=True)
class Status:
    """A study at one moment. ``eta_s`` is None before the first trial has ended."""

    study: Study
    counts: TrialCounts
    running: tuple[RunningTrial, ...]
    trials: tuple[TrialResult, ...]
    best: SelectedPoint | None
    eta_s: float | None

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "study": self.study.spec.name,
            "study_dir": str(self.study.folder),
            "counts": asdict(self.counts) | {"done": self.counts.done},
            "complete": self.counts.done >= self.counts.planned,
            "running": [
                {**asdict(entry), "seconds": round(entry.seconds, 1), "step": step_of(self.study, entry.number)}
                for entry in self.running
            ],
            "best": None if self.best is None else asdict(self.best),
            "eta_s": None if self.eta_s is None else round(self.eta_s),
            "trials": [asdict(trial) for trial in self.trials],
        }


def status_of(store: StudyStore, workers: int | None = None) -> Status:
    """The present status; only reads. ``workers`` (default: as many as run now) share what is left."""
    study, seen = store.study, store.snapshot()
    trials = seen.results.trials
    try:
        best = select(seen.results)
    except UserError:  # no point has finished well yet
        best = None
    left = seconds_left(study, store.planned, trials, seen.running)
    eta = None if left is None else left / max(1, workers or len(seen.running))
    return Status(study, seen.results.counts, seen.running, trials, best, eta)


def seconds_left(
    study: Study, planned: Sequence[PlannedTrial], trials: Sequence[TrialResult], running: Sequence[RunningTrial]
) -> float | None:
    """Worker-seconds of what has not ended: per cell as its trials took so far, else in proportion to its FLOPs."""
    took: defaultdict[tuple[str, Any], list[float]] = defaultdict(list)
    for trial in trials:
        if trial.steps:
            took[trial.variant, trial.scale].append(trial.seconds)
    if not took:
        return None
    work = {(cell.variant, cell.scale): _work(study, cell) for cell in study.cells}
    known = sum(sum(times) for times in took.values()) / sum(work[key] * len(times) for key, times in took.items())
    each = {key: sum(took[key]) / len(took[key]) if key in took else known * flops for key, flops in work.items()}
    left: Counter[tuple[str, Any]] = Counter((trial.cell.variant, trial.cell.scale) for trial in planned)
    left.subtract((trial.variant, trial.scale) for trial in trials)
    spent = sum(min(entry.seconds, each[entry.variant, entry.scale]) for entry in running)
    return max(0.0, sum(seconds * left[key] for key, seconds in each.items()) - spent)


def _work(study: Study, cell: Cell) -> float:
    """What a run of the cell costs in FLOPs; one step of it where its length is not given in steps."""
    from megadit.plan import training_flops

    config = study.first_run(cell)
    return training_flops(config, config.train.steps or 1)


def step_of(study: Study, number: int) -> int | None:
    """The last logged step of a running trial; None before its first."""
    try:
        rows = read_rows(study.trial_folder(number) / "metrics.jsonl").rows
    except OSError:
        return None
    return int(rows[-1]["step"]) if rows else None


def counts_text(counts: TrialCounts) -> str:
    """E.g. ``12 of 30 done (1 diverged, 2 failed), 2 running, 16 waiting``."""
    unlike = [f"{getattr(counts, name)} {name}" for name in ("diverged", "pruned", "failed") if getattr(counts, name)]
    done = f"{counts.done} of {counts.planned} done" + (f" ({', '.join(unlike)})" if unlike else "")
    return f"{done}, {counts.running} running, {counts.waiting} waiting"


def best_text(best: SelectedPoint) -> str:
    """The best point with its score."""
    trials = ", ".join(str(number) for number in best.trials)
    return (
        f"{point_text(best.hps)}  {best.score} {best.value:.4f} (trial{'s' if len(best.trials) > 1 else ''} {trials})"
    )


def duration(seconds: float) -> str:
    """E.g. ``1:02:03`` or ``4:05``."""
    return time.strftime("%-H:%M:%S" if seconds >= 3600 else "%-M:%S", time.gmtime(seconds)) if seconds < 86400 else (
        f"{seconds / 86400:.1f} days"
    )  # fmt: skip


def format_status(status: Status) -> str:
    """For people: counts, the running trials, a table of the latest ended ones, the best point."""
    study = status.study
    lines = [f"study {study.spec.name} in {study.folder}", f"  {counts_text(status.counts)}"]
    if status.eta_s is not None and status.counts.done < status.counts.planned:
        lines[-1] += f"; about {duration(status.eta_s)} left"
    for entry in status.running:
        step = step_of(study, entry.number)
        at = "before its first logged step" if step is None else f"step {step}"
        lines.append(f"  running: trial {entry.number} on {entry.worker} for {duration(entry.seconds)}, {at}")
    lines += ["", *_table(study, status.trials)]
    if status.best is not None:
        lines += ["", f"best ({status.best.rule}): {best_text(status.best)}"]
    return "\n".join(lines)


def _table(study: Study, trials: Sequence[TrialResult]) -> list[str]:
    names = [score.name for score in study.spec.scores]
    rows = [["trial", "variant", "scale", "point", "seed", "outcome", *names, "steps", "s"]]
    for trial in trials[-_SHOWN_TRIALS:]:
        values = [trial.scores.get(name) for name in names]
        rows.append(
            [
                str(trial.number),
                trial.variant or "-",
                "-" if trial.scale is None else f"{trial.scale:g}",
                point_text(trial.hps),
                str(trial.seed),
                trial.outcome,
                *("-" if value is None else f"{value:.4f}" for value in values),
                str(trial.steps),
                f"{trial.seconds:.1f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(trials) > _SHOWN_TRIALS:
        lines.append(f"(the last {_SHOWN_TRIALS} of {len(trials)}; all of them with --json, or in the report)")
    lines += [f"trial {trial.number}: {trial.reason}" for trial in trials[-_SHOWN_TRIALS:] if trial.outcome == "failed"]
    return lines
