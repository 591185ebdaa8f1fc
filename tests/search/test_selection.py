"""The rules that choose a point, on losses made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.studies.handwritten import a_study, a_trial
from megadit.errors import UserError
from megadit.search.results import StudyResults, TrialResult
from megadit.search.selection import select

TWO = [{"name": "loss", "kind": "train_loss", "last": 50}, {"name": "val", "kind": "val_loss"}]


def results(trials: list[TrialResult], **keys: Any) -> StudyResults:
    return StudyResults(a_study(**keys), tuple(trials), len(trials))


def runs(losses: dict[float, list[float | None]], **others: Any) -> list[TrialResult]:
    """One trial per rate and seed; None is a diverged one."""
    flat = [(lr, seed, loss) for lr, values in losses.items() for seed, loss in enumerate(values)]
    return [
        a_trial(n, loss, lr=lr, seed=seed, outcome="diverged" if loss is None else "complete", **others)
        for n, (lr, seed, loss) in enumerate(flat)
    ]


def test_best_is_the_lowest_mean_over_seeds():
    choice = select(results(runs({1: [0.5, 0.6], 2: [0.3, 0.9], 4: [0.52, 0.52]}), seeds=[0, 1]))
    assert choice.hps == {"optim.lr": 4} and choice.value == pytest.approx(0.52)
    assert (choice.rule, choice.score, choice.seeds, choice.trials) == ("best", "loss", 2, (4, 5))


def test_a_diverged_or_unfinished_point_never_wins():
    trials = runs({1: [0.9, 0.9], 2: [0.1, None], 4: [0.2]})
    assert select(results(trials, seeds=[0, 1])).hps == {"optim.lr": 1}
    trials += [a_trial(9, 0.01, lr=8, outcome="pruned"), a_trial(10, 0.01, lr=8, seed=1)]
    assert select(results(trials, seeds=[0, 1])).hps == {"optim.lr": 1}


def test_a_diverged_run_with_a_finite_score_does_not_win():
    trials = [a_trial(0, 0.1, lr=8, outcome="diverged"), a_trial(1, 0.4, lr=1)]
    assert select(results(trials)).hps == {"optim.lr": 1}


def test_higher_is_better_where_the_score_says_so():
    score = {"name": "loss", "kind": "command", "command": ["x"], "key": "k", "lower_is_better": False}
    choice = select(results(runs({1: [0.5], 2: [0.9], 4: [0.2]}), scores=[score]))
    assert choice.hps == {"optim.lr": 2} and choice.value == 0.9


def test_the_named_score_decides():
    trials = [
        a_trial(0, None, lr=1, scores={"loss": 0.1, "val": 0.9}),
        a_trial(1, None, lr=2, scores={"loss": 0.2, "val": 0.8}),
    ]
    assert select(results(trials, scores=TWO)).hps == {"optim.lr": 1}
    choice = select(results(trials, scores=TWO, select={"score": "val"}))
    assert choice.hps == {"optim.lr": 2} and choice.value == 0.8 and choice.score == "val"


def test_mean_rank_takes_the_point_that_does_well_in_all():
    # Ranks: lr 1: 1 and 4; lr 2: 2 and 2; lr 4: 3 and 3; lr 8: 4 and 1.
    scores = {1: (0.1, 0.9), 2: (0.2, 0.3), 4: (0.3, 0.4), 8: (0.4, 0.1)}
    trials = [a_trial(n, None, lr=lr, scores={"loss": a, "val": b}) for n, (lr, (a, b)) in enumerate(scores.items())]
    choice = select(results(trials, scores=TWO, select={"rule": "mean_rank"}))
    assert choice.hps == {"optim.lr": 2} and choice.rule == "mean_rank" and choice.value == 0.2


def test_mean_rank_breaks_ties_by_its_score():
    trials = [
        a_trial(0, None, lr=1, scores={"loss": 0.1, "val": 0.9}),
        a_trial(1, None, lr=2, scores={"loss": 0.2, "val": 0.8}),
    ]
    rule = {"rule": "mean_rank", "score": "val"}
    assert select(results(trials, scores=TWO, select=rule)).hps == {"optim.lr": 2}


def test_conservative_steps_back_from_the_edge_within_the_noise():
    conservative = {"select": {"rule": "conservative"}, "seeds": [0, 1]}
    # The best (lr 4) has mean .50 and standard error .02 (sd .0283 over two seeds).
    losses: dict[float, list[float | None]] = {1: [0.53, 0.53], 2: [0.51, 0.51], 4: [0.48, 0.52], 8: [None, None]}
    choice = select(results(runs(losses), **conservative))
    assert choice.hps == {"optim.lr": 2} and choice.value == pytest.approx(0.51)
    tight: dict[float, list[float | None]] = {2: [0.51, 0.51], 4: [0.499, 0.501]}
    assert select(results(runs(tight), **conservative)).hps == {"optim.lr": 4}


def test_variant_and_scale_default_to_the_judged_one_and_the_proxy():
    keys = {
        "variants": {"mup": {"model.parametrization": "mup"}, "sp": {"model.parametrization": "sp"}},
        "scale": {"key": "model.width", "values": [32, 64]},
    }
    best = {("mup", 32): 1.0, ("mup", 64): 2.0, ("sp", 32): 4.0, ("sp", 64): 8.0}
    trials = [
        a_trial(n, 0.1 if lr == winner else 0.5, lr=lr, variant=variant, scale=scale)
        for n, ((variant, scale), winner, lr) in enumerate(
            (cell, winner, lr) for cell, winner in best.items() for lr in (1.0, 2.0, 4.0, 8.0)
        )
    ]
    study_results = results(trials, **keys)
    assert select(study_results).hps == {"optim.lr": 1}
    assert select(study_results, scale=64).hps == {"optim.lr": 2}
    assert select(study_results, "sp").hps == {"optim.lr": 4} and select(study_results, "sp", 64).hps == {"optim.lr": 8}


def test_horizons_are_selected_at_their_own_scores():
    keys = {"scale": {"key": "train.steps", "values": [100, 200]}}
    trials = [
        a_trial(n, late, lr=lr, scale=200, horizons={100: {"loss": early}, 200: {"loss": late}})
        for n, (lr, early, late) in enumerate([(1.0, 0.5, 0.2), (2.0, 0.4, 0.3)])
    ]
    study_results = results(trials, **keys)
    assert select(study_results).hps == {"optim.lr": 2} and select(study_results, scale=200).hps == {"optim.lr": 1}


def test_nothing_finished_is_an_error():
    with pytest.raises(UserError, match="study small: no point of the study has finished well"):
        select(results([]))
    with pytest.raises(UserError, match="no point of variant mup has finished well"):
        select(results(runs({1: [None]}, variant="mup")), "mup")
