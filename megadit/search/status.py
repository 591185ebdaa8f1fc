"""The status of a study: trial counts, running trials, the best point so far and the time left."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from megadit.errors import UserError
from megadit.search.results import DIVERGED, FAILED, PRUNED, StudyResults, TrialResult
from megadit.search.selection import SelectedPoint, select
from megadit.search.storage.store import StudyStore
from megadit.search.study.plan import PlannedTrial
from megadit.search.study.study import Study
from megadit.search.wording import duration_text, point_text
from megadit.tables import aligned
from megadit.train.run_dir import read_rows

_SHOWN_TRIALS = 30


@dataclass(frozen=True)
class StudyStatus:
    """A study at one moment; ``eta_s`` (seconds left) is None before the first trial has ended."""

    results: StudyResults
    best: SelectedPoint | None
    eta_s: float | None

    def to_json(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        study, trials = self.results.study, self.results.trials
        return {
            "study": study.spec.name,
            "study_dir": str(study.folder),
            "counts": self.results.counts,
            "complete": self.results.complete,
            "running": [
                {**asdict(entry), "seconds": round(entry.seconds, 1), "step": trial_step(study, entry.number)}
                for entry in self.results.running
            ],
            "best": None if self.best is None else asdict(self.best),
            "eta_s": None if self.eta_s is None else round(self.eta_s),
            "trials": [asdict(trial) for trial in trials],
        }


def status_of(store: StudyStore, workers: int | None = None) -> StudyStatus:
    """The present status; only reads. ``workers`` (default: as many as run now) share what is left."""
    results = store.results()
    try:
        best = select(results)
    except UserError:  # no point has finished well yet
        best = None
    left = seconds_left(store.plan.values(), results)
    return StudyStatus(results, best, None if left is None else left / max(1, workers or len(results.running)))


def seconds_left(planned: Iterable[PlannedTrial], results: StudyResults) -> float | None:
    """Worker-seconds of what has not ended: a cell's mean so far, else in proportion to its FLOPs; None at first."""
    from megadit.plan import training_flops

    durations: defaultdict[tuple[str, Any], list[float]] = defaultdict(list)
    for trial in results.trials:
        if trial.steps:
            durations[trial.variant, trial.scale].append(trial.seconds)
    if not durations:
        return None
    configs = {(cell.variant, cell.scale): results.study.first_run(cell) for cell in results.study.cells}
    # of one step where the length is not given in steps
    flops = {cell: training_flops(config, config.train.steps or 1) for cell, config in configs.items()}
    spent_flops = sum(flops[cell] * len(seconds) for cell, seconds in durations.items())
    rate = sum(map(sum, durations.values())) / spent_flops
    each = {cell: fmean(durations[cell]) if cell in durations else rate * work for cell, work in flops.items()}
    left: Counter[tuple[str, Any]] = Counter((trial.variant, trial.scale) for trial in planned)
    left.subtract((trial.variant, trial.scale) for trial in results.trials)
    spent = sum(min(trial.seconds, each[trial.variant, trial.scale]) for trial in results.running)
    return max(0.0, sum(seconds * left[cell] for cell, seconds in each.items()) - spent)


def trial_step(study: Study, number: int) -> int | None:
    """The last logged step of a running trial; None before its first."""
    try:
        rows = read_rows(study.trial_folder(number) / "metrics.jsonl").rows
    except OSError:
        return None
    return int(rows[-1]["step"]) if rows else None


def counts_text(counts: Mapping[str, int]) -> str:
    """E.g. ``12 of 30 done (1 diverged, 2 failed), 2 running, 16 waiting``."""
    listed = ", ".join(f"{counts[outcome]} {outcome}" for outcome in (DIVERGED, PRUNED, FAILED) if counts[outcome])
    done = f"{counts['done']} of {counts['planned']} done" + (f" ({listed})" if listed else "")
    return f"{done}, {counts['running']} running, {counts['waiting']} waiting"


def best_text(best: SelectedPoint) -> str:
    """The best point with its score and its trials."""
    trials = f"trial{'s' if len(best.trials) > 1 else ''} {', '.join(map(str, best.trials))}"
    return f"{point_text(best.hps)}  {best.score} {best.value:.4f} ({trials})"


def format_status(status: StudyStatus) -> str:
    """For people: counts, the running trials, a table of the latest ended ones, the best point."""
    results, study = status.results, status.results.study
    latest = results.trials[-_SHOWN_TRIALS:]
    lines = [f"study {study.spec.name} in {study.folder}", f"  {counts_text(results.counts)}"]
    if status.eta_s is not None and not results.complete:
        lines[-1] += f"; about {duration_text(status.eta_s)} left"
    for trial in results.running:
        step = trial_step(study, trial.number)
        at = "before its first logged step" if step is None else f"step {step}"
        lines.append(f"  running: trial {trial.number} on {trial.worker} for {duration_text(trial.seconds)}, {at}")
    names = [score.name for score in study.spec.scores]
    header = ["trial", "variant", "scale", "point", "seed", "outcome", *names, "steps", "s"]
    lines += ["", aligned(header, [_row(trial, names) for trial in latest], left=6)]
    if len(results.trials) > len(latest):
        lines.append(f"(the last {len(latest)} of {len(results.trials)}; all of them with --json, or in the report)")
    lines += [f"trial {trial.number}: {trial.reason}" for trial in latest if trial.outcome == FAILED]
    if status.best is not None:
        lines += ["", f"best ({status.best.rule}): {best_text(status.best)}"]
    return "\n".join(lines)


def _row(trial: TrialResult, scores: Sequence[str]) -> list[str]:
    values = [trial.scores.get(name) for name in scores]
    scale = "-" if trial.scale is None else f"{trial.scale:g}"
    return [
        *(str(trial.number), trial.variant or "-", scale, point_text(trial.hps), str(trial.seed), trial.outcome),
        *("-" if value is None else f"{value:.4f}" for value in values),
        *(str(trial.steps), f"{trial.seconds:.1f}"),
    ]
