"""What a search and its target cost: executed FLOPs and stages against a count by hand."""

from __future__ import annotations

import dataclasses

import pytest

from helpers.studies.fabricated import fabricate, make_study, valley
from megadit.config import load_config
from megadit.models import count_parameters
from megadit.plan import forward_flops, training_flops
from megadit.search.apply.cost import cost, run_steps
from megadit.transfer.budget import describe_tuning_cost


def test_bill_counts_what_was_run(root, tmp_path):
    study = make_study(tmp_path)
    results = fabricate(study, valley(best=-9.0))  # 2^-5 diverges, after a quarter of its steps
    target = load_config(root / "configs/quickstart/digits.yaml", ["model.width=256", "train.steps=1000"])
    assert run_steps(target) == 1000
    tuning_cost = cost(results, [results], target, 1000, study.proxy_scale, manual_multiple=2.0)
    assert (tuning_cost.search.trials, tuning_cost.all.trials) == (12, 2 * 36)
    proxy = study.config(study.cells[0], {"optim.lr": 2**-7}, 0)
    assert proxy.model.width == 32
    image = 3 * forward_flops(proxy.model)
    assert tuning_cost.search.flops == pytest.approx(image * 32 * (10 * 200 + 2 * 50))
    assert tuning_cost.search.stages == ((12.0, float(count_parameters(proxy.model, fixed=False)), 200 * 32.0),)
    assert len(tuning_cost.all.stages) == 3 and {stage[0] for stage in tuning_cost.all.stages} == {24.0}
    assert tuning_cost.target.flops == training_flops(target, 1000) == 3 * forward_flops(target.model) * 32 * 1000
    by_flops, by_samples = tuning_cost.ratios(tuning_cost.search)
    assert by_flops == pytest.approx(tuning_cost.search.flops / tuning_cost.target.flops / 2)
    small, large = (count_parameters(config.model, fixed=False) for config in (proxy, target))
    expected = 12 * small * 200 / (large * 1000) / 2
    assert by_samples == pytest.approx(expected)
    assert "2 trainings by hand" in "\n".join(describe_tuning_cost(tuning_cost))
    assert tuning_cost.to_json()["search"]["ratio_sbt"] == by_samples


def test_variants_and_diverged_trials_are_told_apart(tmp_path, root):
    variants = {"mup": {"model.parametrization": "mup"}, "sp": {"model.parametrization": "sp"}}
    results = fabricate(make_study(tmp_path, variants=variants), valley())
    target = load_config(root / "configs/quickstart/digits.yaml")
    tuning_cost = cost(results, [], target, 300, 32)
    assert (tuning_cost.search.trials, tuning_cost.all.trials) == (12, 72)
    shorter = dataclasses.replace(results, trials=results.trials[:5])
    assert cost(shorter, [], target, 300, 32).all.trials == 5


def test_one_run_for_all_horizons_counts_once(tmp_path, root):
    steps = {"key": "train.steps", "values": [100, 150, 200]}
    study = make_study(tmp_path, scale=steps, scores=[{"name": "loss", "kind": "train_loss", "last": 50}])
    assert study.horizons
    loss = valley()
    results = fabricate(study, lambda trial, scale: loss(trial, 64.0))
    tuning_cost = cost(results, [], load_config(root / "configs/quickstart/digits.yaml"), 300, 100)
    assert tuning_cost.search.stages == ((12.0, float(count_parameters(study.base.model, fixed=False)), 200 * 32.0),)


def test_length_in_epochs_is_resolved_where_the_data_is(root, tmp_path):
    digits = root / "configs/quickstart/digits.yaml"
    assert run_steps(load_config(digits, ["train.epochs=2"])) == 107  # 1707 training images, 32 a step
    elsewhere = load_config(
        digits, ["train.epochs=2", "data.name=image-folder", f"data.path={tmp_path}/none", "data.image_size=8"]
    )
    assert run_steps(elsewhere) is None
    results = fabricate(make_study(tmp_path), valley())
    tuning_cost = cost(results, [], elsewhere, None, 32)
    assert tuning_cost.ratios(tuning_cost.search) is None and tuning_cost.to_json()["search"]["ratio_flops"] is None
    assert "give train.steps" in describe_tuning_cost(tuning_cost)[-1]
