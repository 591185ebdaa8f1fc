"""Loading: inheritance, overrides, presets, alternatives, numbers; saving and loading again."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import yaml

from megadit.config import RunConfig, load, load_config, preset, replace, save_config
from megadit.config.loading.sources import configs_dir
from megadit.errors import UserError

MINIMAL = "model: {width: 64, heads: 4}\ntrain: {steps: 10}\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_a_path_the_quickstart_runs_and_counts_as_defaults():
    loaded = load(None, ["optim.lr=2^-7"])
    quickstart = load("quickstart/emoji.yaml", ["optim.lr=2^-7"])
    assert loaded.config == quickstart.config
    assert loaded.user_set == {"optim.lr": "an override"}
    assert {"optim.lr", "model.width", "train.steps"} <= set(quickstart.user_set)
    assert "emoji" in loaded.source and "quickstart" in loaded.source


def test_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_config().data.name == "emoji"
    assert load_config("dit/xl-2-mup.yaml").model.width == 1152


def test_a_file_beside_the_user_comes_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "quickstart/digits.yaml", MINIMAL + "data: {condition: class}\n")
    assert load_config("quickstart/digits.yaml").model.width == 64


def test_bases_merge_key_by_key_and_lists_whole(tmp_path: Path):
    write(tmp_path, "shared/a.yaml", MINIMAL + "optim: {lr: 1e-3, betas: [0.5, 0.6], eps: 1e-6}\n")
    write(tmp_path, "b.yaml", "base: shared/a.yaml\noptim: {betas: [0.7, 0.8]}\n")
    top = write(tmp_path, "c.yaml", "base: b.yaml\noptim: {eps: 1e-7}\n")
    loaded = load(top)
    assert (loaded.config.optim.lr, loaded.config.optim.betas, loaded.config.optim.eps) == (1e-3, (0.7, 0.8), 1e-7)
    sources = {key: Path(loaded.user_set[f"optim.{key}"]).name for key in ("lr", "betas", "eps")}
    assert sources == {"lr": "a.yaml", "betas": "b.yaml", "eps": "c.yaml"}


def test_of_several_bases_the_later_wins(tmp_path: Path):
    write(tmp_path, "a.yaml", MINIMAL + "optim: {lr: 1e-3, eps: 1e-6}\n")
    write(tmp_path, "b.yaml", "optim: {lr: 2e-3}\n")
    optim = load_config(write(tmp_path, "c.yaml", "base: [a.yaml, b.yaml]\n")).optim
    assert (optim.lr, optim.eps) == (2e-3, 1e-6)


def test_one_base_may_be_reached_twice(tmp_path: Path):
    write(tmp_path, "a.yaml", MINIMAL)
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    write(tmp_path, "c.yaml", "base: a.yaml\n")
    assert load_config(write(tmp_path, "d.yaml", "base: [b.yaml, c.yaml]\n")).train.steps == 10


def test_a_circle_of_bases_is_named(tmp_path: Path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match=r"^base: .*a.yaml -> .*b.yaml -> .*a.yaml is a circle; take one"):
        load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-4", 2e-4),
        ("1.5E3", 1500.0),
        ("1", 1.0),
        (".5", 0.5),
        ("2^-10", 2**-10),
        ("2**-10", 2**-10),
        ("2^3", 8.0),
        ("2^-9.5", 2**-9.5),
        ("'2^-10'", 2**-10),
    ],
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float):
    path = write(tmp_path, "c.yaml", MINIMAL + f"optim: {{lr: {text}, betas: [{2**-3}, 9e-1]}}\n")
    config = load_config(path)
    assert type(config.optim.lr) is float
    assert config.optim.lr == value
    assert config.optim.betas == (0.125, 0.9)
    assert load_config(path, [f"optim.eps={text}"]).optim.eps == value


def test_whole_numbers_may_be_written_as_floats_and_powers():
    train = load_config(None, ["train.steps=1e3", "train.global_batch=2^9"]).train
    assert (train.steps, train.global_batch) == (1000, 512)
    assert type(train.steps) is int and type(train.global_batch) is int


def test_numbers_in_texts_stay_texts():
    assert load_config(None, ["train.init_from='2^3'"]).train.init_from == "2^3"
    assert load_config(None, ["train.init_from=1e-4"]).train.init_from == "1e-4"


def test_overrides_are_read_as_yaml_and_the_last_wins():
    config = load_config(
        None, ["optim.betas=[0.8, 0.9]", "data.flip=true", "train.init_from=a=b", "optim.lr=1e-3", "optim.lr=1e-2"]
    )
    assert config.optim.betas == (0.8, 0.9)
    assert config.data.flip is True and config.train.init_from == "a=b" and config.optim.lr == 1e-2


def test_optional_sections_open_and_close(tmp_path: Path):
    path = write(tmp_path, "c.yaml", MINIMAL + "data: {vae: null}\n")
    opened = load_config(path, ["data.vae.path=/vae", "data.vae.scale=0.5"]).data.vae
    assert opened is not None and (opened.path, opened.scale) == ("/vae", 0.5)
    closed = load(write(tmp_path, "d.yaml", MINIMAL + "data: {vae: {path: x}}\n"), ["data.vae=null"])
    assert closed.config.data.vae is None
    assert "data.vae.path" not in closed.user_set
    assert load_config(write(tmp_path, "e.yaml", MINIMAL + "data:\n  vae: {}\n")).data.vae is not None
    assert load_config(write(tmp_path, "f.yaml", MINIMAL + "optim:\n")).optim.lr == 1e-4


def test_the_later_of_two_alternatives_wins(tmp_path: Path):
    path = write(tmp_path, "c.yaml", MINIMAL)
    train = load_config(path, ["train.epochs=2.5"]).train
    assert (train.steps, train.epochs) == (None, 2.5)
    model = load_config(path, ["model.head_dim=32"]).model
    assert (model.heads, model.num_heads) == (None, 2)
    again = replace(load_config(path, ["train.epochs=2.5"]), {"train.steps": 7}).train
    assert (again.steps, again.epochs) == (7, None)


class TestPresetInFiles:
    def test_keys_beside_it_override_it_whatever_the_order(self, tmp_path: Path):
        path = write(tmp_path, "c.yaml", "model: {width: 576, preset: dit-xl-2-mup}\ntrain: {steps: 1}\n")
        assert load_config(path).model == preset("dit-xl-2-mup").model_copy(update={"width": 576})

    def test_heads_beside_a_preset_with_head_dim(self, tmp_path: Path):
        path = write(tmp_path, "c.yaml", "model: {preset: dit-s-2-mup, heads: 12}\ntrain: {steps: 1}\n")
        model = load_config(path).model
        assert (model.heads, model.head_dim, model.num_heads) == (12, None, 12)

    def test_a_later_preset_replaces_the_architecture_and_keeps_what_the_data_decide(self):
        model = load_config(None, ["model.preset=dit-b-4-mup"]).model
        quickstart = load_config().model
        assert (model.width, model.depth, model.head_dim, model.patch_size) == (768, 12, 64, 4)
        for key in ("in_channels", "input_size", "num_classes", "learn_sigma"):
            assert getattr(model, key) == getattr(quickstart, key)

    def test_it_is_not_saved(self, tmp_path: Path):
        config = load_config("dit/xl-2.yaml")
        save_config(config, tmp_path / "config.yaml")
        assert "preset" not in (tmp_path / "config.yaml").read_text()


class TestSaving:
    @pytest.mark.parametrize(
        "overrides",
        [
            [],
            ["optim.lr=0.1", "optim.eps=1e-15", "optim.betas=[0.3333333333333333, 0.9]"],
            ["data.vae.path='/a b/é: #c'", "data.name=image-folder", "data.path='123'", "data.image_size=256"],
            ["train.epochs=0.30000000000000004", "data.path=null"],
            ["optim.clip.value=null", "model.role_hps.hidden.lr=2^-3", "optim.lr=1e22"],
        ],
    )
    def test_round_trip_is_exact(self, tmp_path: Path, overrides: list[str]):
        config = load_config(None, overrides)
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config

    @pytest.mark.parametrize(
        "name", sorted(str(p) for p in configs_dir().rglob("[a-z]*.yaml") if p.parent.name != "sweeps")
    )
    def test_round_trip_of_ours(self, tmp_path: Path, name: str):
        config = load_config(name)
        save_config(config, tmp_path / "config.yaml")
        again = load(tmp_path / "config.yaml")
        assert again.config == config

    def test_random_floats_survive(self, tmp_path: Path):
        import random

        rng = random.Random(0)
        for _ in range(20):
            lr = math.ldexp(rng.random() + 0.5, rng.randint(-40, 10))
            config = replace(load_config(), {"optim.lr": lr})
            save_config(config, tmp_path / "config.yaml")
            assert load_config(tmp_path / "config.yaml").optim.lr == lr

    def test_every_key_is_written(self, tmp_path: Path):
        save_config(load_config(), tmp_path / "config.yaml")
        values = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert set(values) == set(RunConfig.model_fields)
        assert set(values["train"]) == set(type(load_config().train).model_fields)

    def test_nothing_half_written_stays(self, tmp_path: Path):
        (tmp_path / "config.yaml").mkdir()
        with pytest.raises(OSError):
            save_config(load_config(), tmp_path / "config.yaml")
        assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_replace_checks_again_and_leaves_the_original():
    config = load_config()
    wider = replace(config, {"model.width": 256, "optim.lr": 2e-4, "data.vae": {"path": "x"}, "data.image_size": None})
    assert (wider.model.width, wider.optim.lr) == (256, 2e-4)
    assert wider.data.vae is not None and config.data.vae is None
    with pytest.raises(UserError, match=r"^model.head_dim: 32 does not divide width 100"):
        replace(config, {"model.width": 100})
    with pytest.raises(UserError, match=r"^model.wdth: no such key; did you mean model.width\? \(in a sweep\)"):
        replace(config, {"model.wdth": 128}, source="a sweep")


def test_configs_are_frozen_and_strict():
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3
    for value in ("3", True, 2.5):
        with pytest.raises(ValueError):
            type(config.train)(steps=value)


def test_every_pair_of_our_dit_files_differs():
    configs = [load_config(path) for path in sorted((configs_dir() / "dit").glob("[a-z]*.yaml"))]
    assert len(configs) == 5
    assert all(one != other for one, other in itertools.combinations(configs, 2))
