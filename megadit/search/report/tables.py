"""The tables and badges of a report: each row says what stands in which column, so columns and cells always match."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadit.search.report.data import ReportData, subject
from megadit.search.report.rendering import Badge, Code, Number, TableCell, number
from megadit.search.results import COMPLETE, DIVERGED, ScoredPoint, TrialResult
from megadit.search.study.spec import ScoreSpec
from megadit.search.wording import duration_text, hps_text, number_text, share_text, value_text
from megadit.transfer.ties import ranks
from megadit.transfer.verdict import TransferVerdict

VERDICT_BADGES = {"transfers": "good", "does not transfer": "bad", "inconclusive": "unsure"}
_FEW = 4  # points below which a rank correlation says nothing
TableRow = dict[str, TableCell]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns; ``caption`` says what they are."""

    rows: Sequence[Mapping[str, TableCell]]
    caption: str = ""

    @property
    def columns(self) -> dict[str, bool]:
        """Names, and whether the column holds numbers, which are set flush right."""
        first = self.rows[0] if self.rows else {}
        return {name: any(isinstance(row[name], Number) for row in self.rows) for name in first}


def badges(data: ReportData) -> list[Badge]:
    """The verdicts on the judged variant, and the state of the study."""
    results = data.results
    verdicts = [
        Badge(f"{subject(variant, key)}: {verdict.verdict}", VERDICT_BADGES[verdict.verdict])
        for (variant, key), verdict in data.verdicts.items()
        if variant == data.judged
    ]
    if not verdicts and data.scale_word:
        verdicts = [Badge("no verdict")]
    if results.complete:
        return [*verdicts, Badge("complete")]
    return [*verdicts, Badge(f"incomplete: {len(results.trials)} of {results.planned} trials have ended", "unsure")]


def _cell(data: ReportData, variant: str, scale: float | None) -> TableRow:
    """Columns for the variant and the scale, where the study has several."""
    return _variant(data, variant) | ({data.scale_word: number(scale, ".6g")} if data.scale_word else {})


def _variant(data: ReportData, variant: str) -> TableRow:
    return {"variant": variant} if len(data.results.study.variants) > 1 else {}


def verdicts(data: ReportData) -> Table:
    """The verdict on each variant and key with the numbers that made it."""
    rows = []
    for (variant, key), verdict in data.verdicts.items():
        interval = verdict.drift_interval
        row: TableRow = {
            "key": Code(key),
            "verdict": Badge(verdict.verdict, VERDICT_BADGES[verdict.verdict]),
            "best at proxy": _power(next((s.best_log2 for s in verdict.scales if s.scale == verdict.proxy), None)),
            "drift (octaves per octave)": number(
                verdict.drift, "+.2f", f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else ""
            ),
            "worst regret": _regret(verdict.regret, verdict.regret_relative),
            "larger is better": {True: "yes", False: "no", None: "–"}[verdict.wider_is_better],
        }
        rows.append(_variant(data, variant) | row)
    compared = " The first variant is the study's; the others are shown for comparison."
    return Table(rows, f"Judged by {data.score}.{compared if len(data.results.study.variants) > 1 else ''}")


def _power(log2: float | None) -> Number:
    return Number(log2, "–" if log2 is None else value_text(2.0**log2))


def _regret(regret: float | None, relative: float | None) -> Number:
    if regret is not None and math.isinf(regret):
        return Number(None, "diverges")
    return number(regret, ".3g", "" if relative is None else f" ({100 * relative:.1f} %)")


def by_scale(data: ReportData, verdict: TransferVerdict) -> Table:
    """The numbers of a verdict at each scale."""
    rows: list[TableRow] = []
    for scale in verdict.scales:
        low, high = scale.optimum.interval if scale.optimum else (None, 0.0)
        row: TableRow = {
            data.scale_word: number(scale.scale, "g"),
            "status": scale.status + (" (exception)" if scale.exception else ""),
            "best value": _power(scale.best_log2),
            f"its {data.score}": number(scale.best_score),
            "fitted optimum (log2)": number(scale.optimum.at if scale.optimum else None, ".2f"),
            "95 % interval": number(low, ".2f", f" to {high:.2f}" if scale.optimum else ""),
            "regret of the proxy's best": _regret(scale.regret, scale.regret_relative),
        }
        rows.append(row)
    return Table(rows)


def best_of_cells(data: ReportData) -> Table:
    """The best point of each variant and scale."""
    best = [point for v in data.variants for scale in data.scales for point in data.ranked(data.of(v, scale))[:1]]
    return points(data, best, "The best point of each variant and scale.")


def best_at_proxy(data: ReportData, count: int = 15) -> Table:
    """The best points of the judged variant at the proxy."""
    ranked = data.ranked(data.of(data.judged, data.proxy))
    where = (f" of {data.judged}" if data.judged else "") + data.scale_name(data.proxy, " at ")
    caption = f"The {len(ranked[:count])} best points{where} by {data.score}, of {len(ranked)} with a score."
    return points(data, ranked[:count], caption, cells=False)


def points(data: ReportData, shown: Sequence[ScoredPoint], caption: str = "", cells: bool = True) -> Table:
    """Points with their values and scores; ``cells``: with their variant and scale."""
    rows: list[TableRow] = [
        (_cell(data, point.variant, point.scale) if cells else {})
        | {key: _value(point.hps[key]) for key in data.keys}
        | {score.name: _score(point, score.name) for score in data.results.study.spec.scores}
        | {"runs": number(len(point.runs), "d"), "trials": ", ".join(map(str, point.trials))}
        for point in shown
    ]
    return Table(rows, caption)


def _value(value: object) -> TableCell:
    text = value_text(value)
    return Number(value, text) if isinstance(value, int | float) and not isinstance(value, bool) else text


def _score(point: ScoredPoint, name: str) -> Number:
    mean, spread = point.mean(name), point.spread(name)
    if mean is None:
        return Number(None, " and ".join(sorted({run.outcome for run in point.runs} - {COMPLETE})) or "–")
    return number(mean, note=f" ± {number_text(spread, '.2g')}" if spread else "")


def agreement(data: ReportData) -> Table:
    """Whether the scores rank the points alike."""
    scores = data.results.study.spec.scores
    cells = [data.of(variant, scale) for variant in data.variants for scale in data.scales]
    rows: list[TableRow] = [
        {"": Code(score.name)} | {other.name: _agreement(cells, score, other) for other in scores} for score in scores
    ]
    caption = "Spearman's rank correlation of the scores over points, signs turned so that +1 means that both prefer "
    return Table(rows, caption + "the same points" + ("; mean over variants and scales." if len(cells) > 1 else "."))


def _agreement(cells: Sequence[Sequence[ScoredPoint]], *pair: ScoreSpec) -> TableCell:
    """Spearman's, of the points that have both scores; no number where they are few or one score does not vary."""
    known = []
    for cell in cells:
        losses = [score.sign * np.array([point.mean(score.name) for point in cell], dtype=float) for score in pair]
        both = np.isfinite(losses).all(axis=0)
        x, y = (ranks(loss[both]) for loss in losses)
        if len(x) >= _FEW and x.std() > 0 and y.std() > 0:
            known.append(np.corrcoef(x, y)[0, 1])
    return number(float(np.mean(known)) if known else None, "+.2f")


def failures(data: ReportData, trials: Sequence[TrialResult], caption: str) -> Table:
    """Trials that did not complete, and why."""
    rows: list[TableRow] = [
        {"trial": number(trial.number, "d")}
        | _cell(data, trial.variant, trial.scale)
        | {
            "point": hps_text(trial.hps),
            "seed": number(trial.seed, "d"),
            "steps": number(trial.steps, ","),
            "attempts": number(trial.attempts, "d"),
            "reason": trial.reason or "–",
            # as seen from the study's directory, wherever that is by now: trials/0007
            "folder": Code("/".join(Path(trial.run_dir).parts[-2:])),
        }
        for trial in trials
    ]
    return Table(rows, caption)


def cost(data: ReportData) -> Table:
    """What the trials executed, by variant and scale."""
    variants = data.results.study.variants
    trials = sorted(data.results.trials, key=lambda trial: (variants.index(trial.variant), trial.scale or 0))
    cells = itertools.groupby(trials, key=lambda trial: (trial.variant, trial.scale))
    rows = [_cell(data, *cell) | _costs(list(group)) for cell, group in cells]
    if len(rows) > 1:
        first, *others = _cell(data, "", None)
        rows.append({first: "all"} | dict.fromkeys(others, "") | _costs(trials))
    caption = "What was executed; a diverged or pruned trial counts what it ran. FLOPs: 3 x forward pass x images. "
    return Table(rows, caption + "Overhead: a trial's time outside its training steps.")


def _costs(trials: Sequence[TrialResult]) -> TableRow:
    diverged = sum(trial.outcome == DIVERGED for trial in trials)
    sizes = [trial.parameters for trial in trials]
    seconds = math.fsum(trial.seconds for trial in trials)
    return {
        "trials": number(len(trials), ","),
        "diverged": Number(diverged, f"{diverged} ({share_text(diverged, len(trials))})"),
        "parameters": Number(max(sizes), " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))),
        "images": number(sum(trial.steps * trial.global_batch for trial in trials), ","),
        "FLOPs": number(math.fsum(trial.flops for trial in trials), ".3g"),
        "time": Number(seconds, duration_text(seconds)),
        "overhead a trial": number(math.fsum(trial.overhead_s for trial in trials) / len(trials), ".2g", " s"),
    }
