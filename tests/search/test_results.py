"""Observations of trials: one per run, or one per horizon where one run scores several."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.studies.handwritten import a_study, a_trial
from megadit.search.results import StudyResults

STEPS = {"scale": {"key": "train.steps", "values": [100, 200]}}
LAST = {"scores": [{"name": "loss", "kind": "train_loss", "last": 50}]}


def results(study, *trials, planned: int | None = None, **counts: int) -> StudyResults:
    counts = {"running": 0, "waiting": 0} | counts
    return StudyResults(study, tuple(trials), len(trials) if planned is None else planned, **counts)


def test_one_observation_per_trial_and_only_of_the_variant_asked():
    found = results(a_study(), a_trial(0, 0.5, variant="mup"), a_trial(1, 0.6, variant="sp", outcome="diverged"))
    assert [(o.variant, o.scores, o.outcome, o.number) for o in found.observations()] == [
        ("mup", {"loss": 0.5}, "complete", 0),
        ("sp", {"loss": 0.6}, "diverged", 1),
    ]
    assert [o.number for o in found.observations("sp")] == [1] and found.observations("other") == []


def test_without_a_scale_the_width_stands_for_it():
    (one,) = results(a_study(), a_trial(0, 0.5)).observations()
    assert one.scale == 64
    (two,) = results(a_study(), a_trial(0, 0.5, scale=128)).observations()
    assert two.scale == 128


@pytest.mark.parametrize(
    ("outcome", "at_100", "expected"),
    [
        ("complete", 0.7, [(100, 0.7, "complete"), (200, 0.5, "complete")]),
        ("diverged", 0.7, [(100, 0.7, "complete"), (200, 0.5, "diverged")]),
        ("diverged", None, [(100, None, "diverged"), (200, 0.5, "diverged")]),
        ("complete", None, [(100, None, "diverged"), (200, 0.5, "complete")]),  # it was above its beginning at 100
    ],
)
def test_one_observation_per_horizon(outcome: str, at_100: float | None, expected: list[Any]):
    study = a_study(**STEPS, **LAST)
    trial = a_trial(0, 0.5, scale=200, outcome=outcome, horizons={100: {"loss": at_100}, 200: {"loss": 0.5}})
    found = results(study, trial).observations()
    assert [(o.scale, o.scores["loss"], o.outcome) for o in found] == expected


def test_a_failed_run_has_no_horizons():
    found = results(a_study(**STEPS, **LAST), a_trial(0, None, scale=200, outcome="failed")).observations()
    assert [(o.scale, o.scores, o.outcome) for o in found] == [
        (100, {"loss": None}, "failed"),
        (200, {"loss": None}, "failed"),
    ]


def test_complete_means_that_every_planned_run_has_ended():
    study, one = a_study(), a_trial(0, 0.5)
    assert results(study, one).complete
    assert not results(study, one, planned=2, waiting=1).complete
    assert not results(study, one, planned=2, running=1).complete
