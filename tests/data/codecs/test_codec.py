"""Codecs on a tiny random AutoencoderKL that the test itself saves."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.codec import PixelCodec, build_codec
from megadit.data.codecs.vae import VaeCodec
from megadit.errors import UserError
from megadit.optional import import_diffusers
from megadit.rng import batch_normal, normal, sample_keys, stream_key

KEYS = sample_keys(0, "posterior", range(20))
SCALE, SHIFT = 0.7, 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factor-2 autoencoder of 3 channels and 4 latent channels with keyed random weights."""
    path = tmp_path_factory.mktemp("vae")
    vae = import_diffusers().AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=SCALE,
    )
    for name, parameter in vae.named_parameters():
        if parameter.dim() > 1:
            parameter.data = normal(stream_key(0, name), parameter.shape) / parameter[0].numel() ** 0.5
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def codec(folder: Path) -> VaeCodec:
    return VaeCodec(VaeConfig(path=str(folder), scale=SCALE, shift=SHIFT))


def images(count: int = 20) -> torch.Tensor:
    return torch.tanh(normal(1, (count, 3, 16, 8)))


def test_encoding_is_the_posterior_with_keyed_noise(codec):
    latents = codec.encode(images(), KEYS)
    with torch.no_grad():
        posterior = codec.vae.encode(images()).latent_dist
    z = posterior.mean + posterior.std * batch_normal(KEYS, (4, 8, 4))
    torch.testing.assert_close(latents, (z - SHIFT) * SCALE, atol=1e-5, rtol=1e-4)
    assert codec.factor == 2 and codec.channels == 4
    assert posterior.std.min() > 0.01  # else the noise would not be seen


def test_a_latent_does_not_depend_on_its_batch(codec):
    whole = codec.encode(images(), KEYS)
    parts = torch.cat([codec.encode(images()[a:b], KEYS[a:b]) for a, b in ((0, 3), (3, 20))])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    other = codec.encode(images()[:1], KEYS[1:2])
    assert not torch.allclose(other, whole[:1], atol=1e-3)


def test_decoding_undoes_scale_and_shift(codec):
    z = normal(2, (20, 4, 8, 4))
    with torch.no_grad():
        expected = codec.vae.decode(z).sample
    torch.testing.assert_close(codec.decode((z - SHIFT) * SCALE), expected, atol=1e-4, rtol=1e-3)


def test_the_autoencoder_is_frozen_and_leaves_no_graph(codec):
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())
    assert not codec.encode(images(1), KEYS[:1]).requires_grad
    assert not codec.vae.training


def test_half_precision_images_give_float32_latents(codec):
    assert codec.encode(images(2).bfloat16(), KEYS[:2]).dtype == torch.float32


def test_another_scale_than_the_autoencoders_own_is_told(folder, caplog):
    with caplog.at_level(logging.WARNING):
        VaeCodec(VaeConfig(path=str(folder), scale=0.18215))
    assert "data.vae.scale: 0.18215" in caplog.text and "0.7" in caplog.text


def test_scale_and_shift_that_are_left_out_are_the_autoencoders_own(folder, caplog):
    with caplog.at_level(logging.WARNING):
        codec = VaeCodec(VaeConfig(path=str(folder)))
    assert (codec.scale, codec.shift) == (SCALE, 0.0) and "data.vae" not in caplog.text


def test_pixels_pass_through():
    codec = build_codec(None)
    assert isinstance(codec, PixelCodec) and codec.factor == 1
    assert torch.equal(codec.decode(codec.encode(images(), KEYS)), images())


def test_wrong_images_are_refused(codec):
    with pytest.raises(UserError, match="takes 3 channels, the images have 1"):
        codec.encode(torch.zeros(2, 1, 8, 8), KEYS[:2])
    with pytest.raises(UserError, match=r"data\.image_size: 8x7"):
        codec.encode(torch.zeros(2, 3, 8, 7), KEYS[:2])


def test_wrong_folders_are_refused(tmp_path, folder):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=rf"data\.vae\.path: .*{message}"):
            VaeCodec(VaeConfig(path=str(path)))

    with pytest.raises(UserError, match=r"data\.vae\.path: is missing"):
        VaeCodec(VaeConfig.model_construct(path=None, scale=1.0, shift=0.0))
    refused(tmp_path / "nowhere", "is not a folder")
    refused(tmp_path, "has no config.json")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    refused(tmp_path, "give its folder vae")
    config = tmp_path / "config.json"
    config.write_text("[")
    refused(tmp_path, "is not valid JSON")
    config.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    refused(tmp_path, "holds a UNet2DModel")
    config.write_text((folder / "config.json").read_text())
    refused(tmp_path, "no .safetensors weights")
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_in.bias"] = torch.full_like(state["decoder.conv_in.bias"], float("nan"))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "'decoder.conv_in.bias' holds 8 NaN of 8 values; latents would be NaN")
    weight_map = dict.fromkeys(state, "../diffusion_pytorch_model.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(UserError, match="index.json: weight_map puts '.*' into '../diff"):
        VaeCodec(VaeConfig(path=str(tmp_path)))
    index.unlink()
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(tmp_path, "cannot be read: it is cut off")
