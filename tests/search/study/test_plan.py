"""The plan: all runs, in which order, and names that stay when it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megadit.search.study.plan import PlannedTrial, plan_trials
from megadit.search.study.study import load_study

VARIANTS = {"mup": {"model.parametrization": "mup"}, "sp": {"model.parametrization": "sp"}}
WIDTHS = {"key": "model.width", "values": [32, 128, 64]}


@pytest.fixture
def planned(tmp_path: Path):
    def _planned(**keys: Any) -> list[PlannedTrial]:
        values = {"base": "quickstart/digits.yaml", "space": {"optim.lr": {"grid": ["2^-8", 0.5]}}, "sampler": "grid"}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(values | keys))
        return plan_trials(load_study(tmp_path / "s.yaml"))

    return _planned


def test_every_point_cell_and_seed_once(planned):
    trials = planned(variants=VARIANTS, scale=WIDTHS, seeds=[0, 3])
    assert len({trial.key for trial in trials}) == len(trials) == 2 * 3 * 2 * 2
    assert [trial.number for trial in trials] == list(range(24))


def test_a_seed_before_the_next_and_big_runs_first(planned):
    trials = planned(variants=VARIANTS, scale=WIDTHS, seeds=[3, 0])
    assert [trial.seed for trial in trials] == [3] * 12 + [0] * 12
    assert [trial.scale for trial in trials[:12]] == [128] * 4 + [64] * 4 + [32] * 4
    first = [(trial.hps["optim.lr"], trial.variant) for trial in trials[:4]]
    assert first == [(2**-8, "mup"), (2**-8, "sp"), (0.5, "mup"), (0.5, "sp")]


def test_keys_say_which_run_it_is(planned):
    keys = [trial.key for trial in planned(scale=WIDTHS)]
    assert keys[0] == '{"hps":{"optim.lr":0.00390625},"scale":128,"seed":0,"variant":""}'


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_more_trials_extend_the_sequence(planned, sampler: str):
    space = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}, "optim.warmup_steps": {"uniform": [0, 9]}}
    few = planned(space=space, sampler=sampler, trials=4, seeds=[0, 1], sampler_seed=5)
    many = planned(space=space, sampler=sampler, trials=6, seeds=[0, 1], sampler_seed=5)
    assert {trial.key for trial in few} < {trial.key for trial in many} and len(many) == 12
    assert [t.hps for t in many[:6]] == [t.hps for t in many[6:]], "every point runs with every seed"


def test_more_seeds_and_values_keep_the_keys(planned):
    before = {trial.key for trial in planned(scale=WIDTHS)}
    after = {trial.key for trial in planned(scale={**WIDTHS, "values": [32, 128, 64, 256]}, seeds=[0, 1])}
    assert before < after


def test_tpe_has_one_run_a_point_and_seeds_in_turn(planned):
    trials = planned(sampler="tpe", trials=5, seeds=[7, 8])
    assert [trial.seed for trial in trials] == [7, 8, 7, 8, 7] and not any(trial.hps for trial in trials)
    assert len({trial.key for trial in trials}) == 5


def test_one_run_for_all_horizons(planned):
    scale = {"key": "train.steps", "values": [100, 200]}
    assert [trial.scale for trial in planned(scale=scale)] == [200, 200]
