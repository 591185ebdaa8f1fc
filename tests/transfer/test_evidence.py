"""The two decision tables of a verdict: every row is reached, and docs/search.md shows the same rows and equations."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest

from helpers.ranks import ROOT
from helpers.studies.loss_surfaces import surface
from megadit.transfer.estimate import RunScore
from megadit.transfer.evidence import DRIFT_RULES, SCALE_RULES, DriftComparison, Evidence, Limits, Rule, ScaleVerdict

TEXT = (ROOT / "docs/search.md").read_text(encoding="utf-8")
PROXY, LARGER = SCALES = (64.0, 256.0)
NAN = math.nan
VALLEY = [0.9, 0.7, 0.6, 0.7, 0.9]


def rows(at_proxy: Sequence[float], at_larger: Sequence[float], first: float = 0.0) -> list[RunScore]:
    """One seed at both scales over whole octaves; the larger one's grid begins at ``first``."""
    grids = ((PROXY, 0.0, at_proxy), (LARGER, first, at_larger))
    return [RunScore(scale, start + i, 0, score) for scale, start, scores in grids for i, score in enumerate(scores)]


def noisy(**keys: float) -> list[RunScore]:
    return surface(scales=SCALES, **keys)  # type: ignore[arg-type]


SCALE_CASES = {
    "every run diverged at the proxy": rows([NAN] * 5, VALLEY),
    "every run diverged here": rows(VALLEY, [NAN] * 5),
    "the proxy's best diverges here": rows(VALLEY, [0.8, 0.6, NAN, NAN, NAN]),
    "the proxy's best was not measured": rows(VALLEY, VALLEY, first=3.0),
    "regret above limit and noise, not hidden, and the optima are apart or values lie between them": noisy(drift=-1.0),
    "fewer than 3 stable points": rows(VALLEY, [NAN, 0.7, 0.6, NAN, NAN]),
    "the lowest value is the best": rows([0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.8]),
    "the highest value is the best": rows([0.8, 0.7, 0.6, 0.5], [0.8, 0.7, 0.6, 0.5]),
    "noise hides what the value does": noisy(curvature=0.0, noise=0.005),
    "no regret": rows(VALLEY, VALLEY),
    "regret within the limit": noisy(curvature=0.002, noise=0.005, seeds=2),
    "regret above limit and noise": noisy(best=-5.2, noise=0.02),
    "the optima are apart, in no flat basin": noisy(best=-5.2, curvature=0.002, noise=0.005, seeds=2, rng=1),
    "otherwise": noisy(curvature=0.002, noise=0.005, rng=1),
}
DRIFT_CASES = {
    "wholly beyond the limit, and an open optimum could make it smaller": rows([0.5, 0.6, 0.7, 0.8], VALLEY, -5.0),
    "wholly beyond the limit, and noise hides what the value does at a scale": noisy(
        drift=-0.3, seeds=3, noise=0.04, curvature=0.002
    ),
    "wholly beyond the limit": noisy(drift=-1.0),
    "uncertain or not clearly within the limit, in a flat basin": noisy(curvature=0.0, noise=0.005),
    "uncertain by more than a part of the tried range": noisy(curvature=0.002, noise=0.02, seeds=2, rng=1),
    "not clearly within the limit": noisy(best=-5.2, noise=0.04, seeds=2, rng=1),
    "otherwise": rows(VALLEY, VALLEY),
}


def first_rule(rules: Sequence[Rule], comparison: ScaleVerdict | DriftComparison) -> str:
    return next(rule.condition for rule in rules if rule.holds(comparison))


def evidence(runs: Sequence[RunScore]) -> Evidence:
    return Evidence(runs, True, Limits(), {})


@pytest.mark.parametrize("condition", SCALE_CASES)
def test_every_row_on_a_scale_is_reached(condition: str) -> None:
    measured = evidence(SCALE_CASES[condition])
    assert first_rule(SCALE_RULES, ScaleVerdict(measured, LARGER, PROXY, measured.flat_basin(SCALES))) == condition


def test_the_row_of_the_proxy_is_reached() -> None:
    verdict = ScaleVerdict(evidence(rows(VALLEY, VALLEY)), PROXY, PROXY)
    assert first_rule(SCALE_RULES, verdict) == "the scale is the proxy" and verdict.status == "proxy"
    assert {rule.condition for rule in SCALE_RULES} == {*SCALE_CASES, "the scale is the proxy"}


@pytest.mark.parametrize(
    ("scores", "count"), [([NAN, NAN, 0.6, NAN, NAN], "1 stable point"), ([NAN, 0.7, 0.6], "2 stable points")]
)
def test_too_few_stable_points_are_counted(scores: list[float], count: str) -> None:
    verdict = ScaleVerdict(evidence(rows(VALLEY, scores)), LARGER, PROXY)
    assert verdict.status == "undecided" and verdict.why == f"only {count} next to each other; at least 3 are needed"


@pytest.mark.parametrize("condition", DRIFT_CASES)
def test_every_row_on_the_drift_is_reached(condition: str) -> None:
    measured = evidence(DRIFT_CASES[condition])
    assert first_rule(DRIFT_RULES, DriftComparison(measured, SCALES, measured.flat_basin(SCALES))) == condition
    assert {rule.condition for rule in DRIFT_RULES} == set(DRIFT_CASES)


@pytest.mark.parametrize("rules", [SCALE_RULES, DRIFT_RULES], ids=["scale", "drift"])
def test_the_tables_of_the_docs_are_those_of_the_code(rules: Sequence[Rule]) -> None:
    shown = [(rule.condition, rule.status, re.sub(r"(\{c[^}]*\})+", "…", rule.reason)) for rule in rules]
    table = "\n".join(f"| {condition} | {status} | {reason} |" for condition, status, reason in shown)
    assert f"| the first that holds | status | reason |\n|---|---|---|\n{table}\n\n" in TEXT


def test_every_equation_that_the_code_names_is_in_the_docs() -> None:
    code = "".join((ROOT / f"megadit/transfer/{name}.py").read_text() for name in ("estimate", "evidence"))
    named: set[int] = set()
    for one, to, other in re.findall(r"Eqs?\. (\d+)(?:( to | and )(\d+))?", code):
        named |= set(range(int(one), int(other) + 1)) if to == " to " else {int(one), int(other or one)}
    assert list(map(int, re.findall(r"^- \((\d+)\) ", TEXT, re.MULTILINE))) == sorted(named)
