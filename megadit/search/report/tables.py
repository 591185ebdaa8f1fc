"""The tables of a report: each row says what stands in which column, so that columns and cells cannot part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadit.search.report.findings import VERDICT_BADGES, Findings
from megadit.search.report.points import Gathered, Point
from megadit.search.report.rendering import Badge, Cell, Code, Number
from megadit.search.results import DIVERGED, TrialResult
from megadit.search.wording import duration_text, hps_text, number_text, share_text, value_text
from megadit.transfer.ties import ranks
from megadit.transfer.verdict import TransferVerdict

_FEW = 4  # points below which a rank correlation says nothing
Row = dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns; ``caption`` says what they are."""

    rows: Sequence[Mapping[str, Cell]]
    caption: str = ""

    @property
    def columns(self) -> dict[str, bool]:
        """Names, and whether the column holds numbers, which are set flush right."""
        first = self.rows[0] if self.rows else {}
        return {name: any(isinstance(row[name], Number) for row in self.rows) for name in first}


def _where(gathered: Gathered, variant: str, scale: float | None) -> Row:
    """Columns for the variant and the scale, where the study has several."""
    row: Row = {"variant": variant} if len(gathered.results.study.variants) > 1 else {}
    return row | ({gathered.scale_word: Number(scale, number_text(scale, 6))} if gathered.scaled else {})


def verdicts(gathered: Gathered, findings: Findings) -> Table:
    """The verdict on each variant and key with the numbers that made it."""
    variants = len(gathered.results.study.variants) > 1
    rows: list[Row] = []
    for (variant, key), verdict in findings.verdicts.items():
        carried = next((entry.best_hp for entry in verdict.scales if entry.scale == verdict.proxy), None)
        row: Row = {"variant": variant} if variants else {}
        rows.append(
            row
            | {
                "key": Code(key),
                "verdict": Badge(verdict.verdict, VERDICT_BADGES[verdict.verdict]),
                "best at proxy": _power(carried),
                "drift (octaves per octave)": _drift(verdict),
                "worst regret": _regret(verdict.regret, verdict.regret_relative),
                "larger is better": {True: "yes", False: "no", None: "–"}[verdict.wider_is_better],
            }
        )
    compared = " The first variant is the study's; the others are shown for comparison." if variants else ""
    return Table(rows, f"Judged by {gathered.score}.{compared}")


def _power(log2: float | None) -> Number:
    return Number(log2, "–" if log2 is None else value_text(2.0**log2))


def _drift(verdict: TransferVerdict) -> Number:
    ends = verdict.drift_interval
    between = f" ({ends[0]:+.2f} to {ends[1]:+.2f})" if ends else ""
    return Number(verdict.drift, "–" if verdict.drift is None else f"{verdict.drift:+.2f}{between}")


def _regret(regret: float | None, relative: float | None) -> Number:
    if regret is not None and math.isinf(regret):
        return Number(None, "diverges")
    return Number(regret, number_text(regret, 3) + ("" if relative is None else f" ({100 * relative:.1f} %)"))


def by_scale(gathered: Gathered, verdict: TransferVerdict) -> Table:
    """The numbers of a verdict at each scale."""
    rows: list[Row] = []
    for entry in verdict.scales:
        optimum = entry.optimum
        ends = optimum.interval if optimum else None
        rows.append(
            {
                gathered.scale_word: Number(entry.scale, f"{entry.scale:g}"),
                "status": entry.status + (" (exception)" if entry.exception else ""),
                "best value": _power(entry.best_hp),
                f"its {gathered.score}": Number(entry.best_score, number_text(entry.best_score)),
                "fitted optimum (log2)": Number(optimum.at, f"{optimum.at:.2f}") if optimum else Number(None, "–"),
                "95 % interval": Number(ends[0], f"{ends[0]:.2f} to {ends[1]:.2f}") if ends else Number(None, "–"),
                "regret of the proxy's best": _regret(entry.regret, entry.regret_relative),
            }
        )
    return Table(rows)


def best_of_cells(gathered: Gathered) -> Table:
    """The best point of each variant and scale."""
    cells = [gathered.ranked(gathered.of(v, s))[:1] for v in gathered.variants for s in gathered.scales]
    return points(gathered, [point for cell in cells for point in cell], "The best point of each variant and scale.")


def best_at_proxy(gathered: Gathered, count: int = 15) -> Table:
    """The best points of the judged variant at the proxy."""
    judged = gathered.results.study.variants[0]
    ranked = gathered.ranked(gathered.of(judged, gathered.proxy))
    where = f" of {judged}" if judged else ""
    where += f" at {gathered.scale_name(gathered.proxy)}" if gathered.scaled else ""
    shown = ranked[:count]
    caption = f"The {len(shown)} best points{where} by {gathered.score}, of {len(ranked)} with a score."
    return points(gathered, shown, caption, cells=False)


def points(gathered: Gathered, shown: Sequence[Point], caption: str = "", cells: bool = True) -> Table:
    """Points with their values and scores; ``cells``: with their variant and scale."""
    rows: list[Row] = []
    for point in shown:
        row = _where(gathered, point.variant, point.scale) if cells else {}
        row |= {key: _value(point.hps[key]) for key in gathered.keys}
        row |= {score.name: _score(point, score.name) for score in gathered.results.study.spec.scores}
        numbers = ", ".join(str(run.number) for run in point.runs)
        rows.append(row | {"runs": Number(len(point.runs), str(len(point.runs))), "trials": numbers})
    return Table(rows, caption)


def _value(value: object) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Number(value, value_text(value))
    return value_text(value)


def _score(point: Point, name: str) -> Number:
    mean, spread = point.mean(name), point.spread(name)
    if mean is None:
        ended = {run.outcome for run in point.runs} - {"complete"}
        return Number(None, " and ".join(sorted(ended)) or "–")
    return Number(mean, number_text(mean) + (f" ± {number_text(spread, 2)}" if spread else ""))


def agreement(gathered: Gathered) -> Table:
    """Whether the scores rank the points alike."""
    names = [score.name for score in gathered.results.study.spec.scores]
    cells = [gathered.of(variant, scale) for variant in gathered.variants for scale in gathered.scales]
    rows: list[Row] = []
    for name in names:
        row: Row = {"": Code(name)}
        for other in names:
            found = [value for cell in cells if (value := _agreement(gathered, cell, name, other)) is not None]
            mean = float(np.mean(found)) if found else None
            row[other] = Number(mean, "–" if mean is None else f"{mean:+.2f}")
        rows.append(row)
    caption = "Spearman's rank correlation of the scores over points, signs turned so that +1 means that both prefer "
    return Table(rows, caption + "the same points" + ("; mean over variants and scales." if len(cells) > 1 else "."))


def _agreement(gathered: Gathered, cell: Sequence[Point], one: str, other: str) -> float | None:
    pairs = [(a, b) for p in cell if (a := p.mean(one)) is not None and (b := p.mean(other)) is not None]
    if len(pairs) < _FEW:
        return None
    x, y = (ranks(np.array(values)) for values in zip(*pairs, strict=True))
    if x.std() == 0 or y.std() == 0:
        return None
    sign = 1.0 if gathered.lower_is_better(one) == gathered.lower_is_better(other) else -1.0
    return sign * float(np.corrcoef(x, y)[0, 1])


def failures(gathered: Gathered, trials: Sequence[TrialResult], caption: str) -> Table:
    """Trials that did not complete, and why."""
    rows: list[Row] = [
        {"trial": Number(trial.number, str(trial.number))}
        | _where(gathered, trial.variant, trial.scale)
        | {
            "point": hps_text(trial.hps),
            "seed": Number(trial.seed, str(trial.seed)),
            "steps": Number(trial.steps, f"{trial.steps:,}"),
            "attempts": Number(trial.attempts, str(trial.attempts)),
            "reason": trial.reason or "–",
            # as seen from the study's directory, wherever that is by now: trials/0007
            "folder": Code("/".join(Path(trial.run_dir).parts[-2:])),
        }
        for trial in trials
    ]
    return Table(rows, caption)


def cost(gathered: Gathered) -> Table:
    """What the trials executed, by variant and scale."""
    trials = gathered.results.trials
    cells: dict[tuple[str, float | None], list[TrialResult]] = {}
    for trial in sorted(trials, key=lambda t: (gathered.results.study.variants.index(t.variant), t.scale or 0)):
        cells.setdefault((trial.variant, trial.scale), []).append(trial)
    rows = [_where(gathered, *cell) | _costs(found) for cell, found in cells.items()]
    if len(cells) > 1:
        first, *others = _where(gathered, *next(iter(cells)))
        rows.append({first: "all"} | dict.fromkeys(others, "") | _costs(trials))
    caption = "What was executed; a diverged or pruned trial counts what it ran. FLOPs: 3 x forward pass x images. "
    return Table(rows, caption + "Overhead: a trial's time outside its training steps.")


def _costs(trials: Sequence[TrialResult]) -> Row:
    diverged = sum(trial.outcome == DIVERGED for trial in trials)
    sizes = sorted({trial.parameters for trial in trials})
    images = sum(trial.steps * trial.global_batch for trial in trials)
    flops = math.fsum(trial.flops for trial in trials)
    seconds = math.fsum(trial.seconds for trial in trials)
    overhead = math.fsum(trial.overhead_s for trial in trials) / len(trials)
    size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return {
        "trials": Number(len(trials), f"{len(trials):,}"),
        "diverged": Number(diverged, f"{diverged} ({share_text(diverged, len(trials))})"),
        "parameters": Number(sizes[-1], size),
        "images": Number(images, f"{images:,}"),
        "FLOPs": Number(flops, f"{flops:.3g}"),
        "time": Number(seconds, duration_text(seconds)),
        "overhead a trial": Number(overhead, f"{overhead:.2g} s"),
    }
