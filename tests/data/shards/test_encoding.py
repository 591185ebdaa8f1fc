"""Stored latents, text and features: what a run reads is what it would have computed; going on after a cut."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.config import DataConfig, RunConfig
from megadit.config.schema.data import VaeConfig
from megadit.data import BatchLayout, BatchStream, build_datasets, describe
from megadit.data.checks import check_against_model, check_codec, missing_decoder_note, with_stored_codec
from megadit.data.codecs.codec import StoredCodec, build_codec, vae_at
from megadit.data.codecs.pca import fit_and_save
from megadit.data.codecs.vae import VaeCodec
from megadit.data.conditions import Conditions, stored_text
from megadit.data.dataset import DatasetFacts, StoredFacts
from megadit.data.features.encoders import FeatureEncoder
from megadit.data.shards.encoding import Encoding, encode_set
from megadit.data.shards.naming import Sharding
from megadit.data.shards.tar_set import load_tars
from megadit.data.shards.writing import make_shards
from megadit.data.text.encoders import NetworkEncoder
from megadit.errors import UserError
from megadit.optional import import_diffusers
from megadit.rng import normal, sample_keys, stream_key

SMALL = Sharding("x", 100)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sheep of three colours: 150 RGB pictures of 8 pixels with captions, in tars."""
    from PIL import Image

    source = tmp_path_factory.mktemp("source")
    lines = []
    for i in range(150):
        pixels = (normal(stream_key(0, "picture", i), (8, 8, 3)) * 40 + 128).clamp(0, 255).byte().numpy()
        Image.fromarray(pixels).save(source / f"{i}.png")
        label = ("black", "grey", "white")[i % 3]
        lines.append(json.dumps({"file_name": f"{i}.png", "label": label, "caption": "sheep " * (i % 4)}))
    (source / "metadata.jsonl").write_text("\n".join(lines))
    out = tmp_path_factory.mktemp("tars") / "sheep"
    make_shards(DataConfig(name="image-folder", path=str(source), image_size=8), out, SMALL)
    return out


@pytest.fixture(scope="module")
def codec(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "f2c4"
    fit_and_save(data(shards), folder, 2, 4, 1000)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factor-2 AutoencoderKL with keyed random weights and a scale of its own."""
    folder = tmp_path_factory.mktemp("vae")
    model = import_diffusers().AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        scaling_factor=0.7, shift_factor=0.25,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data = normal(stream_key(0, name), parameter.shape) / parameter[0].numel() ** 0.5
    model.save_pretrained(folder)
    return folder


def data(path: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"name": "webdataset", "path": str(path), "val_fraction": 0.1, **more})


def batches(config: DataConfig, steps: int = 3) -> list:
    train, _ = build_datasets(config)
    layout = BatchLayout(8, 1, 0, 8)
    with BatchStream(train, layout, seed=3, flip=config.flip, workers=0) as stream:
        return [next(stream) for _ in range(steps)]


def model_space(config: DataConfig, steps: int = 3) -> Tensor:
    """What ``TrainingLoss.inputs`` gives the model of the first batches."""
    train, _ = build_datasets(config)
    coder = build_codec(config.vae, "cpu", train.stored)
    return torch.cat([coder.encode(b.images, sample_keys(3, "latent", b.numbers)) for b in batches(config, steps)])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["codec", "vae"])
def test_stored_latents_are_those_of_the_run(shards, tmp_path, kind, flip, request):
    """The same draws from the same posteriors of the same (mirrored) images, to the rounding of what is stored."""
    at = {"vae": {"path": str(request.getfixturevalue(kind)), "factor": 2}, "flip": flip}
    online = data(shards, **at)
    for dtype, tolerance in (("float32", 1e-5), ("float16", 4e-3)):
        manifest = encode_set(online, tmp_path / dtype, SMALL, Encoding(dtype=dtype))
        assert manifest.stored is not None and manifest.stored.moments == (kind == "vae")
        stored = data(tmp_path / dtype, **at)
        torch.testing.assert_close(model_space(stored), model_space(online), atol=tolerance, rtol=tolerance)
    assert not torch.allclose(model_space(online)[0], model_space(online)[1])


def test_a_stored_sample_is_one_draw(shards, vae, tmp_path):
    at = {"vae": {"path": str(vae), "factor": 2}}
    encode_set(data(shards, **at), tmp_path / "a", SMALL, Encoding(posterior="sample", dtype="float32"))
    tars = load_tars(data(tmp_path / "a", **at))
    assert tars.stored is not None and not tars.stored.moments and tars.image(5).shape == (4, 4, 4)
    source, coder = load_tars(data(shards)), VaeCodec(VaeConfig(path=str(vae)))
    mean, std = coder.posterior(source.image(5)[None] / 127.5 - 1)
    assert 0.01 < float(((tars.image(5) - mean[0]) / std[0]).abs().mean()) < 3


def test_a_set_that_was_cut_off_is_gone_on_with_to_the_same_bytes(shards, codec, tmp_path):
    config = data(shards, vae={"path": str(codec), "factor": 2}, flip=True)

    class Cut(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if done > 120:
            raise Cut

    sharding = Sharding("x", 50)
    encode_set(config, tmp_path / "whole", sharding, Encoding())
    with pytest.raises(Cut):
        encode_set(config, tmp_path / "cut", sharding, Encoding(), progress=progress)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [".recipe.json", "x-000000.tar", "x-000001.tar"]
    with pytest.raises(UserError, match=r"--out: .* another command began"):
        encode_set(config, tmp_path / "cut", sharding, Encoding(dtype="float32"))
    with pytest.raises(UserError, match=r"data\.path: the writing of .*cut did not end; give the command"):
        load_tars(data(tmp_path / "cut"))
    encode_set(config, tmp_path / "cut", sharding, Encoding())
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == ["index.safetensors", "manifest.json", "x-000000.tar", "x-000001.tar", "x-000002.tar"]
    assert all((tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    for folder in ("cut", ""):
        with pytest.raises(UserError, match="--out: .*(finished set|is not empty)"):
            encode_set(config, tmp_path / folder, sharding, Encoding())


def test_tars_end_before_they_grow_too_large(shards, tmp_path):
    make_shards(data(shards), tmp_path / "y", Sharding("y", 1000, 100_000))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "y").glob("*.tar"))]
    assert len(sizes) > 2 and all(size <= 100_000 + 10_240 for size in sizes)
    assert len(load_tars(data(tmp_path / "y"))) == 150


class Words(NetworkEncoder):
    """One token a word and an end; its features are its length and its place."""

    identity, dim, pooled_dim, longest, device, padding = "words", 3, 2, 9, torch.device("cpu"), 0

    def token_ids(self, texts):
        return [[*map(len, text.split()), 1] for text in texts]

    def forward(self, ids, mask):
        position = torch.arange(ids.shape[1]).expand_as(ids)
        states = torch.stack([ids, position, ids * 0 + 1], -1).float()
        return states, torch.stack([mask.sum(1), ids.sum(1)], -1).float()


class Corners(FeatureEncoder):
    """The picture's own channels on a grid of 2 x 2, so that mirroring shows."""

    identity, dim = "corners", 3

    def _encode(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2)


@pytest.fixture
def encoders(monkeypatch):
    monkeypatch.setattr("megadit.data.text.encoders.build_encoder", lambda *_: Words())
    monkeypatch.setattr("megadit.data.features.targets.build_encoder", lambda *_: Corners())


def test_text_and_features_travel_with_the_images(shards, codec, tmp_path, encoders):
    more = {"condition": "text", "features": {"encoder": "efficientnet-lite0"}, "flip": True}
    at = {"vae": {"path": str(codec), "factor": 2}}
    encode_set(data(shards, **more, **at), tmp_path / "t", SMALL, Encoding(max_length=9))
    facts = load_tars(data(tmp_path / "t")).stored
    assert facts is not None
    assert (facts.text_dim, facts.text_length, facts.pooled_dim, facts.text_encoder) == (3, 4, 2, "words")
    assert (facts.feature_dim, facts.feature_encoder, facts.mirrored) == (3, "corners", True)
    more["features"] = {"encoder": "stored"}
    tars = load_tars(data(tmp_path / "t", **more))
    extras = tars.extras(2)
    assert extras["text"].tolist() == [[5, 0, 1], [5, 1, 1], [1, 2, 1], [0, 0, 0]]
    assert extras["text_mask"].tolist() == [True, True, True, False] and extras["pooled"].tolist() == [3, 11]
    assert tars.mirrored is not None
    torch.testing.assert_close(tars.mirrored.extras(2)["features"], extras["features"].flip(-1), atol=1e-3, rtol=1e-3)
    assert tars.null_extras()["text"].tolist() == [[1, 0, 1]] and tars.null_extras()["text_mask"].all()
    assert load_tars(data(tmp_path / "t")).extras(2) == {}  # nothing is read that nobody asked for
    batch = batches(data(tmp_path / "t", **more))[0]
    from megadit.config.schema.model import TextInput

    cond = stored_text(batch.extras, TextInput(dim=3, max_length=6, pooled_dim=2))
    assert isinstance(cond, Conditioning) and cond.text is not None and cond.text.shape == (8, 6, 3)


def test_text_alone_is_stored_beside_images(shards, tmp_path, encoders):
    encode_set(data(shards, condition="text"), tmp_path / "t", SMALL, Encoding(max_length=2))
    tars = load_tars(data(tmp_path / "t", condition="text"))
    assert torch.equal(tars.image(7), load_tars(data(shards)).image(7)) and not tars.stores_latents
    assert tars.extras(7)["text"].tolist() == [[5, 0, 1], [1, 1, 1]]  # cut, its end kept


def test_what_cannot_be_encoded_is_refused(shards, codec, tmp_path, encoders, monkeypatch):
    def refused(sentence: str, max_length: int | None = None, **more: object) -> None:
        with pytest.raises(UserError, match=sentence):
            encode_set(data(shards, **more), tmp_path / "no", SMALL, Encoding(max_length=max_length))
        assert not (tmp_path / "no").exists() or not list((tmp_path / "no").glob("*.tar"))

    refused(r"data\.vae: is not given, .* nothing to encode")
    refused(r"--max_length: is not given", condition="text")
    refused(r"--max_length: 10, but data\.text\.encoder takes 9", 10, condition="text")
    refused(r"data\.vae\.factor: 8, but", vae={"path": str(codec)})
    monkeypatch.setattr(
        Words, "forward", lambda self, ids, mask: (1e5 * torch.ones(*ids.shape, 3), torch.ones(len(ids), 2))
    )
    refused(r"--dtype: a value of text\.npy is beyond float16", 9, condition="text")


LATENTS = DatasetFacts(
    "emoji", 3, 64, 9, 100, "",
    StoredFacts(channels=16, size=16, factor=4, scale=0.9, shift=0.0, codec="PcaPatchCodec:1234"),
)  # fmt: skip


def run_config(model: dict | None = None, **more: object) -> RunConfig:
    fields = {"width": 64, "heads": 4, "in_channels": 16, "input_size": 16, "num_classes": 9, **(model or {})}
    values = {"name": "webdataset", "path": "x", **more}
    return RunConfig.model_validate({"model": fields, "data": values, "train": {"steps": 1}})


@pytest.mark.parametrize(
    ("model", "more", "sentence"),
    [
        ({"in_channels": 4}, {}, r"model\.in_channels: 4, but the stored latents of emoji have 16 channels; set"),
        ({"input_size": 8}, {}, r"model\.input_size: 8, but the stored latents of emoji have 16 pixels a side; set"),
        ({"input_size": 16}, {"image_size": 16}, r"data\.image_size: 16, but .* images of 64 pixels; leave"),
        ({}, {"flip": True}, r"data\.flip: true, but emoji holds no latents of mirrored images"),
        ({}, {"vae": {"scale": 0.5, "factor": 4}}, r"data\.vae\.scale: 0\.5, but .* were made with 0\.9; set"),
        ({}, {"vae": {"shift": 0.5, "factor": 4}}, r"data\.vae\.shift: 0\.5, but .* were made with 0; set"),
        ({}, {"vae": {"path": "p"}}, r"data\.vae\.factor: 8, but .* were made with 4; set data\.vae\.factor=4"),
        ({"num_classes": 3}, {}, r"model\.num_classes: 3, but emoji has 9"),
    ],
)
def test_stored_latents_that_do_not_fit_are_refused(model: dict, more: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_against_model(LATENTS, run_config(model, **more))


def test_a_run_without_the_codec_says_so_and_keeps_what_drawing_needs(codec: Path, caplog) -> None:
    config = run_config()
    check_against_model(LATENTS, config)
    check_codec(LATENTS, config)
    assert "no pictures will be drawn" in str(missing_decoder_note(LATENTS, config))
    vae = with_stored_codec(LATENTS, config).data.vae
    assert vae == VaeConfig(path=None, scale=0.9, shift=0.0, factor=4)
    coder = build_codec(vae, "cpu", LATENTS.stored)
    assert isinstance(coder, StoredCodec) and not coder.decodes
    with pytest.raises(UserError, match=r"data\.vae\.path: is missing"):
        coder.decode(torch.zeros(1, 16, 16, 16))
    with pytest.raises(UserError, match=r"data\.vae\.scale: 0\.9, but 3\.\d+ was fitted"):
        vae_at(vae, str(codec))
    with pytest.raises(UserError, match="--vae: .* works on pixels"):
        vae_at(None, str(codec))
    facts = StoredFacts(
        channels=4, size=4, factor=2, scale=build_codec(VaeConfig(path=str(codec))).scale, codec="other:1"
    )
    with caplog.at_level(logging.WARNING):
        check_codec(
            replace(LATENTS, stored=facts), run_config({"in_channels": 4}, vae={"path": str(codec), "factor": 2})
        )
    assert "other weights" in caplog.text


def test_conditions_take_stored_classes(shards, codec, tmp_path):
    at = {"vae": {"path": str(codec), "factor": 2}}
    encode_set(data(shards, **at), tmp_path / "c", SMALL, Encoding())
    assert describe(load_tars(data(tmp_path / "c"))).num_classes == 3
    batch = batches(data(tmp_path / "c", **at))[0]
    cond = Conditions(run_config({"num_classes": 3}).model).of(batch)
    assert torch.equal(cond.labels, batch.labels)
