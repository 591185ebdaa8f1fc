"""Trials of one point pooled over their seeds: what tables and figures show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megadit.search.results import COMPLETE, DIVERGED, Observation, StudyResults
from megadit.search.wording import hps_text, number_text
from megadit.transfer.ties import ranks


@dataclass(frozen=True)
class Point:
    """One assignment of the hyperparameters in one cell, with its trials that ended (``runs``, by seed)."""

    variant: str
    scale: float
    hps: dict[str, Any]
    runs: tuple[Observation, ...]

    @property
    def diverged(self) -> int:
        """How many of its runs diverged."""
        return sum(run.outcome == DIVERGED for run in self.runs)

    @property
    def finished(self) -> bool:
        """Whether it can be compared: no run was pruned, failed or is without scores, but one may have diverged."""
        return all(run.outcome in (COMPLETE, DIVERGED) for run in self.runs)

    def scores(self, name: str) -> list[float]:
        """The finite scores of its runs."""
        found = (run.scores.get(name) for run in self.runs if run.outcome == COMPLETE)
        return [score for score in found if score is not None and math.isfinite(score)]

    def mean(self, name: str) -> float | None:
        """Mean over seeds; None where a run has none: a point that diverges under one seed is not one to use."""
        scores = self.scores(name)
        return sum(scores) / len(scores) if scores and len(scores) == len(self.runs) else None

    def spread(self, name: str) -> float | None:
        """Standard deviation between seeds; None for fewer than two."""
        scores = self.scores(name)
        return statistics.stdev(scores) if len(scores) > 1 else None


@dataclass(frozen=True)
class Gathered:
    """All points of a study, and the words and directions that every section needs."""

    results: StudyResults
    score: str

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Points with at least one trial that ended, in the order of variants, scales and first trials."""
        grouped: dict[tuple[str, float, str], list[Observation]] = {}
        for seen in sorted(self.results.observations(), key=lambda o: (o.number, o.scale)):
            grouped.setdefault((seen.variant, seen.scale, repr(sorted(seen.hps.items()))), []).append(seen)
        order = {variant: index for index, variant in enumerate(self.results.study.variants)}
        made = (Point(runs[0].variant, runs[0].scale, runs[0].hps, tuple(runs)) for runs in grouped.values())
        return tuple(sorted(made, key=lambda p: (order.get(p.variant, len(order)), p.scale)))

    @property
    def keys(self) -> tuple[str, ...]:
        """The searched keys."""
        return self.results.study.space.keys

    @property
    def variants(self) -> list[str]:
        """Variants that have points, the judged one first."""
        return list(dict.fromkeys(point.variant for point in self.points))

    @cached_property
    def scales(self) -> list[float]:
        """Scale values that have points, ascending; in a study without scale one, which is not shown."""
        return sorted({point.scale for point in self.points})

    @property
    def scaled(self) -> bool:
        """Whether the study has a scale."""
        return self.results.study.spec.scale is not None

    @property
    def scale_word(self) -> str:
        """What is scaled: ``width``, ``batch``, ``steps``."""
        spec = self.results.study.spec.scale
        words = {"model.width": "width", "train.global_batch": "batch", "train.steps": "steps"}
        return words[spec.key] if spec else "scale"

    def scale_name(self, scale: float) -> str:
        """A scale in words: ``width 64``."""
        return f"{self.scale_word} {scale:g}"

    @property
    def proxy(self) -> float:
        """The scale that selection and importance look at."""
        value = self.results.study.proxy_scale
        return float(self.results.study.base.model.width if value is None else value)

    def lower_is_better(self, score: str | None = None) -> bool:
        """The direction of a score, by default the study's own."""
        return self.results.study.spec.score(score or self.score).lower_is_better

    def of(self, variant: str | None = None, scale: float | None = None) -> list[Point]:
        """Points of a variant and a scale; None takes all."""
        return [p for p in self.points if variant in (None, p.variant) and scale in (None, p.scale)]

    def means(self, points: Sequence[Point]) -> list[float]:
        """The mean scores of those that have one."""
        return [mean for point in points if (mean := point.mean(self.score)) is not None]

    def ranked(self, points: Sequence[Point]) -> list[Point]:
        """Those with a mean score, the best first."""
        known = [point for point in points if point.mean(self.score) is not None]
        sign = 1.0 if self.lower_is_better() else -1.0
        places = ranks([sign * mean for mean in self.means(known)])
        return [point for _, point in sorted(zip(places, known, strict=True), key=lambda pair: pair[0])]


def point_tip(gathered: Gathered, point: Point) -> str:
    """A point in a few lines: where, values, scores, trials."""
    where = (point.variant, gathered.scale_name(point.scale) if gathered.scaled else "")
    lines = [", ".join(filter(None, where)), hps_text(point.hps)]
    for score in gathered.results.study.spec.scores:
        mean, spread = point.mean(score.name), point.spread(score.name)
        between = f" ± {number_text(spread, 2)} between seeds" if spread else ""
        lines.append(f"{score.name} {number_text(mean)}{between}")
    if point.diverged:
        lines.append(f"diverged ({point.diverged} of {len(point.runs)} runs)")
    lines.append("trials " + ", ".join(str(run.number) for run in point.runs))
    return "\n".join(filter(None, lines))
