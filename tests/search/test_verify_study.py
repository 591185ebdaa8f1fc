"""Verdicts on studies: what is judged, in which units, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest

from helpers.studies.fabricated import fabricate, make_study, valley
from megadit.errors import UserError
from megadit.search.results import StudyResults
from megadit.search.verify_study import verify_study

VARIANTS = {"mup": {"model.parametrization": "mup"}, "sp": {"model.parametrization": "sp", "model.base_width": None}}
SCORES = [{"name": "train", "kind": "train_loss", "last": 20}, {"name": "val", "kind": "val_loss"}]


def changed(results: StudyResults, number: int, **values: object) -> StudyResults:
    """The results with some of one trial's values replaced."""
    trials = [dataclasses.replace(t, **values) if t.number == number else t for t in results.trials]
    return dataclasses.replace(results, trials=tuple(trials))


@pytest.fixture(scope="module")
def widths(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("widths"))


def test_a_study_that_transfers(widths):
    verdict = verify_study(fabricate(widths, valley()))
    assert verdict.verdict == "transfers" and verdict.best == 2.0**-7 and verdict.proxy == 32
    assert verdict.evidence.labels["hp"] == "optim.lr" and verdict.evidence.labels["study"] == "widths"
    assert [entry.scale for entry in verdict.scales] == [32, 64, 128]


def test_a_study_that_does_not(widths):
    verdict = verify_study(fabricate(widths, valley(drift=-1.0)))
    assert verdict.verdict == "does not transfer" and verdict.drift == pytest.approx(-1.0, abs=0.15)


def test_the_first_variant_is_judged_unless_another_is_named(tmp_path):
    study = make_study(tmp_path, variants=VARIANTS)
    loss = {"mup": valley(), "sp": valley(drift=-1.0)}
    results = fabricate(study, lambda trial, scale: loss[trial.variant](trial, scale))
    assert verify_study(results).verdict == "transfers"
    assert verify_study(results, variant="sp").verdict == "does not transfer"
    with pytest.raises(UserError, match="--variant: the study has no spp; did you mean sp?"):
        verify_study(results, variant="spp")


def test_the_selection_score_is_judged_unless_another_is_named(tmp_path):
    results = fabricate(make_study(tmp_path, scores=SCORES, select={"score": "val"}), valley())
    assert verify_study(results).evidence.labels["score"] == "val"
    assert verify_study(results, "train").evidence.labels["score"] == "train"
    with pytest.raises(UserError, match="--score: the study has no vall; did you mean val?"):
        verify_study(results, "vall")


def test_horizons_of_one_run_are_scales(tmp_path):
    scale = {"key": "train.steps", "values": [50, 100, 200]}
    study = make_study(tmp_path, scale=scale, scores=[{"name": "train", "kind": "train_loss", "last": 10}])
    assert study.horizons == (50, 100, 200)
    verdict = verify_study(fabricate(study, valley()))
    assert [entry.scale for entry in verdict.scales] == [50, 100, 200] and verdict.verdict == "transfers"


def test_of_several_keys_each_value_is_taken_at_the_best_of_the_others(tmp_path):
    space = {"optim.lr": {"grid": ["2^-9", "2^-8", "2^-7", "2^-6", "2^-5"]}, "optim.clip.value": {"grid": [0.5, 1.0]}}
    base = valley()

    def loss(trial, scale):
        loss = base(trial, scale)
        return None if loss is None else loss + (0.3 if trial.hps["optim.clip.value"] == 0.5 else 0.0)

    results = fabricate(make_study(tmp_path, space=space), loss)
    verdict = verify_study(results, hp="optim.lr")
    assert verdict.verdict == "transfers" and verdict.best == 2.0**-7
    assert verdict.scales[0].best_score == pytest.approx(0.62, abs=0.01)
    assert any("taken at the best of optim.clip.value" in reason for reason in verdict.reasons)
    assert verify_study(results).evidence.labels["hp"] == results.study.space.keys[0]


def test_a_run_stopped_as_diverged_is_diverged_whatever_its_score(widths):
    results = fabricate(widths, valley())
    best = next(t.number for t in results.trials if t.scale == 128 and t.hps["optim.lr"] == 2.0**-7)
    verdict = verify_study(changed(results, best, outcome="diverged"))
    assert verdict.verdict == "does not transfer" and verdict.regret == math.inf


def test_failed_runs_are_left_out_and_told(widths):
    results = fabricate(widths, valley())
    verdict = verify_study(changed(results, 3, outcome="failed", scores={}))
    assert verdict.verdict == "transfers" and any("1 runs that failed" in reason for reason in verdict.reasons)


def test_another_proxy(widths):
    results = fabricate(widths, valley())
    assert verify_study(results, proxy=64).proxy == 64
    with pytest.raises(UserError, match="--proxy: 48 is not among the values .* of model.width"):
        verify_study(results, proxy=48)


def test_refused(tmp_path, widths):
    results = fabricate(widths, valley())
    with pytest.raises(UserError, match="study widths: is incomplete .3[0-9] of 36 trials"):
        verify_study(fabricate(widths, valley(), keep=lambda trial: trial.number > 2))
    with pytest.raises(UserError, match="study widths: trial 5 has no value of train_loss"):
        name = next(iter(results.trials[0].scores))
        verify_study(changed(results, 5, scores={name: None}))
    with pytest.raises(UserError, match="has no scale"):
        verify_study(fabricate(make_study(tmp_path, "alone", scale=None), valley()))
    with pytest.raises(UserError, match="--hp: the study has no optim.eps"):
        verify_study(results, hp="optim.eps")
    several = {"optim.lr": {"log_uniform": [0.001, 0.01]}, "optim.clip.value": {"log_uniform": [0.1, 10]}}
    study = make_study(tmp_path, "several", space=several, sampler="random", trials=4)
    with pytest.raises(UserError, match="sampler random over 2 keys"):
        verify_study(fabricate(study, valley()))
    study = make_study(tmp_path, "zero", space={"optim.warmup_steps": {"grid": [0, 10, 20]}})
    with pytest.raises(UserError, match="optim.warmup_steps: 0 is not a positive number"):
        verify_study(fabricate(study, lambda trial, scale: 0.5))
