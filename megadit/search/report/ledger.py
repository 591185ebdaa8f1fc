"""The sections of a report that keep the books: agreement of scores, failures, cost, the study file."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megadit.config.loading.sources import display
from megadit.files.yaml_text import dump_yaml
from megadit.search.report.blocks import Block, Code, Folded, Inline, Number, Section, Table, Text
from megadit.search.report.points import Gathered, Point
from megadit.search.report.words import (
    counted,
    duration_text,
    hps_text,
    number_text,
    scale_word,
    share_text,
)
from megadit.search.results import DIVERGED, FAILED, PRUNED, TrialResult
from megadit.transfer.ties import ranks

_FEW = 4  # points below which a rank correlation says nothing


def agreement_section(gathered: Gathered) -> Section | None:
    """Whether the scores rank the points alike; None where there is one score."""
    names = [score.name for score in gathered.results.study.spec.scores]
    if len(names) < 2:
        return None
    cells = [gathered.of(variant, scale) for variant in gathered.variants for scale in gathered.scales]
    rows: list[list[Inline]] = []
    for name in names:
        row: list[Inline] = [Code(name)]
        for other in names:
            found = [value for cell in cells if (value := _agreement(gathered, cell, name, other)) is not None]
            row.append(Number(np.mean(found).item(), f"{np.mean(found):+.2f}") if found else "–")
        rows.append(row)
    caption = "Spearman's rank correlation of the scores over points, signs turned so that +1 means that both prefer "
    caption += "the same points" + ("; mean over variants and scales." if len(cells) > 1 else ".")
    return Section("Do the scores agree?", "scores", (Table(["", *names], rows, caption, frozenset(names)),))


def _agreement(gathered: Gathered, points: Sequence[Point], one: str, other: str) -> float | None:
    pairs = [(a, b) for p in points if (a := p.mean(one)) is not None and (b := p.mean(other)) is not None]
    if len(pairs) < _FEW:
        return None
    x, y = (ranks(np.array(values)) for values in zip(*pairs, strict=True))
    if x.std() == 0 or y.std() == 0:
        return None
    sign = 1.0 if gathered.lower_is_better(one) == gathered.lower_is_better(other) else -1.0
    return sign * float(np.corrcoef(x, y)[0, 1])


def failures_section(gathered: Gathered) -> Section:
    """What diverged, was pruned or failed, and why."""
    trials = gathered.results.trials
    bad = [trial for trial in trials if trial.outcome in (DIVERGED, PRUNED, FAILED)]
    if not bad:
        told = "No trial diverged, was pruned or failed." if trials else "No trial has ended yet."
        return Section("Failures", "failures", (Text((told,)),))
    counts = {kind: sum(trial.outcome == kind for trial in bad) for kind in (DIVERGED, PRUNED, FAILED)}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    told = f"Of {counted(len(trials), 'trial')}: {told}. A diverged trial is a result, not a fault."
    blocks: list[Block] = [Text((told,))]
    for kind in (FAILED, PRUNED, DIVERGED):
        found = [trial for trial in bad if trial.outcome == kind]
        if found:
            table = _failures_table(gathered, found)
            blocks.append(table if kind == FAILED else Folded(f"{kind}: {counted(len(found), 'trial')}", table))
    return Section("Failures", "failures", tuple(blocks))


def _failures_table(gathered: Gathered, trials: Sequence[TrialResult]) -> Table:
    variants = len(gathered.results.study.variants) > 1
    columns = ["trial", *(["variant"] if variants else []), *([_word(gathered)] if gathered.scaled else [])]
    columns += ["point", "seed", "steps", "attempts", "reason", "folder"]
    rows: list[list[Inline]] = []
    for trial in trials:
        row: list[Inline] = [Number(trial.number, str(trial.number)), *([trial.variant] if variants else [])]
        row += [Number(trial.scale, number_text(trial.scale, 6))] if gathered.scaled else []
        row += [hps_text(trial.hps), Number(trial.seed, str(trial.seed)), Number(trial.steps, f"{trial.steps:,}")]
        row += [Number(trial.attempts, str(trial.attempts)), trial.reason or "–", Code(_folder(trial))]
        rows.append(row)
    caption = f"Trials that {'failed' if trials[0].outcome == FAILED else 'were ' + PRUNED}"
    caption = "Trials that diverged" if trials[0].outcome == DIVERGED else caption
    return Table(columns, rows, caption + ".", frozenset({"trial", "seed", "steps", "attempts", _word(gathered)}))


def _word(gathered: Gathered) -> str:
    scale = gathered.results.study.spec.scale
    return scale_word(scale.key if scale else None)


def _folder(trial: TrialResult) -> str:
    """The trial's run directory as seen from the study's, wherever that is by now: ``trials/0007``."""
    return "/".join(Path(trial.run_dir).parts[-2:])


def cost_section(gathered: Gathered) -> Section:
    """What the trials executed, by variant and scale."""
    trials = gathered.results.trials
    if not trials:
        return Section("Cost", "cost", (Text(("Nothing has been spent yet.",)),))
    cells: dict[tuple[str, float | None], list[TrialResult]] = {}
    for trial in sorted(trials, key=lambda t: (gathered.results.study.variants.index(t.variant), t.scale or 0)):
        cells.setdefault((trial.variant, trial.scale), []).append(trial)
    variants = len(gathered.results.study.variants) > 1
    head = [*(["variant"] if variants else []), *([_word(gathered)] if gathered.scaled else [])]
    rows = []
    for (variant, scale), found in cells.items():
        named: list[Inline] = [variant] if variants else []
        named += [Number(scale, number_text(scale, 6))] if gathered.scaled else []
        rows.append([*named, *_costs(found)])
    if len(cells) > 1:
        blanks: list[Inline] = [""] * (len(head) - 1)
        rows.append(["all", *blanks, *_costs(list(trials))])
    columns = ["trials", "diverged", "parameters", "images", "FLOPs", "time", "overhead a trial"]
    caption = "What was executed; a diverged or pruned trial counts what it ran. FLOPs: 3 x forward pass x images. "
    caption += "Overhead: a trial's time outside its training steps."
    blocks: list[Block] = [Table([*head, *columns], rows, caption, frozenset([*columns, _word(gathered)]))]
    wasted = sum(trial.flops for trial in trials if trial.outcome == DIVERGED)
    if wasted:
        share = share_text(wasted, sum(trial.flops for trial in trials))
        blocks.append(Text((f"Trials that diverged took {share} of the FLOPs.",)))
    return Section("Cost", "cost", tuple(blocks))


def _costs(trials: Sequence[TrialResult]) -> list[Inline]:
    diverged = sum(trial.outcome == DIVERGED for trial in trials)
    sizes = sorted({trial.parameters for trial in trials})
    images = sum(trial.steps * trial.global_batch for trial in trials)
    flops = math.fsum(trial.flops for trial in trials)
    seconds = math.fsum(trial.seconds for trial in trials)
    overhead = math.fsum(trial.overhead_s for trial in trials) / len(trials)
    size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return [
        Number(len(trials), f"{len(trials):,}"),
        Number(diverged, f"{diverged} ({share_text(diverged, len(trials))})"),
        Number(sizes[-1], size),
        Number(images, f"{images:,}"),
        Number(flops, f"{flops:.3g}"),
        Number(seconds, duration_text(seconds)),
        Number(overhead, f"{overhead:.2g} s"),
    ]


def study_section(gathered: Gathered) -> Section:
    """The study's definition, and how to go on from here."""
    study = gathered.results.study
    values = study.spec.model_dump(mode="json", exclude={"base"}, exclude_defaults=True)
    name = study.spec.name
    blocks: list[Block] = [
        Text(
            (
                "Whole, with the base configuration in place, it is ",
                Code("study.yaml"),
                " beside this report.",
            )
        ),
        Folded("The study's keys", Code(dump_yaml(values))),
    ]
    folder = shlex.quote(display(study.folder))
    steps: list[Inline] = ["Next: "]
    if not gathered.results.complete:
        steps += [Code(f"python launch/sweep.py run --config {folder}"), " goes on; "]
    if study.spec.scale is not None:
        steps += [Code(f"python tools/transfer.py verify {folder}"), " judges again; "]
    steps += [Code(f"python tools/transfer.py apply {folder} --target CONFIG"), " writes the target's configuration."]
    blocks.append(Text(tuple(steps)))
    return Section(f"Study {name}", "study", tuple(blocks))
