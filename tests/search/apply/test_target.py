"""Algorithm 4: what is written, what is refused, and what is told, on studies whose optimum is known."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from helpers.studies.fabricated import BASE, fabricate, make_study, valley
from megadit.config import RunConfig, load, load_config
from megadit.errors import UserError
from megadit.search.apply.summary import describe, to_json, value_words
from megadit.search.apply.target import NotVerifiedError, apply, group_rows

TARGET = """\
model:
  width: 256
  depth: 2
  head_dim: 16
  patch_size: 2
  in_channels: 1
  input_size: 8
  learn_sigma: false
  num_classes: 10
  parametrization: mup
  base_width: 64
objective: {kind: flow}
data: {name: digits}
optim: {lr: 1e-4}
train: {steps: 1000, global_batch: 32}
"""
RANDOM = {
    "scale": None,
    "sampler": "random",
    "trials": 20,
    "space": {
        "optim.lr": {"log_uniform": ["2^-10", "2^-5"]},
        "optim.clip.value": {"log_uniform": [0.01, 100]},
        "optim.warmup_steps": {"uniform": [1, 100]},
    },
}


@pytest.fixture
def target(tmp_path):
    file = tmp_path / "big" / "target.yaml"
    file.parent.mkdir()
    file.write_text(TARGET)
    return file


def transfer(results, target, out=None, others=(), overrides=(), **options):
    return apply(results, others, load(target, overrides), target, out, overrides=overrides, **options)


def test_writes_the_best_base_values_over_the_target(tmp_path, target):
    study = make_study(tmp_path)
    applied = transfer(fabricate(study, valley()), target)
    assert applied.path == study.folder / "target.yaml" and applied.forced is None
    text = applied.path.read_text()
    assert yaml.safe_load(text) == {"base": "../big/target.yaml", "optim": {"lr": 2**-7}}
    written = load_config(applied.path)
    assert written == applied.fitted.config == load_config(target, ["optim.lr=2^-7"])
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert header[0].startswith("# Written by megadit") and "tools/transfer.py apply" in header[0]
    assert "# Study widths, rule best: train_loss 0.62 over 2 seed(s), trial(s)" in text
    assert "# Verdict of widths on optim.lr: transfers." in text
    assert "# optim.lr: transfer verified by widths over model.width 32 to 128." in text
    assert [path.name for path in study.folder.iterdir()] == ["target.yaml"]  # no temporary left


def test_second_time_replaces_its_own_file_but_no_other(tmp_path, target):
    results = fabricate(make_study(tmp_path), valley())
    earlier_target = transfer(results, target).path
    transfer(results, target, overrides=["train.steps=500"])
    assert load_config(earlier_target).train.steps == 500
    assert "# Overrides: train.steps=500" in earlier_target.read_text()
    before = target.read_text()
    with pytest.raises(UserError, match="--out: .* was not written by apply"):
        transfer(results, target, out=target)
    with pytest.raises(UserError, match="--out: .* is a folder"):
        transfer(results, target, out=tmp_path)
    with pytest.raises(UserError, match="--out: .* cannot be "):
        transfer(results, target, out=target / "inside.yaml")
    assert target.read_text() == before


def test_study_that_does_not_transfer_is_refused_unless_forced(tmp_path, target):
    study = make_study(tmp_path)
    results = fabricate(study, valley(drift=-1.0))
    with pytest.raises(
        NotVerifiedError, match=r'verdict is not "transfers" but does not transfer .*--force'
    ) as refusal:
        transfer(results, target)
    assert [judged.answer for judged in refusal.value.study_verdicts] == ["does not transfer"]
    assert not study.folder.exists() or not list(study.folder.iterdir())
    applied = transfer(results, target, force=True)
    assert applied.forced and "# Written with --force: study widths" in applied.path.read_text()
    assert "forced: study widths" in describe(applied)
    assert "verified by no study given" in describe(applied)
    assert load_config(applied.path).optim.lr == 2**-6  # the optimum at width 32


def test_incomplete_study_is_bad_input_unless_forced(tmp_path, target):
    results = fabricate(make_study(tmp_path), valley(), keep=lambda trial: trial.number % 5 != 0 or trial.seed == 0)
    with pytest.raises(UserError):
        transfer(results, target)
    applied = transfer(results, target, force=True)
    assert applied.study_verdicts[0].verdict is None and "no verdict" in describe(applied)


def test_search_without_scale_needs_a_study_that_verified(tmp_path, target):
    loss = valley()
    search = fabricate(make_study(tmp_path, "search", **RANDOM), lambda trial, scale: loss(trial, 64.0))
    widths = fabricate(make_study(tmp_path), loss)
    with pytest.raises(NotVerifiedError, match=r"no scale.*--verified-by STUDY"):
        transfer(search, target)
    applied = transfer(search, target, others=[widths])
    written = yaml.safe_load(applied.path.read_text())
    assert set(written["optim"]) == {"lr", "clip", "warmup_steps"}
    plain = to_json(applied)
    assert plain["backed_by"] == {"optim.lr": ["widths"], "optim.clip.value": [], "optim.warmup_steps": []}
    text = describe(applied)
    assert "transfer verified by widths over model.width 32 to 128" in text
    assert text.count("NOT verified: transfer verified by no study given") == 2
    assert plain["not_verified"] == ["optim.clip.value", "optim.warmup_steps"]
    assert "# NOT verified: optim.clip.value, optim.warmup_steps." in applied.path.read_text()
    assert "over all its scales widths finds 0.0078125 (2^-7) best" in text
    moving = fabricate(make_study(tmp_path / "moving"), valley(drift=-1.0))
    with pytest.raises(NotVerifiedError, match="does not transfer"):
        transfer(search, target, others=[widths, moving])


WARMUPS = {**RANDOM, "space": {**RANDOM["space"], "optim.warmup_steps": {"grid": [60]}}}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_warm_up_that_does_not_fit_the_targets_run_becomes_its_share(tmp_path, target, schedule):
    loss = valley()
    search = fabricate(make_study(tmp_path, "search", **WARMUPS), lambda trial, scale: loss(trial, 64.0))
    short = [f"optim.schedule={schedule}", "train.steps=50"]
    applied = transfer(search, target, force=True, overrides=short)
    assert applied.fitted.changes["optim.warmup_steps"] == "30%" == load_config(applied.path).optim.warmup_steps
    note = "optim.warmup_steps is written as 30% of the run: the study's 60 of 200 steps do not fit the target's 50"
    assert note in describe(applied) and to_json(applied)["scaled"] == applied.fitted.scaled
    assert "# optim.warmup_steps: written as 30% of the run" in applied.path.read_text()
    assert "warmup" not in {caveat.topic for caveat in applied.caveats}
    fits = transfer(search, target, force=True, overrides=[short[0], "train.steps=100"])
    assert fits.fitted.changes["optim.warmup_steps"] == 60 and fits.fitted.scaled == {}


def test_schedule_that_fits_by_no_share_is_told(tmp_path, target):
    loss = valley()
    grid = {**WARMUPS, "space": {**RANDOM["space"], "optim.warmup_steps": {"grid": [500]}}}
    search = fabricate(make_study(tmp_path, "search", **grid), lambda trial, scale: loss(trial, 64.0))
    applied = transfer(search, target, force=True, overrides=["train.steps=100"])
    caveats = {caveat.topic: caveat.text for caveat in applied.caveats}
    assert applied.fitted.changes["optim.warmup_steps"] == 500 and applied.fitted.scaled == {}
    assert "ends at 20% of optim.lr" in caveats["schedule"] and "choose a warm-up anew" in caveats["warmup"]


def test_studies_of_another_base_or_another_value_do_not_verify(tmp_path, target):
    loss = valley()
    search = fabricate(make_study(tmp_path, "search", **RANDOM), lambda trial, scale: loss(trial, 64.0))
    other = {**BASE, "model": {**BASE["model"], "base_width": 32}}
    with pytest.raises(UserError, match="--verified-by: study widths has model.base_width 32, but study search has 64"):
        transfer(search, target, others=[fabricate(make_study(tmp_path, base=other), loss)])
    grid = {"model.output_mult": {"grid": ["2^-6", "2^-4", "2^-2", 1.0, 4.0, 16.0]}}

    def readout(trial, scale):
        return 0.6 + 0.05 * (math.log2(trial.hps["model.output_mult"]) + 2) ** 2 + 0.004 * trial.seed

    mults = fabricate(make_study(tmp_path, "mults", space=grid), readout)
    with pytest.raises(NotVerifiedError, match=r"no study given verified any of .*optim.lr.*mults: model.output_mult"):
        transfer(search, target, others=[mults])


def test_parametrization_goes_with_the_values(tmp_path, target):
    base = {**BASE, "model": {**BASE["model"], "output_mult": 4.0, "role_hps": {"hidden": {"lr": 2.0}}}}
    results = fabricate(make_study(tmp_path, base=base), valley())
    applied = transfer(results, target)
    assert applied.fitted.changes == {"optim.lr": 2**-7, "model.output_mult": 4.0, "model.role_hps.hidden.lr": 2.0}
    assert applied.replaced == {"optim.lr": 1e-4, "model.output_mult": 1.0, "model.role_hps.hidden.lr": 1.0}
    assert load_config(applied.path).model.output_mult == 4.0
    assert "model.output_mult = 4: the study's, with which these are valid; the target said 1" in describe(applied)


def test_another_base_width_is_replaced_and_told(tmp_path, target):
    target.write_text(TARGET.replace("base_width: 64", "base_width: 128"))
    applied = transfer(fabricate(make_study(tmp_path), valley()), target)
    assert load_config(applied.path).model.base_width == 64
    assert "model.base_width = 64: the study's, with which these are valid; the target said 128" in describe(applied)
    assert to_json(applied)["m"] == {"proxy": 0.5, "target": 4.0}


def test_override_against_the_study_is_refused(tmp_path, target):
    results = fabricate(make_study(tmp_path), valley())
    with pytest.raises(UserError, match=r"optim.lr: the override 0.5 is not what study widths found, 0.0078125"):
        transfer(results, target, overrides=["optim.lr=0.5"])
    assert transfer(results, target, overrides=["optim.lr=2^-7"]).fitted.config.optim.lr == 2**-7


def test_study_under_sp_has_nothing_to_apply(tmp_path, target):
    base = {**BASE, "model": {**BASE["model"], "parametrization": "sp"}}
    with pytest.raises(UserError, match="under sp, whose optimum moves with width"):
        transfer(fabricate(make_study(tmp_path, base=base), valley()), target)


def test_steps_study_applies_from_its_shortest_run(tmp_path, target):
    loss = valley()
    study = make_study(
        tmp_path,
        scale={"key": "train.steps", "values": [100, 150, 200]},
        scores=[{"name": "loss", "kind": "train_loss", "last": 50}],
    )
    applied = transfer(fabricate(study, lambda trial, scale: loss(trial, 64.0)), target)
    assert applied.proxy.train.steps == 100
    topics = {caveat.topic: caveat.text for caveat in applied.caveats}
    assert "verified from 100 to 200 (widths)" in topics["horizon"]
    assert "no study given verified transfer over width" in topics["width"]


def model(width: int, **changes) -> RunConfig:
    values = {"width": width, "depth": 2, "head_dim": 64, "parametrization": "mup", "base_width": 1920, **changes}
    optim = {"lr": 2.5e-4, "weight_decay": 0.1, "eps_mode": "scaled", "eps": 1e-10}
    return RunConfig.model_validate(
        {"model": values, "data": {"name": "image-folder"}, "optim": optim, "train": {"steps": 10}}
    )


def test_rates_of_the_papers_widths():
    # MMDiT's widths and base width on a DiT: base rate 2.5e-4, m = .267 and 2.667 (arXiv 2505.15270, Table 4).
    rows = {row.name: row for row in group_rows(model(512), model(5120))}
    assert rows["hidden"].proxy["lr"] == pytest.approx(9.375e-4) and rows["hidden"].target["lr"] == pytest.approx(
        9.375e-5
    )
    assert rows["hidden"].lr_mult == pytest.approx(0.375)
    assert rows["hidden"].proxy["wd"] == pytest.approx(0.1 * 512 / 1920)
    assert rows["hidden"].target["eps"] == pytest.approx(1e-10 / (5120 / 1920))
    for name in ("input", "vector", "output"):
        assert rows[name].proxy["lr"] == rows[name].target["lr"] == 2.5e-4
    assert rows["vector"].proxy["wd"] == 0.0


def test_roles_with_several_ratios_are_matched_in_order():
    # An mlp_ratio that is no integer multiple of the width gives hidden weights two ratios, other ones at each width.
    rows = group_rows(model(512, mlp_ratio=2.703), model(5120, mlp_ratio=2.703))
    hidden = [row for row in rows if row.name.startswith("hidden")]
    assert len(hidden) == 2 and all(row.proxy and row.target for row in hidden)
    lone = group_rows(model(512, mlp_ratio=2.703), model(1920, mlp_ratio=2.703))
    assert [row.target is None for row in lone if row.name.startswith("hidden")] == [False, True]


def test_text_and_json_tell_the_same(tmp_path, target):
    applied = transfer(fabricate(make_study(tmp_path), valley()), target, manual_multiple=5.0)
    text, plain = describe(applied), json.loads(json.dumps(to_json(applied), allow_nan=False))
    assert "optim.lr = 0.0078125 (2^-7): transfer verified by widths" in text
    assert "proxy width 32, m = 0.5; target width 256, m = 4" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("hidden")]
    assert row[1:3] == ["0.015625", "0.00195312"]
    hidden = next(group for group in plain["groups"] if group["name"] == "hidden")
    assert (hidden["proxy"]["lr"], hidden["target"]["lr"], hidden["lr_mult"]) == (2**-6, 2**-9, 0.25)
    assert [caveat["topic"] for caveat in plain["untransferred"]] == ["width", "horizon"]
    assert "of 5 trainings by hand" in text and plain["cost"]["manual_multiple"] == 5.0
    assert plain["verdicts"][0]["verified"] == {"key": "model.width", "low": 32.0, "high": 128.0}
    assert f"--config {applied.path}" in text
    with pytest.raises(UserError, match="--manual-multiple"):
        transfer(fabricate(make_study(tmp_path), valley()), target, manual_multiple=-1.0)


def test_below_the_minimum_scale_the_next_one_is_the_proxy(tmp_path, target):
    """The smallest width's optimum lies two octaves off: it is an exception, and its best value is not applied."""
    usual, off = valley(), valley(best=-9.0)

    def loss(trial, scale):
        return (off if scale == 32 else usual)(trial, scale)

    space = {"optim.lr": {"grid": [f"2^{n}" for n in range(-12, -3)]}}
    applied = transfer(fabricate(make_study(tmp_path, space=space), loss), target)
    verdict = applied.study_verdicts[0].verdict
    assert verdict is not None and verdict.exceptions == (32.0,) and verdict.proxy == 64
    assert applied.choice.hps == {"optim.lr": 2**-7} and applied.proxy.model.width == 64
    assert "verified by widths over model.width 64 to 128" in applied.path.read_text()
    assert "rule best at model.width 64, train_loss 0.6 over 2 seed(s)" in describe(applied)
    at_64 = [trial for trial in applied.results.trials if trial.scale == 64]
    assert applied.tuning_cost.search.trials == len(at_64) and applied.tuning_cost.search.flops == sum(
        t.flops for t in at_64
    )
    scale = {"key": "model.width", "values": [32, 64, 128], "proxy": 32}
    with pytest.raises(NotVerifiedError):  # a proxy that the study names stays
        transfer(fabricate(make_study(tmp_path, "named", space=space, scale=scale), loss), target)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2**-10, "0.000976562 (2^-10)"),
        (0.03, "0.03"),
        (4.0, "4"),
        (7, "7"),
        (True, "true"),
        (None, "null"),
        ("rms", "rms"),
        (0.0, "0"),
    ],
)
def test_values_for_people(value, words):
    assert value_words(value) == words
