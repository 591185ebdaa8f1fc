"""Pipeline folders as people have them: what is missing, damaged, of another pipeline, or in the wrong place."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models.tiny_dit import tiny_dit
from helpers.models.tiny_mmdit import tiny_mmdit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.weights import randomize
from megadit.checkpoint.find import load_model
from megadit.config import ModelConfig
from megadit.convert import to_diffusers
from megadit.convert.conversion import ConversionResult, convert
from megadit.convert.defaults import default_run
from megadit.convert.diffusers import folder as diffusers_folder
from megadit.convert.diffusers.difference import Difference
from megadit.convert.state_dicts import write_one
from megadit.errors import UserError
from megadit.models import build_model

MODELS = {"dit": tiny_dit(), "pixart": tiny_pixart(), "mmdit": tiny_mmdit(pooled=12, pos_embed_max_size=12)}
PIPELINES = {"dit": "DiTPipeline", "pixart": "PixArtAlphaPipeline", "mmdit": "StableDiffusion3Pipeline"}
SCHEDULERS = {
    "dit": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "pixart": {"_class_name": "DPMSolverMultistepScheduler"},
    "mmdit": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


def write(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


def make_pipeline(folder: Path, config: ModelConfig) -> None:
    model = build_model(config)
    randomize(model)
    config_json, state = to_diffusers(config, dict(model.named_parameters()))
    write(folder / "transformer/config.json", config_json)
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    write_one(folder / "transformer/diffusion_pytorch_model.safetensors", tensors)
    scheduler = SCHEDULERS[config.family]
    write(folder / "scheduler/scheduler_config.json", scheduler)
    index = {"_class_name": PIPELINES[config.family], "scheduler": ["diffusers", scheduler["_class_name"]]}
    write(folder / "model_index.json", {**index, "transformer": ["diffusers", config_json["_class_name"]]})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp("pipelines") / family for family in MODELS}
    for family, config in MODELS.items():
        make_pipeline(folders[family], config)
    return folders


@pytest.fixture
def pipes(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A copy of each family's pipeline. Nothing is measured: what both models compute is held elsewhere."""
    monkeypatch.setattr(diffusers_folder, "measure", lambda *values: Difference(0.0, 0.0, 1.0, None))
    return {family: Path(shutil.copytree(folder, tmp_path / family)) for family, folder in made.items()}


def change(file: Path, **values: Any) -> None:
    write(file, {**json.loads(file.read_text()), **values})


def come_in(folder: Path, **options: Any) -> ConversionResult:
    shutil.rmtree(folder.parent / "out", ignore_errors=True)
    return convert("diffusers", "megadit", folder, folder.parent / "out", **{"allow_inexact": True, **options})


def refused(folder: Path, words: str, **options: Any) -> None:
    started = time.perf_counter()
    with pytest.raises(UserError, match=words) as notes_of:
        come_in(folder, **options)
    assert str(notes_of.value).isprintable() and len(str(notes_of.value)) < 700
    assert not (folder.parent / "out").exists() and time.perf_counter() - started < 60


USUAL = ("start from it with", "diffusers' ", "the model's configuration is", "texts are cut or padded")


def notes_of(outcome: ConversionResult) -> list[str]:
    """What is said beyond what every conversion says."""
    return [note for note in outcome.notes if not note.startswith(USUAL)]


@pytest.mark.parametrize("family", MODELS)
def test_a_plain_pipeline_says_nothing_needless_out_and_in(pipes: dict[str, Path], family: str) -> None:
    assert notes_of(come_in(pipes[family])) == []
    objective = load_model(pipes[family].parent / "out")[0].objective
    assert (objective.kind, objective.shift) == (("flow", 3.0) if family == "mmdit" else ("ddpm", 1.0))
    convert("megadit", "diffusers", pipes[family].parent / "out", pipes[family].parent / "exported", allow_inexact=True)
    assert notes_of(come_in(pipes[family].parent / "exported")) == []
    assert load_model(pipes[family].parent / "out")[0].objective == objective


WHOLE = ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size", "in_channels", "sample_size")
OF_FAMILY = {
    "dit": ("num_embeds_ada_norm",),
    "pixart": ("caption_channels",),
    "mmdit": ("joint_attention_dim", "pooled_projection_dim", "caption_projection_dim", "pos_embed_max_size"),
}


@pytest.mark.parametrize(("family", "key"), [(f, key) for f in MODELS for key in (*WHOLE, *OF_FAMILY[f])])
def test_a_size_of_another_type_or_an_absurd_one(pipes: dict[str, Path], family: str, key: str) -> None:
    """One sentence, in no time and no memory, that names the file, the key and the value."""
    config_file = pipes[family] / "transformer/config.json"
    before = config_file.read_text()
    nullable = key in ("caption_channels", "pos_embed_max_size")
    values = ["28", True, 1.5, math.nan, [32], {"a": 1}, -1, 0, 10**30, *([] if nullable else [None])]
    for value in values:
        change(config_file, **{key: value})
        refused(pipes[family], rf"IN: '.*transformer/config\.json' (has {key} .*(must|models here)|asks for)")
        write(config_file, before)
    change(config_file, **{key: 10**9})
    refused(pipes[family], r"^IN: '.*transformer/config\.json'|is not a \w+ of diffusers of this size")


OTHER_VALUES: list[tuple[str, str, dict[str, Any], str]] = [
    ("dit", "transformer/config.json", {"sample_size": [8, 4]}, r"sample_size \[8, 4\], and models here have square"),
    ("dit", "transformer/config.json", {"sample_size": 7}, "sample_size 7, which its patch_size 2 does not divide"),
    ("dit", "transformer/config.json", {"attention_bias": "yes"}, "attention_bias 'yes', which must be true or false"),
    ("dit", "transformer/config.json", {"norm_eps": None}, "norm_eps null, which must be given"),
    ("dit", "transformer/config.json", {"dropout": "0"}, "dropout '0', which must be a finite number"),
    ("dit", "transformer/config.json", {"activation_fn": ["gelu"]}, r"activation_fn \['gelu'\], which must be a text"),
    ("dit", "transformer/config.json", {"_class_name": None}, "_class_name null"),
    (
        "dit",
        "transformer/config.json",
        {"_class_name": "FluxTransformer2DModel"},
        "_class_name FluxTransformer2DModel;",
    ),
    ("dit", "transformer/config.json", {"quantization_config": {"a": 1}}, "quantized weights cannot be read"),
    ("pixart", "transformer/config.json", {"interpolation_scale": 0}, "interpolation_scale 0, which must be a number"),
    ("pixart", "transformer/config.json", {"interpolation_scale": math.inf}, "interpolation_scale inf"),
    (
        "pixart",
        "transformer/config.json",
        {"attention_type": "gated"},
        "attention_type 'gated', a PixArt has 'default'",
    ),
    ("pixart", "transformer/config.json", {"cross_attention_dim": None}, "cross_attention_dim null"),
    ("pixart", "transformer/config.json", {"_text_max_length": 10**9}, "_text_max_length 1000000000, which must be"),
    (
        "pixart",
        "transformer/config.json",
        {"use_additional_conditions": 1},
        "use_additional_conditions 1, which must be",
    ),
    ("mmdit", "transformer/config.json", {"dual_attention_layers": 3}, "dual_attention_layers 3, which must be a list"),
    ("mmdit", "transformer/config.json", {"qk_norm": {}}, "qk_norm {…}, which must be a text"),
    ("mmdit", "transformer/config.json", {"pos_embed_max_size": 2**20}, "asks for positions of 1048576 x 1048576"),
    ("dit", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr true"),
    ("dit", "scheduler/scheduler_config.json", {"num_train_timesteps": "1e3"}, "has num_train_timesteps '1e3'"),
    ("mmdit", "scheduler/scheduler_config.json", {"shift": None}, "has shift null, which must be given"),
    ("dit", "model_index.json", {"transformer": [None, None]}, "names no transformer, so that there is no model"),
    ("dit", "transformer/config.json", {"attention_head_dim": 2**20}, "width: 2097152"),
    ("dit", "model_index.json", {"transformer": "x"}, "has transformer 'x', which must be a library and a class"),
    ("dit", "model_index.json", {"scheduler": [1, 2]}, r"has scheduler \[1, 2\], which must be a library and a class"),
    ("dit", "model_index.json", {"_class_name": 3}, "_class_name 3, which must be a text"),
    ("dit", "model_index.json", {"id2label": {"a": "cat"}}, "has the label 'a', which must be a whole number"),
    ("dit", "model_index.json", {"id2label": {"1": "cat", "01": "dog"}}, "has the label 1 twice"),
    ("dit", "model_index.json", {"id2label": {"1": None}}, "id2label has 1 null"),
    ("dit", "model_index.json", {"id2label": ["cat"]}, r"has id2label \['cat'\], which must be keys and values"),
]


@pytest.mark.parametrize(("family", "file", "values", "words"), OTHER_VALUES, ids=lambda value: str(value)[:50])
def test_other_values_name_file_key_and_value(
    pipes: dict[str, Path], family: str, file: str, values: dict[str, Any], words: str
) -> None:
    change(pipes[family] / file, **values)
    refused(pipes[family], rf"^IN: '{pipes[family]}/{file}'.* .*{words}")


@pytest.mark.parametrize("file", ["transformer/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_what_is_no_json_says_what_it_is(pipes: dict[str, Path], file: str) -> None:
    for text, words in ((LFS, "a git-LFS pointer"), ("<html>", "a web page"), ("", "an empty file"), ("[]", "a list")):
        write(pipes["dit"] / file, text)
        refused(pipes["dit"], rf"{file}' .*{words}")
    write(pipes["dit"] / file, "[" * 100_000)
    refused(pipes["dit"], "is nested too deeply")


@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_an_image_of_billions_of_tokens_is_not_tried_out(
    pipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.undo()
    change(pipes[family] / "transformer/config.json", sample_size=65536)
    notes = " ".join(come_in(pipes[family]).notes)
    assert "not measured, since its images of 65536 x 65536 have 1,073,741,824 tokens, too many to try out" in notes


def test_old_files_of_transformer_2d_model_are_read(pipes: dict[str, Path]) -> None:
    for family in ("dit", "pixart"):
        old = {"num_vector_embeds": None, "use_linear_projection": False, "only_cross_attention": False}
        change(pipes[family] / "transformer/config.json", _class_name="Transformer2DModel", **old)
        assert notes_of(come_in(pipes[family])) == []
        change(pipes[family] / "transformer/config.json", double_self_attention=True)
        refused(pipes[family], "has double_self_attention true, which a .* does not have")
    change(pipes["dit"] / "transformer/config.json", double_self_attention=False, norm_type="layer_norm")
    refused(pipes["dit"], "is of a Transformer2DModel with norm_type 'layer_norm'; known are ada_norm_zero, ada")


def test_keys_that_no_class_has_are_told(pipes: dict[str, Path]) -> None:
    values = {"dropout": 0.1, "upcast_attention": True, "made_up": 3, "nothing": None}
    change(pipes["dit"] / "transformer/config.json", **values)
    assert notes_of(come_in(pipes["dit"])) == [
        "dropout 0.1 of its config.json is left out: there is none here",
        "upcast_attention true of its config.json is left out: model.attention_precision=fp32 does so here",
        "of its config.json are left out, since a DiTTransformer2DModel does not have them: made_up=3",
    ]


def test_parts_that_are_missing_or_more(pipes: dict[str, Path]) -> None:
    dit = pipes["dit"]
    index = dit / "model_index.json"
    change(index, controlnet=["diffusers", "ControlNetModel"], text_encoder_2=["transformers", "CLIPTextModel"])
    change(index, vae=["diffusers", "AutoencoderDC"], scheduler=["diffusers", "PNDMScheduler"])
    write(dit / "vae/config.json", {"_class_name": "AutoencoderDC"})
    assert notes_of(come_in(dit)) == [
        "its scheduler is a PNDMScheduler as model_index.json says and diffusers loads it, not a DDIMScheduler",
        "of its scheduler is left out what only draws (sample.* does so here): PNDMScheduler",
        "its autoencoder is a AutoencoderDC, which is not read here: data.vae.* is yours to give",
        "of the DiTPipeline are left out: controlnet (ControlNetModel)",
    ]
    write(dit / "vae/config.json", {"_class_name": "AutoencoderKL", "latent_channels": 16})
    change(index, scheduler=["diffusers", "DDIMScheduler"], vae=["diffusers", "AutoencoderKL"], controlnet=[None, None])
    assert notes_of(come_in(dit)) == [
        "its autoencoder has latents of 16 channels, the transformer takes 4: data.vae.* is yours to give"
    ]
    write(dit / "vae/config.json", {"_class_name": "AutoencoderKL", "block_out_channels": None})
    refused(dit, r"^IN: '.*vae/config\.json' has block_out_channels null, which must be given")
    change(index, scheduler=[None, None], vae=None)
    assert notes_of(come_in(dit)) == ["the pipeline has no scheduler: objective.* is what is usual for its family"]
    change(index, scheduler=["diffusers", "DDIMScheduler"])
    (dit / "scheduler/scheduler_config.json").unlink()
    refused(dit, r"scheduler_config\.json' is missing, though model_index\.json names a DDIMScheduler; copy the whole")
    assert notes_of(come_in(dit / "transformer")) == []  # which the sentence offers
    shutil.rmtree(dit / "transformer")
    refused(dit, r"transformer' is missing, though model_index\.json names it; copy the whole folder again")


def test_the_remedy_for_a_training_that_cannot_be_told_works(pipes: dict[str, Path]) -> None:
    change(pipes["dit"] / "scheduler/scheduler_config.json", prediction_type="sample")
    refused(pipes["dit"], r"for the weights alone, give IN/transformer, with the objective\.\* of its training")
    come_in(pipes["dit"] / "transformer", overrides=["objective.prediction=v"])
    assert load_model(pipes["dit"] / "out")[0].objective.prediction == "v"
    change(pipes["dit"] / "model_index.json", scheduler=["mine", "MyScheduler"])
    refused(
        pipes["dit"], r"scheduler_config\.json' is of a 'MyScheduler', and how such a model was trained is not known"
    )


def test_a_config_that_overrules_the_scheduler_is_told(pipes: dict[str, Path]) -> None:
    change(pipes["dit"] / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    notes = notes_of(come_in(pipes["dit"], config=default_run(MODELS["dit"])))
    assert notes == ["as --config says, objective.prediction is eps and not v as in the pipeline's scheduler"]


def test_a_scheduler_goes_through_from_pipeline_to_pipeline(pipes: dict[str, Path]) -> None:
    pixart, out = pipes["pixart"], pipes["pixart"].parent / "again"
    change(pixart / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    convert("diffusers", "diffusers", pixart, out)
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_class_names(pipes: dict[str, Path]) -> None:
    index = pipes["dit"] / "model_index.json"
    change(index, id2label={str(label): f"class {label}" for label in range(10)})
    assert notes_of(come_in(pipes["dit"])) == []
    assert json.loads((pipes["dit"].parent / "out/classes.json").read_text())[9] == "class 9"
    change(index, id2label={str(label): "a" for label in range(12)})
    assert notes_of(come_in(pipes["dit"])) == [
        "id2label names labels to 11, the model has 10 classes: those above are left out"
    ]
    change(index, id2label={"0": "a", "1": "b"})
    assert notes_of(come_in(pipes["dit"])) == [
        "id2label has no name for 8 of the model's 10 classes: all names are left out"
    ]
    assert not (pipes["dit"].parent / "out/classes.json").exists()


def test_pixart_sigma_takes_longer_texts(pipes: dict[str, Path]) -> None:
    config = json.loads((pipes["pixart"] / "transformer/config.json").read_text())
    del config["_text_max_length"]
    write(pipes["pixart"] / "transformer/config.json", config)
    for name, length in (("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300)):
        change(pipes["pixart"] / "model_index.json", _class_name=name)
        come_in(pipes["pixart"])
        text = load_model(pipes["pixart"].parent / "out")[0].model.text
        assert text is not None and text.max_length == length


def test_a_null_caption_that_is_none_is_refused(pipes: dict[str, Path]) -> None:
    for tensors in ({"other": torch.zeros(7, 20)}, {"null_caption": torch.zeros(7)}):
        write_one(pipes["pixart"] / "null_caption.safetensors", tensors)
        refused(pipes["pixart"], r"null_caption\.safetensors' holds no null_caption of shape \[tokens, channels\]")


def test_folders_that_are_no_pipeline_say_what_is_meant(pipes: dict[str, Path], tmp_path: Path) -> None:
    dit = pipes["dit"]
    cache = tmp_path / "hub/models--a--b"
    for revision in ("0f", "9a"):
        (cache / "snapshots" / revision).mkdir(parents=True)
    write(cache / "refs/main", "0f")
    refused(cache, f"is a cache of the Hugging Face hub; give its snapshot '{cache}/snapshots/0f'")
    shutil.copytree(dit, tmp_path / "alone")
    (tmp_path / "alone/model_index.json").unlink()
    (tmp_path / "alone/model_index.json").symlink_to("../../blobs/ab")
    refused(tmp_path / "alone", r"holds model_index\.json, which is a link to '\.\./\.\./blobs/ab', which is missing")
    shutil.rmtree(tmp_path / "alone")
    change(dit / "model_index.json", transformer=["diffusers", "PixArtTransformer2DModel"])
    refused(dit, "is of a DiTTransformer2DModel, but model_index.json names a PixArtTransformer2DModel")
    refused(tmp_path, f"holds neither model_index.json nor config.json, but '{dit}' does; give that folder")
    refused(dit / "scheduler", "holds neither model_index.json nor config.json; give a pipeline folder, or a")
    refused(dit / "model_index.json", "is a file, and diffusers keeps a model in a folder")
    (dit / "model_index.json").unlink()
    refused(dit, f"has a folder transformer and no model_index.json; copy the .* or give '{dit}/transformer' alone")
    (dit / "unet").mkdir()
    shutil.rmtree(dit / "transformer")
    refused(dit, "has a UNet and no model_index.json; models here are Transformers")
    write(dit / "model_index.json", {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2D"]})
    refused(dit, "is of a StableDiffusionXLPipeline, whose model is a UNet; models here are Transformers")
