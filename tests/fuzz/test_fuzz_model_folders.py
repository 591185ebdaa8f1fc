"""Folders of diffusers and transformers: every JSON file with odd values is read, or refused by key and value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from helpers.fuzz.hunt import efforts, hunt, json_bytes, odd_json
from helpers.fuzz.weight_files import converted
from helpers.models.tiny_dit import tiny_dit
from helpers.models.tiny_mmdit import tiny_mmdit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.config.schema.data import VaeConfig
from megadit.convert.request import Request
from megadit.data.codecs.folder import codec_facts
from megadit.data.codecs.pca import PatchPca, load_pca, save_pca
from megadit.data.features.folders import check_dinov2
from megadit.data.text.folders import read_config
from megadit.models import build_model


def model_state(model: ModelConfig) -> dict[str, Tensor]:
    built = build_model(model)
    randomize(built)
    return {name: value.detach().clone() for name, value in built.state_dict().items()}


MODELS = {"dit": tiny_dit(), "pixart": tiny_pixart(), "mmdit": tiny_mmdit(pooled=12)}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline folder of diffusers of each family, with an autoencoder's config.json."""
    from megadit.convert import to_diffusers

    made = {}
    for family, model in MODELS.items():
        folder = tmp_path_factory.mktemp(family) / "pipeline"
        config_json, state = to_diffusers(model, model_state(model))
        for part, values in (
            ("transformer/config.json", {"_diffusers_version": "0.30.0", **config_json}),
            ("scheduler/scheduler_config.json", SCHEDULERS[family]),
            ("vae/config.json", VAE),
            (
                "model_index.json",
                {
                    "_class_name": "X",
                    "transformer": ["diffusers", config_json["_class_name"]],
                    "id2label": {"0": "cat"},
                },
            ),
        ):
            file = folder / part
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(json_bytes(values))
        save_file(
            {name: value.float().contiguous().clone() for name, value in state.items()},
            folder / "transformer" / "diffusion_pytorch_model.safetensors",
        )
        made[family] = folder
    return made


VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "latent_channels": 4,
    "in_channels": 3,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "sample_size": 32,
}
SCHEDULERS = {
    "dit": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "clip_sample": False,
        "trained_betas": None,
    },
    "pixart": {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": False,
    },
    "mmdit": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}


@efforts
@pytest.mark.parametrize("family", sorted(MODELS))
def test_folders_of_diffusers(
    effort: str, family: str, pipelines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a pipeline's JSON files in turn has odd values. The difference to diffusers is not measured: too slow."""
    from megadit.convert.diffusers import folder as diffusers_folder

    monkeypatch.setattr(diffusers_folder, "not_measured", lambda *_, **__: "this is a test")
    folder = tmp_path / "pipeline"
    shutil.copytree(pipelines[family], folder)
    names = ("transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json", "model_index.json")
    whole = {name: (folder / name).read_bytes() for name in names}
    request = Request(allow_inexact=True)
    converted("diffusers", folder, request)  # sound as it is

    def read(drawn: tuple[str, bytes]) -> None:
        name, data = drawn
        (folder / name).write_bytes(data)
        try:
            converted("diffusers", folder, request)
        finally:
            (folder / name).write_bytes(whole[name])

    extra = ("ada_norm_single", "epsilon", "sample", "scaled_linear", "DDPMScheduler", 4, 8, 16)
    hunt(
        effort,
        st.one_of(*(st.tuples(st.just(name), odd_json([json.loads(whole[name])], extra)) for name in names)),
        read,
        quick=8,
    )


@efforts
def test_codec_folders(effort: str, tmp_path: Path) -> None:
    """config.json of an autoencoder, and of the codec that is fitted here."""
    (tmp_path / "vae").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    codec = PatchPca(torch.zeros(12), torch.eye(12)[:4], 3, 2, 1.0)
    save_pca(codec, tmp_path / "pca", {"psnr": 30.0})
    pca = json.loads((tmp_path / "pca" / "config.json").read_text())
    drawn = st.one_of(st.tuples(st.just("vae"), odd_json([VAE])), st.tuples(st.just("pca"), odd_json([pca])))

    def read(value: tuple[str, bytes]) -> None:
        name, data = value
        (tmp_path / name / "config.json").write_bytes(data)
        codec_facts(VaeConfig(path=str(tmp_path / name)))
        if name == "pca":
            loaded = load_pca(tmp_path / "pca")
            assert loaded.encode(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 4, 4)

    hunt(effort, drawn, read, quick=22)


@efforts
def test_configs_of_transformers(effort: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
    config = {
        "model_type": "t5",
        "d_model": 64,
        "architectures": ["T5EncoderModel"],
        "vocab_size": 100,
        "hidden_size": 64,
        "projection_dim": 8,
    }

    def read(data: bytes) -> None:
        (tmp_path / "config.json").write_bytes(data)
        read_config(tmp_path, "data.text.path", ("t5", "mt5"))

    hunt(effort, odd_json([config]), read)


@efforts
def test_folders_of_features(effort: str, tmp_path: Path) -> None:
    """config.json and preprocessor_config.json of a DINOv2."""
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
    whole = {
        "config.json": {"model_type": "dinov2", "patch_size": 14, "hidden_size": 8, "num_hidden_layers": 1},
        "preprocessor_config.json": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    }

    def read(drawn: tuple[str, bytes]) -> None:
        for name, values in whole.items():
            (tmp_path / name).write_bytes(drawn[1] if name == drawn[0] else json_bytes(values))
        check_dinov2(str(tmp_path), 28)

    hunt(effort, st.one_of(*(st.tuples(st.just(name), odd_json([values])) for name, values in whole.items())), read)
