"""Every study of configs/sweeps against the paper (arXiv 2505.15270), and the minis against what they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadit.config import RunConfig, load_config
from megadit.config.loading.sources import configs_dir
from megadit.search.study.plan import plan_trials
from megadit.search.study.spec import StudySpec, read_spec
from megadit.search.study.study import load_study

SWEEPS = Path(configs_dir()) / "sweeps"
RATES = tuple(2.0**k for k in range(-13, -8))
MULTS = tuple(2.0**k for k in range(-6, 7, 2))
WIDTHS, BATCHES, STEPS = (144, 288, 576), (128, 256, 512), (100_000, 150_000, 200_000)

# study: searched key, its values, scaled key, its values; Tables 7 to 11.
DIT: dict[str, tuple[str, tuple[float, ...], str, tuple[int, ...]]] = {
    "dit-width": ("optim.lr", RATES, "model.width", WIDTHS),
    "dit-batch": ("optim.lr", RATES, "train.global_batch", BATCHES),
    "dit-steps": ("optim.lr", RATES, "train.steps", STEPS),
    "dit-output-mult-width": ("model.output_mult", MULTS, "model.width", WIDTHS),
    "dit-output-mult-steps": ("model.output_mult", MULTS, "train.steps", STEPS),
}
TEXT = ("pixart-lr", "mmdit-80", "mmdit-confirm")


def spec_of(name: str) -> StudySpec:
    return read_spec(SWEEPS / f"{name}.yaml")


def test_these_are_all_the_files():
    full = {*DIT, *TEXT}
    assert {path.stem for path in SWEEPS.glob("*.yaml")} == full | {f"{name}-mini" for name in full}


@pytest.mark.parametrize("name", DIT)
def test_the_dit_studies(name: str):
    key, values, scaled, scales = DIT[name]
    study = load_study(name)
    (dimension,) = study.space.dimensions
    assert (dimension.key, dimension.kind, dimension.values) == (key, "grid", values)
    assert study.spec.scale is not None
    assert (study.spec.scale.key, study.spec.scale.values, study.spec.seeds) == (scaled, scales, (0,))
    in_one_run = scaled == "train.steps"
    assert study.horizons == (scales if in_one_run else ())
    assert len(plan_trials(study)) == len(values) * (1 if in_one_run else len(scales))
    for cell in study.cells:
        config = study.config(cell, {key: values[0]}, 0)
        assert config.model.width == (cell.scale if scaled == "model.width" else 288)
        assert config.train.global_batch == (cell.scale if scaled == "train.global_batch" else 256)
        assert config.train.steps == 200_000
        assert (config.model.parametrization, config.model.base_width, config.model.depth) == ("mup", 288, 28)
        if key == "model.output_mult":
            assert config.optim.lr == 2**-10 and config.model.output_mult == values[0]
        else:
            assert config.optim.lr == values[0] and config.model.output_mult == 1
        optim = config.optim
        assert (optim.schedule, optim.warmup_steps, optim.weight_decay, optim.clip.value) == ("constant", 0, 0, None)


def test_the_steps_studies_measure_and_keep_every_length():
    for name in ("dit-steps", "dit-output-mult-steps"):
        study = load_study(name)
        key = study.space.keys[0]
        train = study.config(study.cells[0], {key: 1.0}, 0).train
        assert all(step % train.log_every == 0 for step in STEPS)
        assert train.validate_every == 50_000 and train.validation_images > 0
        assert train.checkpoint_every == 50_000 and train.keep_last == 4


def test_pixart_lr():
    study = load_study("pixart-lr")
    assert study.spec.space["optim.lr"].values == RATES and list(study.spec.space) == ["optim.lr"]
    model, optim, train = study.base.model, study.base.optim, study.base.train
    assert (model.family, model.width, model.parametrization, model.base_width) == ("pixart", 288, "mup", 288)
    assert (train.epochs, train.global_batch, study.spec.proxy.batch) == (5, 176 * 8, 176 * 8)
    assert (optim.weight_decay, optim.eps, optim.clip.value) == (0.03, 1e-10, 0.01)
    assert len(plan_trials(study)) == 5


def test_mmdit_80():
    study = load_study("mmdit-80")
    spec = study.spec
    assert {key: (d.kind, d.values) for key, d in spec.space.items()} == {
        "optim.lr": ("log_uniform", (2.5e-5, 2.5e-3)),
        "optim.clip.value": ("log_uniform", (0.01, 100.0)),
        "objective.repa_weight": ("uniform", (0.1, 1.0)),
        "optim.warmup_steps": ("uniform", (1.0, 20_000.0)),
    }
    assert (spec.sampler, spec.trials, spec.proxy.steps, spec.proxy.batch) == ("random", 80, 30_000, 4096)
    assert len(plan_trials(study)) == 80 and spec.pruning.rule == "none"
    is_the_mmdit_proxy(study.base)


def test_mmdit_confirm():
    study = load_study("mmdit-confirm")
    assert study.spec.space["optim.lr"].values == (1e-4, 2e-4, 2.5e-4, 4e-4, 8e-4)
    assert (study.spec.proxy.steps, study.spec.proxy.batch) == (100_000, 4096)
    base = study.base
    is_the_mmdit_proxy(base)
    assert (base.optim.warmup_steps, base.optim.clip.value, base.objective.repa_weight) == (1000, 1.0, 0.5)
    assert base.train.steps == 100_000


def is_the_mmdit_proxy(config: RunConfig) -> None:
    """The configuration of configs/mmdit/proxy-mup.yaml but for what a study changes."""
    assert config.model == load_config("mmdit/proxy-mup.yaml").model
    assert (config.model.width, config.model.base_width, config.objective.kind) == (512, 1920, "flow")
    assert (config.data.name, config.data.condition, config.ema.decays) == ("webdataset", "text", ())
    assert config.data.val_fraction > 0 and config.train.validation_images > 0  # for the score val_loss


@pytest.mark.parametrize("name", [*DIT, *TEXT])
def test_minis_search_the_same_on_built_in_data(name: str, tmp_path: Path):
    full, mini = spec_of(name), load_study(f"{name}-mini", tmp_path / "study")  # runs/ may hold one of another day
    assert {dimension.key: dimension.kind for dimension in mini.space.dimensions} == {
        key: dimension.kind for key, dimension in full.space.items()
    }
    assert (mini.spec.scale and mini.spec.scale.key) == (full.scale and full.scale.key)
    assert mini.spec.sampler == full.sampler and mini.spec.trials == full.trials
    assert mini.base.data.name == ("emoji" if name in TEXT else "digits") and mini.base.model.base_width == 64
    assert mini.base.model.family == name.partition("-")[0]
    if name in TEXT:
        assert mini.base.data.condition == "text" and mini.base.data.text.encoder == "minilm"
    assert (mini.base.model.repa is not None) == (mini.base.objective.repa_weight > 0) == name.startswith("mmdit")
    steps = max((mini.base.train.steps or 300), *mini.horizons, 0)
    assert steps <= 700 and mini.spec.workers.count == 2 and len(plan_trials(mini)) <= 120


def test_the_mini_of_the_width_study_shows_both_parametrizations():
    study = load_study("dit-width-mini")
    assert study.variants == ("mup", "sp") and len(study.spec.seeds) >= 2
    assert [cell.scale for cell in study.cells] == [32, 64, 128, 256] * 2
    assert len(study.space.dimensions[0].values) >= 5
