"""Every key is read by what was chosen, or refused: nothing that was asked for is ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadit.config import LoadedConfig, RunConfig, load, load_config, merge_ds_config, replace, save_config, to_yaml
from megadit.config.loading.loader import load_data
from megadit.config.loading.sources import configs_dir
from megadit.config.schema.reads import CHECKED_BY_SECTION, READ_WHERE, read_conditions
from megadit.config.schema.section import walk
from megadit.errors import UserError

DIGITS = "quickstart/digits.yaml"
FOLDER = ["data.name=image-folder", "data.path=/data"]
# (overrides of the digits quickstart, which is a DiT under muP with flow matching: what is said).
REFUSED = [
    (["data.path=/data"], "data.path: '/data' is not read where data.name is digits; leave it out, or set data.n"),
    (["data.skin_tones=true"], "data.skin_tones: true is not read where data.name is digits; leave it out, or se"),
    (["data.name=image-folder", "data.path=/d", "data.skin_tones=true"], "data.skin_tones: true is not read wher"),
    (["data.crop=center"], "data.crop: 'center' is not read where data.name is digits"),
    (["data.text.encoder=t5"], "data.text.encoder: 't5' is not read where data.condition is class"),
    (["data.text.cache=/c"], "data.text.cache: '/c' is not read where data.condition is class"),
    (["data.features.encoder=dinov2"], "data.features.encoder: 'dinov2' is not read where objective.repa_weight "),
    (["data.features={}"], "data.features: {} is not read where objective.repa_weight is 0"),
    (["objective.diffusion_steps=500"], "objective.diffusion_steps: 500 is not read where objective.kind is flow"),
    (["objective.min_snr_gamma=4"], "objective.min_snr_gamma: 4 is not read where objective.kind is flow"),
    (["objective.logit_mean=1"], "objective.logit_mean: 1 is not read where objective.time_sampling is uniform"),
    (["objective.logit_std=2"], "objective.logit_std: 2 is not read where objective.time_sampling is uniform"),
    (["objective.kind=ddpm", "objective.min_snr_gamma=4"], "objective.min_snr_gamma: 4 is not read where objecti"),
    (["model.parametrization=sp", "optim.eps_mode=scaled"], "optim.eps_mode: 'scaled' is not read where model.pa"),
    (["model.parametrization=sp", "optim.wd_mode=sqrt"], "optim.wd_mode: 'sqrt' is not read where model.parametr"),
    (["ema.every=4"], "ema.every: 4 is not read where ema.decays is [];"),
    (["train.validation_images=0", "train.validate_every=5"], "train.validate_every: 5 is not read where train.v"),
    (["data.val_fraction=0", "train.validate_every=5"], "train.validate_every: 5 is not read where data.val_frac"),
    (["data.condition=none", "model.num_classes=0", "sample.guidance=1", "objective.label_dropout=0.2"],
     "objective.label_dropout: 0.2 is not read where data.condition is none"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "why"), REFUSED, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_key_that_nothing_reads_is_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(UserError) as raised:
        load(DIGITS, overrides)
    message = str(raised.value)
    assert message.startswith(why) and "\n" not in message and "leave it out, or set " in message
    assert message.endswith("(in an override)")


def test_in_a_file_too_which_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"base: {configs_dir() / DIGITS}\ndata: {{path: /data}}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^data\.path: '/data' is not read .*\(in .*c\.yaml\)$"):
        load(tmp_path / "c.yaml")


def test_every_key_at_its_default_is_taken(tmp_path: Path) -> None:
    """Also where nothing reads it: a file that says every key asks for nothing by that."""
    (tmp_path / "c.yaml").write_text(to_yaml(load_config(DIGITS)), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == load_config(DIGITS)


def test_the_table_names_keys_and_values_of_the_schema() -> None:
    fields = dict(walk(RunConfig))
    assert set(READ_WHERE) | CHECKED_BY_SECTION <= set(fields)
    for key in READ_WHERE:
        for condition in read_conditions(key):
            assert condition.key in fields and condition.key != key
            known = getattr(fields[condition.key].annotation, "__args__", ())
            assert set(condition.values) <= set(known)
            assert condition.holds is not None or 0 < len(condition.values) < len(known)


class TestOverruled:
    """What an inherited layer says and a later choice leaves without a reader does not stand in the way."""

    def test_classes_of_the_quickstart_and_another_source(self) -> None:
        config = load_config(None, FOLDER)
        assert config.data.classes is None and config.data.path == "/data"
        assert load_config("quickstart/emoji.yaml", [*FOLDER, "data.classes=[a, b]"]).data.classes == ("a", "b")
        assert load_config("quickstart/emoji.yaml", ["data.name=emoji"]).data.classes is not None

    def test_classes_of_a_folder_stay_for_its_tars(self, tmp_path: Path) -> None:
        text = f"base: {configs_dir() / DIGITS}\ndata: {{name: image-folder, path: /d, classes: [a, b]}}\n"
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        assert load_config(tmp_path / "c.yaml", ["data.name=webdataset"]).data.classes == ("a", "b")

    def test_an_objective(self) -> None:
        config = load_config("uvit/l-2.yaml", ["objective.kind=flow"])
        assert (config.objective.kind, config.objective.beta_schedule) == ("flow", "linear")
        config = load_config(None, ["objective.kind=ddpm"])
        assert config.objective.time_sampling == "uniform"

    def test_averages(self) -> None:
        assert load_config(DIGITS, ["ema.every=4", "ema.sigma_rels=[0.1]"]).ema.every == 4
        assert load_config(DIGITS, ["ema.every=4", "ema.decays=[0.99]"]).ema.every == 4

    def test_a_schedule(self) -> None:
        assert load_config(None, ["optim.schedule=cosine"]).optim.decay_steps is None


class TestFilesOfOurs:
    @pytest.mark.parametrize("file", sorted(configs_dir().glob("*/[a-z0-9]*.yaml")), ids=lambda file: file.stem)
    def test_each_asks_for_nothing_that_is_not_read(self, file: Path) -> None:
        if file.parent.name != "sweeps":
            assert isinstance(load(file), LoadedConfig)

    def test_a_resolved_configuration_loads_whatever_it_says(self, tmp_path: Path) -> None:
        config = replace(load_config(DIGITS), {})
        old = RunConfig.model_validate({**config.model_dump(), "data": {**config.data.model_dump(), "path": "/data"}})
        save_config(old, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == old
        assert replace(old, {"optim.lr": 1e-3}).data.path == "/data"
        with pytest.raises(UserError, match=r"^data\.crop"):
            load(tmp_path / "config.yaml", ["data.crop=center"])


class TestDeepSpeed:
    def merged(self, overrides: list[str], ds: dict[str, Any]) -> Any:
        return merge_ds_config(load(DIGITS, overrides), ds, 1).config.optim

    def test_its_file_may_choose_the_schedule_that_reads_a_key(self) -> None:
        block = {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5}}}
        assert self.merged(["optim.min_lr_ratio=0.2"], block).min_lr_ratio == 0.2
        with pytest.raises(UserError, match=r"^optim\.min_lr_ratio: 0\.2 is not read where optim\.schedule"):
            self.merged(["optim.min_lr_ratio=0.2"], {})

    def test_its_schedule_takes_the_place_of_the_quickstart_s_which_nobody_asked_for(self) -> None:
        block = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}
        optim = merge_ds_config(load(None), block, 1).config.optim
        assert (optim.schedule, optim.warmup_steps, optim.decay_steps) == ("constant", 5, None)
        with pytest.raises(UserError, match=r"^optim\.decay_steps: 10% belongs to schedule wsd"):
            merge_ds_config(load(None, ["optim.decay_steps=10%"]), block, 1)


class TestDataCommands:
    def test_a_key_of_another_source_is_refused_and_one_of_a_model_is_not_looked_at(self) -> None:
        with pytest.raises(UserError, match=r"^data\.path: '/data' is not read where data\.name is digits"):
            load_data(None, ["data.name=digits", "data.path=/data"])
        assert load_data(None, ["data.name=emoji", "data.features.encoder=dinov2"]).features is not None


def test_a_search_over_a_key_that_nothing_reads_is_refused() -> None:
    with pytest.raises(UserError, match=r"^objective\.logit_mean: 1\.0 is not read"):
        replace(load_config(DIGITS), {"objective.logit_mean": 1.0}, "study s")
