"""Every kind of bad input in a configuration: one sentence with the key, the value, the place and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadit.config import load
from megadit.errors import UserError

MINIMAL = "model: {width: 64, heads: 4}\ntrain: {steps: 10}\n"


def refused(path: Path | str | None, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(path, overrides)
    message = str(error.value)
    assert "pydantic" not in message and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys
        ("optm.lr=1", "optm: no such key; did you mean optim? (in an override)"),
        ("optim.lrr=1", "optim.lrr: no such key; did you mean optim.lr? (in an override)"),
        ("model.widht=64", "model.widht: no such key; did you mean model.width? (in an override)"),
        ("data.vae.scal=1", "data.vae.scal: no such key; did you mean data.vae.scale? (in an override)"),
        ("model.lr=1", "model.lr: no such key; did you mean optim.lr or"),
        ("warmup_steps=1", "warmup_steps: no such key; did you mean optim.warmup_steps? (in an override)"),
        ("optim.steps=1", "optim.steps: no such key; did you mean"),
        ("parallel.zzz=1", "parallel.zzz: no such key; parallel has tensor, pipeline, sequence, zero_stage, "),
        ("zzzz=1", "zzzz: no such key; a configuration has base, model, objective, data"),
        ("base=x.yaml", "base: x.yaml cannot be an override, only a file inherits; name it by --config"),
        ("model.presets=x", "model.presets: no such key; did you mean model.preset? (in an override)"),
        # wrong types
        ("optim.lr=fast", "optim.lr: 'fast' is not a number (in an override)"),
        ("optim.lr=true", "optim.lr: true is not a number (in an override)"),
        ("optim.lr=.nan", "optim.lr: nan is not a finite number (in an override)"),
        ("optim.lr=.inf", "optim.lr: inf is not a finite number (in an override)"),
        ("optim.lr=2^x", "optim.lr: '2^x' is not a number (in an override)"),
        ("optim.lr=3^-2", "optim.lr: '3^-2' is not a number (in an override)"),
        ("optim.lr=null", "optim.lr: null is not a number (in an override)"),
        ("train.seed=1.5", "train.seed: 1.5 is not a whole number (in an override)"),
        ("train.seed=true", "train.seed: true is not a whole number (in an override)"),
        ("train.seed=[1]", "train.seed: [1] is not a whole number (in an override)"),
        ("train.tf32=yep", "train.tf32: 'yep' is not one of true, false, 'auto' (in an override)"),
        (
            "kernels.residual_across_blocks=maybe",
            "kernels.residual_across_blocks: 'maybe' is not one of true, false, 'auto' (in an override)",
        ),
        ("data.flip=yep", "data.flip: 'yep' is not true or false (in an override)"),
        ("data.flip=1", "data.flip: 1 is not true or false (in an override)"),
        ("train.init_from=[3]", "train.init_from: [3] is not a text; put it in quotes (in an override)"),
        ("optim.betas=0.9", "optim.betas: 0.9 is not a list (in an override)"),
        ("optim.betas=[0.9]", "optim.betas: [0.9] has too few items (in an override)"),
        ("optim.betas=[0.9,0.9,0.9]", "optim.betas: [0.9, 0.9, 0.9] has 3 items, not 2 (in an override)"),
        ("optim=3", "optim: 3 is not a section; give optim.KEY: value pairs (in an override)"),
        ("data.vae=here", "data.vae: 'here' is not a section; give data.vae.KEY: value pairs (in an override)"),
        # ranges and choices
        ("optim.lr=-1", "optim.lr: -1 is not greater than 0 (in an override)"),
        ("train.log_every=0", "train.log_every: 0 is not at least 1 (in an override)"),
        ("data.val_fraction=1", "data.val_fraction: 1 is not less than 1 (in an override)"),
        ("optim.min_lr_ratio=1.5", "optim.min_lr_ratio: 1.5 is not at most 1 (in an override)"),
        ("objective.kind=ddm", "objective.kind: 'ddm' is not one of 'ddpm', 'flow' (in an override)"),
        ("parallel.zero_stage=4", "parallel.zero_stage: 4 is not one of 0, 1, 2, 3 (in an override)"),
        ("model.preset=dit-xl2", "model.preset: 'dit-xl2' is not a preset; did you mean dit-xl-2?"),
        ("model.preset=[1]", "model.preset: [1] is not a preset; did you mean"),
        # malformed overrides
        ("optim.lr", "override: 'optim.lr' is not of the form section.key=value, e.g. optim.lr=2^-10"),
        ("=3", "override: '=3' is not of the form section.key=value"),
        ("--optim.lr=3", "override: '--optim.lr=3' is not of the form section.key=value"),
        ("optim.lr=[1", "optim.lr: '[1' is not a YAML value: "),
    ],
)
def test_one_override(override: str, message: str):
    said = refused(None, override)
    assert said.startswith(message), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # inside one section
        (["model.heads=5"], "model.heads: 5 does not divide width 128; choose heads that divide the width"),
        (["model.heads=4", "model.head_dim=8"], "model.head_dim: 8 x heads 4 is not width 128; give one of the two"),
        (["model.width=120"], "model.head_dim: 32 does not divide width 120; choose a width that is a multiple"),
        (["model.width=6", "model.head_dim=6"], "model.width: 6 is not a multiple of 4, which 2-D sin-cos positions"),
        (["model.patch_size=5"], "model.patch_size: 5 does not divide input_size 32; choose one that does"),
        (["model.head_dim=null"], "model.heads: give the number of heads, or head_dim"),
        (["model.base_width=null"], "model.base_width: muP needs the proxy's base width"),
        (["model.role_hps.output.mult=2"], "model.role_hps.output.mult: the readout multiplier is set by output_mult"),
        (["objective.prediction=v"], "objective.prediction: v belongs to kind ddpm; flow always predicts noise - x0"),
        (["objective.weighting=min_snr"], "objective.weighting: min_snr belongs to kind ddpm; set weighting to none"),
        (
            ["objective.kind=ddpm", "objective.time_sampling=logit_normal"],
            "objective.time_sampling: logit_normal belongs to kind flow; ddpm draws timesteps uniformly",
        ),
        (
            ["objective.kind=ddpm", "objective.time_sampling=uniform", "objective.shift=3"],
            "objective.shift: 3.0 belongs to kind flow; ddpm draws timesteps uniformly",
        ),
        (["optim.betas=[0.9,1]"], "optim.betas: [0.9, 1.0] must both lie in [0, 1)"),
        (["optim.decay_steps=9"], "optim.decay_steps: 9 belongs to schedule wsd, not constant; set it to null"),
        (["train.steps=null"], "train.steps: is missing; give the run's length as steps or as epochs"),
        (["train.steps=5", "train.epochs=1"], "train.steps: 5 and epochs 1.0 both say how long to train; give one"),
        # across sections
        (["model.learn_sigma=true"], "model.learn_sigma: true does not go with objective.kind flow"),
        (["data.condition=none"], "model.num_classes: 9, but data.condition is none; set model.num_classes=0"),
        (["model.num_classes=0"], "model.num_classes: 0, but data.condition is class; set the number of classes, or"),
        (
            ["model.num_classes=0", "data.condition=none", "sample.guidance=2"],
            "sample.guidance: 2.0 needs classes or texts; set sample.guidance=1",
        ),
        (["sample.guidance_channels=4"], "sample.guidance_channels: 4 is more than model.in_channels 3; lower it"),
        (
            ["data.image_size=64"],
            "data.image_size: 64, but model.input_size 32 is for images of 32 pixels; make the two agree",
        ),
        (
            ["data.image_size=32", "data.vae.path=x"],
            "data.image_size: 32, but model.input_size 32 is for latents, 8 image pixels each, of 256 pixels; make",
        ),
        (
            ["train.precision=bf16", "parallel.zero_stage=0"],
            "parallel.zero_stage: 0 does not go with train.precision bf16",
        ),
    ],
)
def test_values_that_do_not_go_together(tmp_path: Path, overrides: list[str], message: str):
    # A file of its own: the quickstart's values are tuned now and then.
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {width: 128, head_dim: 32, depth: 2, patch_size: 4, in_channels: 3, learn_sigma: false,\n"
        "  num_classes: 9, parametrization: mup, base_width: 64}\nobjective: {kind: flow}\ntrain: {steps: 10}\n"
    )
    load(path)
    said = refused(path, *overrides)
    assert said.startswith(message), said
    assert "\n" not in said


def test_several_problems_are_told_at_once():
    said = refused(None, "optim.lr=fast", "train.seed=-1", "data.flip=3").split("\n")
    assert said == [
        "data.flip: 3 is not true or false (in an override)",
        "optim.lr: 'fast' is not a number (in an override)",
        "train.seed: -1 is not at least 0 (in an override)",
    ]
    said = refused(None, "optim.lrr=3", "train.sed=1").split("\n")
    assert [line.split(";")[0] for line in said] == ["optim.lrr: no such key", "train.sed: no such key"]


def test_the_file_of_a_wrong_key_is_named_even_when_it_is_a_base(tmp_path: Path):
    (tmp_path / "low.yaml").write_text(MINIMAL + "optim: {lrr: 1, eps: no}\n")
    (tmp_path / "top.yaml").write_text("base: low.yaml\n")
    assert "low.yaml)" in refused(tmp_path / "top.yaml")
    (tmp_path / "low.yaml").write_text(MINIMAL + "optim: {eps: nothing}\n")
    said = refused(tmp_path / "top.yaml", "optim.lr=1e-3")
    assert said.startswith("optim.eps: 'nothing' is not a number (in ") and "low.yaml" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\n", "is not valid YAML: "),
        ("model: {width: 1}\nmodel: {width: 2}\n", "the key model is there twice (line 2)"),
        ("- 1\n- 2\n", "holds list, not sections of key: value pairs"),
        ("just text\n", "holds str, not sections"),
        ("base: 3\n", "base: 3 is not a file name or a list of them"),
        ("base: [a.yaml, 1]\n", "is not a file name or a list of them"),
        ("base: gone.yaml\n", "base: no file gone.yaml beside"),
        ("", "train.steps: is missing"),
        (MINIMAL + "3: {a: 1}\n", "3: no such key; a configuration has base, model"),
        ("model: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert message in refused(path)


def test_an_empty_file_names_all_that_is_missing(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    said = refused(tmp_path / "c.yaml").split("\n")
    assert [line.split(":")[0] for line in said] == ["model.heads", "train.steps"]


def test_files_that_are_none(tmp_path: Path):
    assert refused("emojii.yaml") == "--config: no file emojii.yaml; did you mean configs/quickstart/emoji.yaml?"
    assert refused("zzzzzz") == "--config: no file zzzzzz; configs/README.md lists ours"
    assert refused(tmp_path) == f"--config: {tmp_path} is a folder; name a .yaml file in it"
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    sentence = "is not a text file (it begins as UTF-16-LE and is none (truncated data at byte 2)); save it as UTF-8"
    assert refused(tmp_path / "b.yaml").endswith(sentence)


def test_nothing_is_evaluated(tmp_path: Path):
    marker = tmp_path / "evaluated"
    said = refused(None, f"optim.lr=__import__('pathlib').Path({str(marker)!r}).touch()")
    assert "optim.lr" in said and not marker.exists()
    assert "is not a number" in refused(None, "optim.lr=2**-10+1")
    assert "is not a number" in refused(None, "optim.lr=2**99999")
