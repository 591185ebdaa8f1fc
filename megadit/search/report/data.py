"""What every section of a report draws on: a study's results, the verdicts on them, its points and its words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megadit.errors import UserError
from megadit.search.report.importance import Importance, measure_importance
from megadit.search.results import ScoredPoint, StudyResults
from megadit.search.selection import SelectedPoint, select
from megadit.search.verify_study import proxy_of, verify_study
from megadit.search.wording import hps_text, number_text
from megadit.transfer.ties import ranks
from megadit.transfer.verdict import TransferVerdict

_SCALE_WORDS = {"model.width": "width", "train.global_batch": "batch", "train.steps": "steps"}


@dataclass(frozen=True)
class ReportData:
    """A study's results with what follows from them.

    ``verdicts``: by variant and searched key; ``no_verdict``: reasons why there is none, with what they are about.
    ``selected``: the study's choice by its own score and rule, or the reason why there is none. ``selected_at``: the
    scale of the choice, the same at which ``apply`` chooses; None without one.
    """

    results: StudyResults
    verdicts: Mapping[tuple[str, str], TransferVerdict]
    no_verdict: Mapping[str, list[str]]
    selected: SelectedPoint | str
    selected_at: int | None

    @cached_property
    def points(self) -> list[ScoredPoint]:
        """Points with at least one trial that ended, in the order of variants, scales and first trials."""
        return self.results.points()

    @cached_property
    def variants(self) -> list[str]:
        """Variants that have points, the judged one first."""
        return list(dict.fromkeys(point.variant for point in self.points))

    @cached_property
    def scales(self) -> list[float]:
        """Scale values that have points, ascending; in a study without scale one, which is not shown."""
        return sorted({point.scale for point in self.points})

    @property
    def keys(self) -> tuple[str, ...]:
        """The searched keys."""
        return self.results.study.space.keys

    @property
    def judged(self) -> str:
        """The variant that verdicts and selection are about: the first of the study."""
        return self.results.study.variants[0]

    @property
    def score(self) -> str:
        """The name of the score by which the study selects."""
        return self.results.study.spec.selection_score.name

    @property
    def sign(self) -> float:
        """What makes lower values of the score the better ones."""
        return self.results.study.spec.selection_score.sign

    @property
    def proxy(self) -> float:
        """The scale that selection and importance look at."""
        value = self.results.study.proxy_scale
        return float(self.results.study.base.model.width if value is None else value)

    @property
    def scale_word(self) -> str:
        """What is scaled: ``width``, ``batch``, ``steps``; empty in a study without scale."""
        scale = self.results.study.spec.scale
        return _SCALE_WORDS[scale.key] if scale else ""

    def scale_name(self, scale: float, before: str = "") -> str:
        """A scale in words, ``width 64``, after ``before``; empty in a study without scale."""
        return f"{before}{self.scale_word} {scale:g}" if self.scale_word else ""

    def of(self, variant: str, scale: float | None = None) -> list[ScoredPoint]:
        """Points of a variant at a scale (None: at all) without a pruned or failed run; they can be compared."""
        points = [point for point in self.points if point.variant == variant and scale in (None, point.scale)]
        return [point for point in points if point.comparable]

    def means(self, points: Sequence[ScoredPoint]) -> list[float]:
        """The mean scores of those that have one."""
        return [mean for point in points if (mean := point.mean(self.score)) is not None]

    def ranked(self, points: Sequence[ScoredPoint]) -> list[ScoredPoint]:
        """Those with a mean score, the best first."""
        scored = [point for point in points if point.mean(self.score) is not None]
        order = np.argsort(ranks([self.sign * mean for mean in self.means(scored)]), kind="stable")
        return [scored[index] for index in order]

    @cached_property
    def importance(self) -> Importance | str:
        """How much each key decides about the score at the proxy, or a sentence that says why that is not known."""
        points = self.of(self.judged, self.proxy)
        return measure_importance([(point.hps, point.mean(self.score)) for point in points], self.sign > 0)

    def tooltip(self, point: ScoredPoint) -> str:
        """A point in a few lines: variant and scale, values, scores, trials."""
        lines = [", ".join(filter(None, (point.variant, self.scale_name(point.scale)))), hps_text(point.hps)]
        for score in self.results.study.spec.scores:
            spread = point.spread(score.name)
            between = f" ± {number_text(spread, '.2g')} between seeds" if spread else ""
            lines.append(f"{score.name} {number_text(point.mean(score.name))}{between}")
        if point.diverged:
            lines.append(f"diverged ({point.diverged} of {len(point.runs)} runs)")
        lines.append("trials " + ", ".join(map(str, point.trials)))
        return "\n".join(filter(None, lines))


def analyse(results: StudyResults) -> ReportData:
    """Judge every variant and searched key, and select a point, by the study's own score and rule."""
    study = results.study
    verdicts: dict[tuple[str, str], TransferVerdict] = {}
    no_verdict: dict[str, list[str]] = {}
    for variant, key in itertools.product(study.variants, study.space.keys) if study.spec.scale else ():
        try:
            verdicts[variant, key] = verify_study(results, study.spec.selection_score.name, variant, hp=key)
        except UserError as reason:
            no_verdict.setdefault(str(reason), []).append(subject(variant, key))
    judged = (verdict for (variant, _), verdict in verdicts.items() if variant == study.variants[0])
    scale = proxy_of(results, next(judged, None))
    try:
        return ReportData(results, verdicts, no_verdict, select(results, scale=scale), scale)
    except UserError as reason:
        return ReportData(results, verdicts, no_verdict, str(reason), scale)


def subject(variant: str, key: str) -> str:
    """What a verdict is on: ``optim.lr under sp``."""
    return f"{key} under {variant}" if variant else key
