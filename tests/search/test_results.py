"""Observations of trials: one per run, or one per horizon where one run scores several."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.studies.handwritten import a_study, a_trial
from megadit.search.results import RunningTrial, StudyResults

STEPS = {"scale": {"key": "train.steps", "values": [100, 200]}}
LAST = {"scores": [{"name": "loss", "kind": "train_loss", "last": 50}]}


def results(study, *trials, planned: int | None = None, running: tuple[RunningTrial, ...] = ()) -> StudyResults:
    return StudyResults(study, trials, len(trials) if planned is None else planned, running)


def test_one_observation_per_trial_and_only_of_the_variant_asked():
    trials = a_trial(0, 0.5, variant="mup"), a_trial(1, 0.6, variant="sp", outcome="diverged")
    study_results = results(a_study(), *trials)
    assert [(o.variant, o.scores, o.outcome, o.number) for o in study_results.observations()] == [
        ("mup", {"loss": 0.5}, "complete", 0),
        ("sp", {"loss": 0.6}, "diverged", 1),
    ]
    assert [o.number for o in study_results.observations("sp")] == [1] and study_results.observations("other") == []


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
    observations = results(study, trial).observations()
    assert [(o.scale, o.scores["loss"], o.outcome) for o in observations] == expected


def test_a_failed_run_has_no_horizons():
    observations = results(a_study(**STEPS, **LAST), a_trial(0, None, scale=200, outcome="failed")).observations()
    assert [(o.scale, o.scores, o.outcome) for o in observations] == [
        (100, {"loss": None}, "failed"),
        (200, {"loss": None}, "failed"),
    ]


def test_complete_means_that_every_planned_run_has_ended():
    study, one = a_study(), a_trial(0, 0.5)
    assert results(study, one).complete
    assert not results(study, one, planned=2).complete
    running = results(study, one, planned=3, running=(RunningTrial(1, "", None, "host", 2.0),))
    assert not running.complete
    assert running.counts == {
        "planned": 3, "waiting": 1, "running": 1, "complete": 1, "diverged": 0, "pruned": 0, "failed": 0, "done": 1,
    }  # fmt: skip


def test_points_pool_the_seeds_of_one_assignment_in_one_cell():
    trials = [
        a_trial(3, 0.7, lr=2.0, seed=1), a_trial(0, 0.5, lr=2.0), a_trial(1, 0.4),
        a_trial(2, 9.0, seed=1, outcome="diverged"), a_trial(4, 0.3, lr=4.0),
        a_trial(5, None, lr=4.0, seed=1, outcome="failed"),
    ]  # fmt: skip
    at_2, at_1, at_4 = results(a_study(seeds=[0, 1]), *trials).points()
    assert [point.trials for point in (at_2, at_1, at_4)] == [(0, 3), (1, 2), (4, 5)], "in the order of first trials"
    assert at_2.mean("loss") == pytest.approx(0.6) and at_2.spread("loss") == pytest.approx(0.2 / 2**0.5)
    assert at_1.mean("loss") is None and at_1.scores("loss") == [0.4] and at_1.diverged == 1 and at_1.comparable
    assert at_4.mean("loss") is None and at_4.spread("loss") is None and not at_4.comparable
