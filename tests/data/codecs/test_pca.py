"""The PCA patch codec against numpy's singular value decomposition, its folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.owners import leave_owner, parent
from megadit.config import DataConfig
from megadit.config.schema.data import VaeConfig
from megadit.data import build_datasets
from megadit.data.codecs.codec import build_codec, check_vae, codec_facts, codec_identity
from megadit.data.codecs.pca import PcaCodec, fit_and_save, fit_pca, measure_psnr
from megadit.errors import UserError
from megadit.rng import sample_keys

DIGITS = DataConfig(name="digits")
KEYS = sample_keys(0, "unused", range(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "digits-f2c3"
    fit_and_save(DIGITS, path, 2, 3, 10_000)
    return path


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    train, held_out = build_datasets(DIGITS)
    codec = fit_pca(train, range(len(train)), 2, 3)
    pixels = torch.stack([train.image(i) for i in range(len(train))]).double().numpy() / 127.5 - 1
    patches = pixels.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)
    mean = patches.mean(0)
    right = np.linalg.svd(patches - mean, full_matrices=False)[2][:3]
    np.testing.assert_allclose(codec.mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(np.abs((codec.components.numpy() * right).sum(1)), 1, atol=1e-5)
    z = (patches - mean) @ codec.components.double().numpy().T
    np.testing.assert_allclose(codec.scale, 1 / np.sqrt(z.var(0).mean()), rtol=1e-5)
    held = torch.stack([held_out.image(i) for i in range(len(held_out))]).double().numpy() / 127.5 - 1
    patches = held.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)
    back = ((patches - mean) @ right.T @ right + mean).clip(-1, 1)
    expected = 10 * np.log10(4 / np.square(back - patches).mean())
    assert measure_psnr(codec, held_out, range(len(held_out))) == pytest.approx(expected, abs=1e-3)


def test_all_components_lose_nothing() -> None:
    train, _ = build_datasets(DIGITS)
    codec = fit_pca(train, range(200), 4, 16)
    image = torch.rand(2, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(codec.decode(codec.encode(image)), image, atol=1e-5, rtol=0)


def test_fitting_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    fit_and_save(DIGITS, tmp_path / "again", 2, 3, 10_000)
    for name in ("codec.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_folder_stands_where_an_autoencoder_would(folder: Path) -> None:
    config = VaeConfig(path=str(folder), factor=2)
    codec = build_codec(config)
    assert isinstance(codec, PcaCodec) and (codec.factor, codec.channels) == (2, 3)
    train, _ = build_datasets(DIGITS)
    images = torch.stack([train.image(i) for i in range(400)]).float() / 127.5 - 1
    latents = codec.encode(images, sample_keys(0, "unused", range(400)))
    assert latents.shape == (400, 3, 4, 4) and 0.9 < float(latents.std()) < 1.1
    assert float((codec.decode(latents) - images).square().mean()) < 0.1
    check_vae(config, in_channels=3, image_channels=1)
    assert codec_facts(config).scale == codec.scale
    assert codec_identity(config).startswith("PcaPatchCodec:") and len(codec_identity(config)) == 30


@pytest.mark.parametrize(
    ("changes", "checks", "sentence"),
    [
        ({"factor": 8}, {}, r"data\.vae\.factor: 8, but the codec .* set data\.vae\.factor=2"),
        ({"scale": 0.18215}, {}, r"data\.vae\.scale: 0\.18215, but .* was fitted .* leave data\.vae\.scale out"),
        ({"shift": 1.0}, {}, r"data\.vae\.shift: 1, but 0 was fitted"),
        ({}, {"in_channels": 4}, r"model\.in_channels: 4, but the latents .* set model\.in_channels=3"),
        ({}, {"image_channels": 3}, r"takes images of 1 channel\(s\), the data have 3"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, changes: dict, checks: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_vae(VaeConfig(**{"path": str(folder), "factor": 2, **changes}), **checks)


def test_bad_requests_and_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    train, _ = build_datasets(DIGITS)
    with pytest.raises(UserError, match="--factor: 3 does not divide"):
        fit_pca(train, [0], 3, 1)
    with pytest.raises(UserError, match="--channels: 5 is not from 1 to the 4"):
        fit_pca(train, [0], 2, 5)
    with pytest.raises(UserError, match="is not empty"):
        fit_and_save(DIGITS, folder, 2, 3, 10)
    leave_owner(tmp_path / "new", **parent())
    with pytest.raises(UserError, match=f"'{tmp_path}/new' is in use by process"):
        fit_and_save(DIGITS, tmp_path / "new", 2, 3, 10)
    with pytest.raises(UserError, match="takes images of 1 channel"):
        build_codec(VaeConfig(path=str(folder))).encode(torch.zeros(4, 3, 8, 8), KEYS)
    values = json.loads((folder / "config.json").read_text())
    weights = (folder / "codec.safetensors").read_bytes()
    for name, text, data in (
        ("cut", json.dumps(values), weights[:-8]),
        ("other", json.dumps({**values, "channels": 2}), weights),
        ("empty", json.dumps({"_class_name": "PcaPatchCodec"}), weights),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "codec.safetensors").write_bytes(data)
        with pytest.raises(
            UserError, match=r"data\.vae\.path: .*(is cut off|does not load|has no factor|is not valid JSON)"
        ):
            build_codec(VaeConfig(path=str(tmp_path / name)))
