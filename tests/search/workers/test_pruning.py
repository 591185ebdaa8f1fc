"""Pruning: never unless asked, only against runs of the same kind, by the rules' own words."""

from __future__ import annotations

import pytest

from helpers.ranks import run_ranks
from helpers.studies.tiny_study import result_for, tiny_study
from megadit.errors import UserError
from megadit.search.storage.identity import this_worker
from megadit.search.storage.store import StudyStore, load_results
from megadit.search.workers.worker import work

SPACE = {"optim.eps": {"grid": [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]}}
WIDTHS = {"key": "model.width", "values": [16, 32]}


def opened(tmp_path, rule, **keys):
    pruning = {} if rule == "none" else {"rule": rule, "every": 2, "after": 4, **keys.pop("pruning", {})}
    return StudyStore.create_or_open(tiny_study(tmp_path, space=SPACE, pruning=pruning, **keys))


def finish_five(store):
    """Five trials whose losses at steps 2, 4 and 6 are those of ``level`` 1 to 5."""
    me = this_worker()
    for level in range(1, 6):
        claim = store.claim(me)
        for step in (2, 4, 6):
            assert not store.report(claim, step, level - step / 10)
        store.finish(claim, result_for(claim, float(level)), me)


@pytest.mark.parametrize(("loss", "pruned"), [(3 - 0.41, False), (3 - 0.39, True)])
def test_the_median_rule_ends_what_is_worse_than_the_median(tmp_path, loss, pruned):
    store, me = opened(tmp_path, "median"), this_worker()
    finish_five(store)
    claim = store.claim(me)
    assert not store.report(claim, 2, loss), "before `after` nothing is judged"
    assert store.report(claim, 4, loss) == pruned
    assert store.finish(claim, result_for(claim, None, "pruned"), me)
    assert store.results().counts["pruned"] == 1 and store.claim(me).number == 6


def test_the_halving_rule_keeps_the_better_half(tmp_path):
    store, me = opened(tmp_path, "halving"), this_worker()
    for loss, pruned in ((1.0, False), (2.0, True), (0.5, False), (3.0, True)):
        claim = store.claim(me)
        assert not store.report(claim, 2, loss)
        assert store.report(claim, 4, loss) == pruned, loss
        store.finish(claim, result_for(claim, None if pruned else loss, "pruned" if pruned else "complete"), me)


def test_trials_of_another_cell_do_not_count(tmp_path):
    store, me = opened(tmp_path, "median", scale=WIDTHS), this_worker()
    for _ in range(8):
        claim = store.claim(me)
        assert claim.scale == 32
        store.report(claim, 4, 1.0)
        store.finish(claim, result_for(claim), me)
    narrow = store.claim(me)
    assert narrow.scale == 16
    assert not store.report(narrow, 4, 99.0), "no run of this width has ended yet"


def test_nothing_is_pruned_unless_asked(tmp_path):
    store, me = opened(tmp_path, "none"), this_worker()
    finish_five(store)
    assert not store.report(store.claim(me), 4, 1e9)


def test_learning_rates_are_not_judged_unless_told(tmp_path):
    pruning = {"rule": "median", "every": 2, "after": 2}
    with pytest.raises(UserError, match=r"pruning.rule: median would judge optim.lr .*judge_learning_rate: true"):
        tiny_study(tmp_path, pruning=pruning)
    tiny_study(tmp_path, pruning={**pruning, "judge_learning_rate": True})


def test_a_worker_prunes_by_logged_training_loss(tmp_path):
    study = tiny_study(
        tmp_path,
        proxy={"steps": 16},
        space={"optim.eps": {"grid": [1e-8, 1e3]}},  # the second hardly moves a weight
        pruning={"rule": "median", "every": 4, "after": 4},
        seeds=[0, 1, 2, 3],
    )
    StudyStore.create_or_open(study)
    assert run_ranks(1, work, study) == [0]
    trials = load_results(study.folder).trials
    assert [trial.outcome for trial in trials[:5]] == ["complete"] * 5, "the rule starts with five complete trials"
    pruned = [trial for trial in trials if trial.outcome == "pruned"]
    assert {5, 7} <= {trial.number for trial in pruned}, "those that do not learn"
    for trial in pruned:
        assert trial.scores == {"loss": None} and trial.steps in (4, 8, 12)
        assert trial.reason == f"pruned at step {trial.steps} of 16 by rule median"
