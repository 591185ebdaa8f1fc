"""The sections of a report that answer the study's question: state, verdict, curves, choice, points, importance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megadit.errors import UserError
from megadit.search.report.blocks import (
    Badge,
    Block,
    Bullets,
    Code,
    Facts,
    Folded,
    Inline,
    Number,
    Section,
    Table,
    Text,
)
from megadit.search.report.curves import curve_figure
from megadit.search.report.importance import measure_importance
from megadit.search.report.plots import importance_figure, parallel_figure, slice_figure
from megadit.search.report.points import Gathered, Point
from megadit.search.report.words import (
    counted,
    duration_text,
    hps_text,
    number_text,
    scale_word,
    share_text,
)
from megadit.search.results import DIVERGED, StudyResults
from megadit.search.selection import Choice, select
from megadit.search.verify_study import proxy_of, verify_study
from megadit.search.wording import value_text
from megadit.transfer.verdict import Verdict

MOODS = {"transfers": "good", "does not transfer": "bad", "inconclusive": "unsure"}
_MEASURES = ("best at proxy", "drift (octaves per octave)", "worst regret", "larger is better")
_SHOWN = 15  # points in the table of the best ones


@dataclass(frozen=True)
class Findings:
    """The verdict on each (variant, searched key), or the sentence why there is none; the choice likewise.

    ``chosen_at``: the scale of the choice, where ``apply`` chooses too.
    """

    verdicts: Mapping[tuple[str, str], Verdict]
    no_verdict: Mapping[tuple[str, str], str]
    choice: Choice | None
    no_choice: str
    chosen_at: int | None


def conclude(results: StudyResults) -> Findings:
    """Judge every variant and searched key, and choose a point, by the study's own score and rule."""
    verdicts: dict[tuple[str, str], Verdict] = {}
    missing: dict[tuple[str, str], str] = {}
    score = results.study.spec.selection_score.name
    for variant in results.study.variants if results.study.spec.scale is not None else ():
        for key in results.study.space.keys:
            try:
                verdicts[variant, key] = verify_study(results, score, variant, hp=key)
            except UserError as reason:
                missing[variant, key] = str(reason)
    judged = (verdict for (variant, _), verdict in verdicts.items() if variant == results.study.variants[0])
    scale = proxy_of(results, next(judged, None))
    try:
        return Findings(verdicts, missing, select(results, scale=scale), "", scale)
    except UserError as reason:
        return Findings(verdicts, missing, None, str(reason), scale)


def badges(results: StudyResults, findings: Findings) -> tuple[Badge, ...]:
    """State of the study and the verdict on its judged variant."""
    if results.complete:
        state = Badge("complete", "plain")
    else:
        state = Badge(f"incomplete: {len(results.trials)} of {results.planned} trials have ended", "unsure")
    judged = results.study.variants[0]
    found = [(key, v.verdict) for (variant, key), v in findings.verdicts.items() if variant == judged]
    if not found:
        return (Badge("no verdict", "plain"), state) if results.study.spec.scale is not None else (state,)
    under = f" under {judged}" if judged else ""
    return (*(Badge(f"{key}{under}: {answer}", MOODS[answer]) for key, answer in found), state)


def overview(gathered: Gathered, findings: Findings) -> Section:
    """The few figures that sum the study up."""
    results = gathered.results
    spec, trials = results.study.spec, results.trials
    diverged = sum(trial.outcome == DIVERGED for trial in trials)
    to_come = f"{results.running} running, {results.waiting} waiting" if not results.complete else "none left to run"
    facts = [("Trials ended", f"{len(trials)} of {results.planned}", to_come)]
    if findings.choice is not None:
        choice = findings.choice
        where = "" if findings.chosen_at is None else f", at {gathered.scale_name(findings.chosen_at)}"
        label = "Chosen" if results.complete else "Best so far"
        facts.append((label, hps_text(choice.hps, ",\n"), f"rule {choice.rule}{where}"))
        facts.append((f"Its {choice.score}", number_text(choice.value), f"mean over {counted(choice.seeds, 'seed')}"))
    facts.append(("Diverged", f"{diverged}", f"{share_text(diverged, len(trials))} of the trials that ended"))
    facts.append(("Compute", f"{sum(t.flops for t in trials):.3g} FLOPs", "executed, diverged trials among them"))
    facts.append(("Time", duration_text(sum(t.seconds for t in trials)), "summed over trials"))
    blocks: list[Block] = [Facts(tuple(facts))]
    if findings.no_choice:
        blocks.append(Text((f"Nothing is chosen: {findings.no_choice}",)))
    blocks.append(Text(tuple(_design(results))))
    if spec.sampler == "tpe":
        blocks.append(Text(("TPE tries the promising places more often: points are not spread evenly.",)))
    return Section("Overview", "overview", tuple(blocks))


def _design(results: StudyResults) -> list[Inline]:
    """One paragraph: what was run."""
    spec, study = results.study.spec, results.study
    model, train = study.base.model, study.base.train
    parts: list[Inline] = [f"A {model.family} of depth {model.depth}"]
    if spec.scale is None:
        parts.append(f" and width {model.width}")
    if model.base_width is not None:
        parts.append(f", base width {model.base_width}")
    length = f"{train.epochs:g} epochs" if train.steps is None else f"{train.steps:,} steps"
    steps = "" if spec.scale is not None and spec.scale.key == "train.steps" else f", {length}"
    batch = "" if spec.scale is not None and spec.scale.key == "train.global_batch" else f", batch {train.global_batch}"
    parts.append(f"{steps}{batch}. Searched: ")
    for index, dimension in enumerate(study.space.dimensions):
        values = [value_text(value) for value in dimension.values]
        told = f"{', '.join(values)}" if dimension.listed else f"{values[0]} to {values[1]}"
        parts += ["; " if index else "", Code(dimension.key), f" ({dimension.kind.replace('_', '-')}: {told})"]
    points = f" of {counted(spec.trials, 'point')}" if spec.trials else ""
    parts.append(f". Sampler {spec.sampler}{points}, seeds {', '.join(map(str, spec.seeds))}.")
    if spec.scale is not None:
        parts += [" Scaled: ", Code(spec.scale.key), f" over {', '.join(map(str, spec.scale.values))}"]
        parts.append(f", proxy {spec.scale.proxy_value}")
        parts.append("; one run scores all of them." if study.horizons else ".")
    return parts


def verdict_section(gathered: Gathered, findings: Findings) -> Section | None:
    """The verdicts with the numbers that made them; None in a study without scale."""
    if not gathered.scaled:
        return None
    blocks: list[Block] = []
    rows: list[list[Inline]] = []
    variants = len(gathered.results.study.variants) > 1
    for (variant, key), verdict in findings.verdicts.items():
        home = next((entry for entry in verdict.scales if entry.scale == verdict.proxy), None)
        carried = home.best_hp if home is not None else None
        rows.append(
            [
                *([variant] if variants else []),
                Code(key),
                Badge(verdict.verdict, MOODS[verdict.verdict]),
                Number(carried, "–" if carried is None else value_text(2.0**carried)),
                Number(verdict.drift, _drift(verdict)),
                Number(verdict.regret, _regret(verdict.regret, verdict.regret_relative)),
                {True: "yes", False: "no", None: "–"}[verdict.wider_is_better],
            ]
        )
    if rows:
        columns = [*(["variant"] if variants else []), "key", "verdict", *_MEASURES]
        caption = f"Judged by {gathered.score}."
        caption += " The first variant is the study's; the others are shown for comparison." if variants else ""
        blocks.append(Table(columns, rows, caption, frozenset(_MEASURES[:3])))
    reasons: dict[str, list[str]] = {}
    for (variant, key), why in findings.no_verdict.items():
        reasons.setdefault(why, []).append(_about(variant, key))
    blocks += [Text((f"No verdict on {', '.join(what)}: {why}",)) for why, what in reasons.items()]
    for (variant, key), verdict in findings.verdicts.items():
        blocks.append(Text((f"Why, for {_about(variant, key)}:",)))
        blocks.append(Bullets(tuple(verdict.reasons)))
        blocks.append(Folded(f"Numbers by scale, {_about(variant, key)}", _by_scale(gathered, verdict)))
    return Section("Verdict", "verdict", tuple(blocks))


def _about(variant: str, key: str) -> str:
    return f"{key} under {variant}" if variant else key


def _drift(verdict: Verdict) -> str:
    if verdict.drift is None:
        return "–"
    if verdict.drift_interval is None:
        return f"{verdict.drift:+.2f}"
    return f"{verdict.drift:+.2f} ({verdict.drift_interval[0]:+.2f} to {verdict.drift_interval[1]:+.2f})"


def _regret(regret: float | None, relative: float | None) -> str:
    if regret is None:
        return "–"
    if math.isinf(regret):
        return "diverges"
    return number_text(regret, 3) + ("" if relative is None else f" ({100 * relative:.1f} %)")


def _by_scale(gathered: Gathered, verdict: Verdict) -> Table:
    columns = (
        scale_word(gathered.results.study.spec.scale.key if gathered.results.study.spec.scale else None),
        "status",
        "best value",
        f"its {gathered.score}",
        "fitted optimum (log2)",
        "95 % interval",
        "regret of the proxy's best",
    )
    rows: list[list[Inline]] = []
    for entry in verdict.scales:
        optimum = entry.optimum
        rows.append(
            [
                Number(entry.scale, f"{entry.scale:g}"),
                entry.status + (" (exception)" if entry.exception else ""),
                Number(entry.best_hp, "–" if entry.best_hp is None else value_text(2.0**entry.best_hp)),
                Number(entry.best_score, number_text(entry.best_score)),
                Number(optimum.at, f"{optimum.at:.2f}") if optimum else "–",
                f"{optimum.interval[0]:.2f} to {optimum.interval[1]:.2f}" if optimum else "–",
                Number(entry.regret, _regret(entry.regret, entry.regret_relative)),
            ]
        )
    return Table(columns, rows, "", frozenset({columns[0], *columns[2:]}))


def curves_section(gathered: Gathered, findings: Findings) -> Section | None:
    """Score against each searched key where all combinations were run; None for other studies of several keys."""
    study = gathered.results.study
    if len(gathered.keys) > 1 and study.spec.sampler != "grid":
        return None
    blocks: list[Block] = []
    for key in gathered.keys:
        about = {variant: verdict for (variant, judged), verdict in findings.verdicts.items() if judged == key}
        figure = curve_figure(gathered, key, about)
        if figure is not None:
            blocks.append(figure)
    if not blocks:
        blocks.append(Text((f"No trial has a value of {gathered.score} yet, so there is nothing to draw.",)))
    side = ", variants side by side" if len(study.variants) > 1 else ""
    return Section(f"{gathered.score} against {' and '.join(gathered.keys)}{side}", "curves", tuple(blocks))


def best_section(gathered: Gathered) -> Section:
    """The best point of each cell, the best points at the proxy, and all points."""
    blocks: list[Block] = []
    if gathered.scaled:
        cells = [gathered.ranked(gathered.of(v, s))[:1] for v in gathered.variants for s in gathered.scales]
        found = [point for cell in cells for point in cell]
        blocks.append(_points_table(gathered, found, "The best point of each variant and scale.", cells=True))
    judged = gathered.results.study.variants[0]
    home = gathered.ranked(gathered.of(judged, gathered.proxy))
    if len(gathered.keys) > 1 or not gathered.scaled:
        where = f" of {judged}" if judged else ""
        where += f" at {gathered.scale_name(gathered.proxy)}" if gathered.scaled else ""
        caption = f"The {min(_SHOWN, len(home))} best points{where} by {gathered.score}, of {len(home)} with a score."
        blocks.append(_points_table(gathered, home[:_SHOWN], caption, cells=False))
    everything = _points_table(gathered, gathered.points, "", cells=True)
    blocks.append(Folded(f"All {counted(len(gathered.points), 'point')}", everything))
    return Section("Best trials", "best", tuple(blocks))


def _points_table(gathered: Gathered, points: list[Point] | tuple[Point, ...], caption: str, cells: bool) -> Table:
    spec = gathered.results.study.spec
    variants = cells and len(gathered.results.study.variants) > 1
    scales = cells and gathered.scaled
    scores = [score.name for score in spec.scores]
    word = scale_word(spec.scale.key if spec.scale else None)
    columns = [*(["variant"] if variants else []), *([word] if scales else []), *gathered.keys, *scores]
    columns += ["runs", "trials"]
    rows: list[list[Inline]] = []
    for point in points:
        row: list[Inline] = [point.variant] if variants else []
        row += [Number(point.scale, f"{point.scale:g}")] if scales else []
        row += [_value_cell(point.hps[key]) for key in gathered.keys]
        row += [_score_cell(point, name) for name in scores]
        row += [Number(len(point.runs), str(len(point.runs))), ", ".join(str(run.number) for run in point.runs)]
        rows.append(row)
    return Table(columns, rows, caption, frozenset({word, "runs", *gathered.keys, *scores}))


def _value_cell(value: object) -> Inline:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Number(float(value), value_text(value))
    return value_text(value)


def _score_cell(point: Point, name: str) -> Number:
    mean, spread = point.mean(name), point.spread(name)
    if mean is None:
        ended = {run.outcome for run in point.runs} - {"complete"}
        return Number(None, " and ".join(sorted(ended)) or "–")
    return Number(mean, number_text(mean) + (f" ± {number_text(spread, 2)}" if spread else ""))


def importance_section(gathered: Gathered) -> Section | None:
    """Which keys decide; None where only one was searched."""
    if len(gathered.keys) < 2:
        return None
    judged = gathered.results.study.variants[0]
    points = [point for point in gathered.of(judged, gathered.proxy) if point.finished]
    scored = [(p.hps, math.nan if (mean := p.mean(gathered.score)) is None else mean) for p in points]
    found = measure_importance(scored, gathered.lower_is_better())
    block: Block = Text((found,)) if isinstance(found, str) else importance_figure(found)
    return Section("Importance", "importance", (block,))


def slices_section(gathered: Gathered) -> Section | None:
    """Score against each key, and all keys together; None where only one was searched."""
    if len(gathered.keys) < 2:
        return None
    figures: list[Block] = []
    for variant in gathered.variants:
        named = Text((f"Variant {variant}:",)) if variant else None
        found = [figure for figure in (slice_figure(gathered, variant), parallel_figure(gathered, variant)) if figure]
        figures += [named, *found] if named and found else found
    if not figures:
        figures = [Text((f"No trial has a value of {gathered.score} yet, so there is nothing to draw.",))]
    return Section("Slices and parallel coordinates", "slices", tuple(figures))
