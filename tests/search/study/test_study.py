"""Study files: what is made of them, what is refused, and what may change in a directory that has one."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadit.errors import UserError
from megadit.search.study.spec import read_spec
from megadit.search.study.study import Study, load_study, save_study

LR: dict[str, Any] = {"optim.lr": {"grid": ["2^-8", "2^-7"]}}
BASE: dict[str, Any] = {
    "base": "quickstart/digits.yaml",
    "space": LR,
    "sampler": "grid",
    "proxy": {"steps": 200, "batch": 16},
}
WIDTHS = {"key": "model.width", "values": [32, 64]}
VAL = [{"name": "val", "kind": "val_loss"}]


@pytest.fixture
def make(tmp_path: Path):
    """Load a study of BASE and the given keys (None takes a key out)."""

    def _make(*overrides: str, **keys: Any) -> Study:
        file = tmp_path / "small.yaml"
        values = {key: value for key, value in {**BASE, **keys}.items() if value is not None}
        file.write_text(yaml.safe_dump(values))
        return load_study(file, tmp_path / "out", overrides)

    return _make


def test_cells_and_configs(make):
    variants = {"mup": {"model.parametrization": "mup"}, "sp": {"model.parametrization": "sp"}}
    study = make(scale=WIDTHS, variants=variants, overrides={"optim.eps": "1e-10"}, seeds=[0, 7])
    assert [cell.label for cell in study.cells] == ["mup w=32", "mup w=64", "sp w=32", "sp w=64"]
    assert study.variants == ("mup", "sp") and study.proxy_scale == 32 and study.horizons == ()
    config = study.config(study.cells[3], {"optim.lr": 0.5}, 7)
    assert (config.model.width, config.model.parametrization, config.optim.lr) == (64, "sp", 0.5)
    assert (config.train.seed, config.train.steps, config.train.global_batch) == (7, 200, 16)
    assert config.optim.eps == 1e-10 and study.spec.name == "small"


def test_one_searched_key_or_all_may_be_given_on_the_command_line(make):
    two = {**LR, "optim.eps": {"grid": [1e-8, 1e-9]}}
    one_changed = make("space.optim.lr={grid: [2^-3]}", space=two).spec.space
    assert {key: list(one.values) for key, one in one_changed.items()} == {
        "optim.lr": [0.125],
        "optim.eps": [1e-8, 1e-9],
    }
    assert list(make("space.optim.lr.grid=[1, 2]").spec.space["optim.lr"].values) == [1, 2]
    assert list(make("space={optim.lr: {grid: [1]}}", space=two).spec.space) == ["optim.lr"]
    with pytest.raises(UserError, match=r"optim\.lrr"):
        make("space.optim.lrr={grid: [1]}")
    with pytest.raises(UserError, match=r"space\.optim\.lr"):
        make("space.optim.lr=3")


def test_a_study_without_scale_or_variants_is_one_cell(make):
    study = make()
    assert [(cell.variant, cell.scale, cell.label) for cell in study.cells] == [("", None, "base")]
    assert study.variants == ("",) and study.proxy_scale is None


def test_metrics_hold_the_scores(make):
    scores = [{"name": "train", "kind": "train_loss", "last": 60}, *VAL]
    study = make(scores=scores, overrides={"train.log_every": 100, "train.validation_images": 0})
    train = study.config(study.cells[0], {"optim.lr": 0.5}, 0).train
    assert train.log_every == 20 and train.validation_images > 0 and train.validate_every is None
    artifacts = (train.tensorboard, train.checkpoint_every, train.sample_every)
    assert artifacts == (False, None, None)


def test_trials_keep_what_is_asked(make):
    cadences = {"train.checkpoint_every": 50, "train.sample_every": 60}
    study = make(keep=["checkpoint", "samples", "tensorboard"], overrides=cadences)
    train = study.config(study.cells[0], {"optim.lr": 0.5}, 0).train
    assert (train.tensorboard, train.checkpoint_every, train.sample_every) == (True, 50, 60)


STEPS = {"key": "train.steps", "values": [90, 60, 120]}


def test_one_constant_rate_run_scores_all_horizons(make):
    study = make(scale=STEPS, proxy={}, scores=[{"name": "t", "kind": "train_loss", "last": 20}, *VAL])
    (cell,) = study.cells
    assert study.horizons == (60, 90, 120) and cell.scale == 120 and study.proxy_scale == 60
    train = study.config(cell, {"optim.lr": 0.5}, 0).train
    assert (train.steps, train.log_every, train.validate_every) == (120, 10, 30)


@pytest.mark.parametrize(
    "keys",
    [
        {"overrides": {"optim.schedule": "cosine"}},
        {"variants": {"a": {"optim.schedule": "cosine"}}},
        {"pruning": {"rule": "median", "judge_learning_rate": True}},
        {"scores": [{"name": "c", "kind": "command", "command": ["x"], "key": "k"}]},
    ],
)  # fmt: skip
def test_otherwise_every_length_is_a_run(make, keys: dict[str, Any]):
    study = make(scale=STEPS, proxy={}, **{"scores": [{"name": "t", "kind": "train_loss", "last": 9}], **keys})
    assert study.horizons == () and [cell.scale for cell in study.cells] == [90, 60, 120]


def test_overrides_reach_the_study_and_its_base(make):
    study = make("workers.count=2", "seeds=[4, 5]", "optim.eps=1e-9", "train.steps=150", proxy={"steps": 200})
    assert (study.spec.workers.count, study.spec.seeds, study.spec.workers.cores) == (2, (4, 5), 1)
    assert (study.base.optim.eps, study.base.train.steps) == (1e-9, 150)


def test_an_inline_base_and_a_base_beside_the_file(make, tmp_path):
    (tmp_path / "own.yaml").write_text("base: " + str(Path("configs/quickstart/digits.yaml").resolve()))
    beside = make(base="own.yaml")
    inline = make(base=beside.base.model_dump(mode="json"))
    assert inline.base == beside.base


def test_a_study_is_found_by_name_and_loads_without_torch(root):
    import subprocess

    code = (
        "import sys; from megadit.search.study.study import load_study; s = load_study('dit-width');"
        "print(s.folder, s.spec.name, len(s.cells), {'torch', 'optuna'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["runs/sweeps/dit-width", "dit-width", "3", "set()"], done.stderr


BAD: list[tuple[dict[str, Any], str]] = [
    ({"space": {"optim.lrr": {"grid": [1]}}}, "space.optim.lrr: no such key; did you mean optim.lr?"),
    ({"space": {}}, "space: is empty; name at least one"),
    ({"space": None}, "space: is missing"),
    ({"base": None}, "base: is missing"),
    ({"base": "digit.yaml"}, "base: no file digit.yaml; did you mean configs/quickstart/digits.yaml?"),
    ({"space": {"optim.lr": {"grid": []}}}, "space.optim.lr.grid: is empty; list at least one value"),
    ({"space": {"optim.lr": {"grid": [1, 1]}}}, "space.optim.lr.grid: [1, 1] has a value twice"),
    ({"space": {"optim.lr": {}}}, "space.optim.lr.grid: nothing is given; give exactly one of grid, choice"),
    ({"space": {"optim.lr": {"gird": [1]}}}, "space.optim.lr.gird: no such key; did you mean grid?"),
    ({"space": {"optim.lr": {"grid": [1], "choice": [2]}}}, "grid and choice are both given"),
    ({"space": {"optim.lr": {"uniform": [2, 1]}}}, "space.optim.lr.uniform: [2.0, 1.0] has no room"),
    ({"space": {"optim.lr": {"log_uniform": [0, 1]}}}, "space.optim.lr.log_uniform: [0.0, 1.0] needs a low bound"),
    ({"space": {"optim.lr": {"uniform": [1]}}}, "space.optim.lr.uniform"),
    ({"space": {"optim.lr": {"grid": [-1, 1]}}}, "optim.lr: -1.0 is not greater than 0"),
    ({"space": {"optim.lr": {"uniform": [-1, 1]}}, "sampler": "random", "trials": 2}, "optim.lr: -1.0 is not greater"),
    ({"space": {"optim.lr": {"uniform": [0, 1]}}}, "sampler: grid needs listed values, but space.optim.lr is uniform"),
    ({"space": {"model.base_width": {"grid": [32, 64]}}}, "model.base_width: the runs of study small have 32 (base)"),
    ({"variants": {"a": {}, "b": {"model.base_width": 32}}}, "have 64 (a) and 32 (b)"),
    ({"trials": 3}, "trials: 3 does not go with sampler grid"),
    ({"sampler": "random"}, "trials: is missing; say how many points sampler random tries"),
    ({"sampler": "tpe", "trials": 3, "scale": WIDTHS}, "sampler: tpe learns from one kind of run, but variants and"),
    ({"sampler": "tpes"}, "sampler: 'tpes' is not one of"),
    ({"pruning": {"rule": "median"}}, "median would judge optim.lr by early loss"),
    ({"pruning": {"rule": "halving"}, "space": {"optim.warmup_steps": {"grid": [1]}}}, "set pruning.judge_learning"),
    ({"pruning": {"rule": "median"}, "space": {"model.role_hps.hidden.lr": {"grid": [1]}}}, "judge_learning_rate"),
    ({"select": {"score": "vall"}, "scores": VAL}, "select.score: vall is not among the scores; did you mean val?"),
    ({"select": {"rule": "conservative"}}, "select.rule: conservative needs the spread over two or more seeds"),
    ({"select": {"rule": "conservative"}, "seeds": [0, 1], "space": {"optim.schedule": {"choice": ["cosine"]}}},
     "select.rule: conservative takes the smallest optim.schedule, whose values have no order"),
    ({"scores": VAL * 2}, "scores: val, val has a name twice"),
    ({"scores": []}, "scores: is empty"),
    ({"scores": [{"name": "a", "kind": "train_loss", "last": 201}]}, "scores.a.last: 201 is more than the 200 steps"),
    ({"scores": [{"name": "a", "kind": "command"}]}, "scores.0.command: is missing"),
    ({"scores": [{"name": "a", "kind": "command", "command": ["x"]}]}, "scores.0.key: is missing"),
    ({"scores": [{"name": "a", "kind": "val_loss", "key": "x"}]}, "scores.0.key: belongs to kind command"),
    ({"scores": [{"name": "a", "kind": "val_loss", "lower_is_better": False}]}, "lower_is_better: false does not fit"),
    ({"scores": [{"nam": "a", "kind": "val_loss"}]}, "scores.0.nam: no such key; did you mean name?"),
    ({"scores": VAL, "overrides": {"data.val_fraction": 0}}, "held out, but data.val_fraction is 0"),
    ({"scale": {"key": "model.width", "values": [32, 32]}}, "scale.values: [32, 32] has a value twice"),
    ({"scale": {"key": "model.width", "values": [32, 64], "proxy": 16}}, "scale.proxy: 16 is not among the values"),
    ({"scale": {"key": "model.depth", "values": [32]}}, "scale.key: 'model.depth' is not one of 'model.width'"),
    ({"scale": {"key": "model.width", "values": []}}, "scale.values"),
    ({"scale": {"key": "model.width", "values": [24]}}, "head_dim: 16 does not divide width 24"),
    ({"scale": STEPS}, "proxy.steps: is what scale.values gives; leave it out"),
    ({"scale": WIDTHS, "overrides": {"model.width": 8}}, "overrides.model.width: is set by scale of the study"),
    ({"variants": {"a": {"optim.lr": 1.0}}}, "variants.a.optim.lr: is set by space of the study"),
    ({"overrides": {"train.seed": 1}}, "overrides.train.seed: is set by seeds of the study"),
    ({"variants": {"a": {"optim.lrr": 1.0}}}, "optim.lrr: no such key; did you mean optim.lr? (in study small, a)"),
    ({"overrides": {"optim.lrr": 1.0}}, "optim.lrr: no such key"),
    ({"variants": {"a b": {}}}, "variants: 'a b' is not made of letters"),
    ({"seeds": [1, 1]}, "seeds: [1, 1] must be one or more different whole numbers"),
    ({"seeds": []}, "seeds: [] must be"),
    ({"keep": ["everything"]}, "keep.0: 'everything' is not one of"),
    ({"worker": {"count": 2}}, "worker: no such key; did you mean workers?"),
    ({"max_attempts": 0}, "max_attempts: 0 is not at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_studies_are_refused_in_a_sentence(make, keys: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        make(**keys)
    assert message in str(caught.value), caught.value


def test_pruning_may_judge_rates_when_told_to(make):
    assert make(pruning={"rule": "median", "judge_learning_rate": True}).spec.pruning.rule == "median"
    assert make(pruning={"rule": "median"}, space={"optim.clip.value": {"grid": [1]}}).spec.pruning.rule == "median"


def test_an_override_of_what_the_study_sets_is_refused(make):
    for override, message in {
        "model.width=8": "set by scale",
        "optim.lr=1": "by space",
        "train.seed=1": "by seeds",
    }.items():
        with pytest.raises(UserError, match=message):
            make(override, scale=WIDTHS)


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="study: no file dit-widht.yaml; did you mean configs/sweeps/dit-width.yaml?"):
        load_study("dit-widht")
    with pytest.raises(UserError, match=r"has no study.yaml; name a study directory"):
        load_study(tmp_path)


def test_a_frozen_study_is_the_same_study(make):
    study = make(
        scale=WIDTHS,
        variants={"sp": {"model.parametrization": "sp", "model.heads": None}},
        space={"optim.clip.value": {"choice": [None, 1]}, "optim.lr": {"log_uniform": ["2^-9", "1e-1"]}},
        sampler="random",
        trials=3,
        overrides={"optim.eps": "1e-10"},
    )
    assert save_study(study) == study.folder / "study.yaml"
    again = load_study(study.folder)
    assert (again.folder, again.base, again.cells, again.space) == (study.folder, study.base, study.cells, study.space)
    assert again.spec.scores == study.spec.scores and again.spec.variants == study.spec.variants
    text = (study.folder / "study.yaml").read_text()
    assert save_study(again).read_text() == text and again.config(again.cells[0], {}, 0)
    assert [path.name for path in study.folder.iterdir()] == ["study.yaml"]


GROWN = [
    {"seeds": [0, 1]},
    {"space": {"optim.lr": {"grid": ["2^-9", "2^-8", "2^-7"]}}},
    {"scale": {"key": "model.width", "values": [16, 32, 64]}},
    {"workers": {"count": 2}, "keep": ["checkpoint"], "select": {"rule": "mean_rank"}, "max_attempts": 1},
]
CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"overrides": {"optim.eps": 1e-9}}, "optim.eps"),
    ({"proxy": {"steps": 100, "batch": 16}}, "train.steps"),
    ({"space": {"optim.lr": {"grid": ["2^-8"]}}}, "space"),
    ({"space": {"optim.clip.value": {"grid": [1]}}}, "space"),
    ({"seeds": [1]}, "seeds"),
    ({"scale": {"key": "model.width", "values": [32]}}, "scale"),
    ({"scale": None}, "scale, model.width"),
    ({"variants": {"a": {}}}, "variants"),
    ({"scores": VAL}, "scores"),
    ({"diverged_above": 2.0}, "diverged_above"),
    ({"storage": "journal"}, "storage"),
    ({"sampler": "random", "trials": 2}, "sampler, trials"),
]


@pytest.mark.parametrize("keys", GROWN)
def test_a_study_may_grow(make, keys: dict[str, Any]):
    save_study(make(scale=WIDTHS))
    make(**{"scale": WIDTHS, **keys})


@pytest.mark.parametrize(("keys", "named"), CHANGED, ids=[named for _, named in CHANGED])
def test_a_study_may_not_change(make, keys: dict[str, Any], named: str):
    save_study(make(scale=WIDTHS))
    with pytest.raises(UserError) as caught:
        make(**{"scale": WIDTHS, **keys})
    assert f"(different: {named})" in str(caught.value), caught.value
    assert "another --study_dir" in str(caught.value)


def test_random_studies_grow_in_trials_alone(make):
    drawn = {"sampler": "random", "space": {"optim.lr": {"uniform": [0.1, 1]}}}
    save_study(make(**drawn, trials=3))
    assert make(**drawn, trials=5).spec.trials == 5
    with pytest.raises(UserError, match="different: trials"):
        make(**drawn, trials=2)


def test_horizons_of_one_run_may_not_change(make):
    steps = {"proxy": {}, "scores": [{"name": "t", "kind": "train_loss", "last": 10}]}
    save_study(make(scale=STEPS, **steps))
    with pytest.raises(UserError, match="different: scale"):
        make(scale={"key": "train.steps", "values": [60, 90, 120, 150]}, **steps)


def test_the_smallest_value_is_the_proxy_unless_named(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({**BASE, "scale": {**WIDTHS, "proxy": 64}}))
    assert load_study(file).proxy_scale == 64 and read_spec(file).name == "a"


def test_overrides_of_a_study_directory_may_extend_it_and_no_more(make):
    folder = save_study(make()).parent
    assert load_study(folder, overrides=["workers.count=3", "seeds=[0, 1]"]).spec.seeds == (0, 1)
    for override, named in {"optim.eps=1e-9": "optim.eps", "proxy.steps=100": "train.steps"}.items():
        with pytest.raises(UserError, match=f"different: {named}"):
            load_study(folder, overrides=[override])


UNREAD: list[tuple[dict[str, Any], str]] = [
    ({"pruning": {"every": 5}}, "pruning.every: 5 is not read where pruning.rule is none"),
    ({"pruning": {"judge_learning_rate": True}}, "pruning.judge_learning_rate: true is not read where pruning.rule"),
    ({"sampler_seed": 3}, "sampler_seed: 3 is not read where sampler is grid"),
    (
        {"overrides": {"optim.min_lr_ratio": 0.1}},
        r"optim.min_lr_ratio: 0\.1 is not read where optim.schedule is constant",
    ),
    ({"space": {"optim.min_lr_ratio": {"grid": [0.1, 0.2]}}}, r"optim.min_lr_ratio: 0\.\d is not read where optim.sch"),
]


@pytest.mark.parametrize(("keys", "message"), UNREAD, ids=[message[:20] for _, message in UNREAD])
def test_a_key_that_no_run_reads_is_refused(make, keys: dict[str, Any], message: str):
    with pytest.raises(UserError, match=rf"^{message}.*; leave it out, or set \w+"):
        make(**keys)


def test_a_key_that_one_variant_reads_is_taken_and_a_study_that_has_begun_goes_on(make):
    keys = {"overrides": {"optim.min_lr_ratio": 0.1}, "variants": {"a": {"optim.schedule": "cosine"}, "b": {}}}
    study = make(**keys)
    keys["variants"] = {"a": {}, "b": {}}
    with pytest.raises(UserError, match=r"^optim\.min_lr_ratio"):
        make(**keys)
    with pytest.raises(UserError, match=r"^sampler_seed"):
        make("sampler_seed=3")
    save_study(dataclasses.replace(study, spec=study.spec.model_copy(update={"sampler_seed": 3})))
    assert make("sampler_seed=3", overrides=keys["overrides"], variants=study.spec.variants).folder == study.folder
