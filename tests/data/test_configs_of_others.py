"""Configurations that other programs wrote: a value of another type is one sentence with file, key and value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.folder import codec_facts
from megadit.data.conditions import load_conditions
from megadit.data.features.folders import check_dinov2
from megadit.data.shards.manifest import load_manifest
from megadit.data.text.encoders import CLIPTextEncoder, MiniLMEncoder, T5TextEncoder
from megadit.errors import UserError

VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 64], "down_block_types": ["a", "b"],
       "up_block_types": ["a", "b"], "latent_channels": 4, "in_channels": 3, "scaling_factor": 0.5,
       "shift_factor": None, "latents_mean": None, "latents_std": None}  # fmt: skip
PCA = {"_class_name": "PcaPatchCodec", "factor": 2, "channels": 3, "image_channels": 1, "scaling_factor": 2.0}
BERT = {"model_type": "bert", "hidden_size": 8, "max_position_embeddings": 16}
T5 = {"model_type": "t5", "d_model": 8, "pad_token_id": 0, "eos_token_id": 1}
CLIP = {"model_type": "clip", "projection_dim": 8, "text_config": {"hidden_size": 8, "max_position_embeddings": 16}}
DINO = {"model_type": "dinov2", "patch_size": 14, "hidden_size": 8}
SHARD = {"file": "x-000000.tar", "samples": 2, "bytes": 10, "sha256": "ab"}
MANIFEST = {"format": "megadit tars", "version": 1, "index": "index.safetensors", "name": "x", "samples": 2,
            "classes": ["a"], "channels": 3, "image_size": 8, "notice": "", "shards": [SHARD],
            "stored": {"channels": 4, "scale": 0.5}, "made": {}}  # fmt: skip


def folder_of(path: Path, values: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    (path / "model.safetensors").write_bytes(b"")  # which none of these readers opens
    return path


READERS: dict[str, tuple[dict[str, Any], Any]] = {
    "vae": (VAE, lambda folder: codec_facts(VaeConfig(path=str(folder)))),
    "pca": (PCA, lambda folder: codec_facts(VaeConfig(path=str(folder)))),
    "minilm": (BERT, MiniLMEncoder),
    "t5": (T5, T5TextEncoder),
    "clip": (CLIP, CLIPTextEncoder),
    "dinov2": (DINO, lambda folder: check_dinov2(str(folder), 28)),
}
WHOLE_NUMBERS = [None, "8", True, 1.5, math.nan, [8], {"a": 1}, -1, 0, 10**12]
KEYS = [
    ("vae", "latent_channels"), ("vae", "in_channels"), ("pca", "factor"), ("pca", "channels"),
    ("pca", "image_channels"), ("minilm", "hidden_size"), ("minilm", "max_position_embeddings"), ("t5", "d_model"),
    ("clip", "projection_dim"), ("dinov2", "patch_size"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), KEYS, ids=lambda value: value)
def test_no_whole_number(tmp_path: Path, kind: str, key: str) -> None:
    values, read = READERS[kind]
    read(folder_of(tmp_path / "good", values))
    for value in WHOLE_NUMBERS:
        folder = folder_of(tmp_path / "bad", {**values, key: value})
        with pytest.raises(UserError, match=rf"^data\.\w+\.path: '.*/bad/config\.json' has {key} .*, which must be "):
            read(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("vae", {"block_out_channels": None}, "has block_out_channels null, which must be given"),
        ("vae", {"block_out_channels": []}, r"has block_out_channels \[\], which must be a list of 1 to 16"),
        ("vae", {"block_out_channels": ["32", 64]}, r"has block_out_channels\[0\] '32', which must be a whole number"),
        ("vae", {"block_out_channels": [8] * 100_000}, "which must be a list of 1 to 16 numbers"),
        ("vae", {"down_block_types": ["a"] * 4}, "has down_block_types .* as many as the 2 block_out_channels"),
        ("vae", {"scaling_factor": 0}, "has scaling_factor 0, which must be a number above 0"),
        ("vae", {"scaling_factor": -1}, "has scaling_factor -1, which must be a number above 0"),
        ("vae", {"scaling_factor": None}, "has scaling_factor null, which must be given"),
        ("vae", {"scaling_factor": math.nan}, "has scaling_factor nan, which must be a finite number"),
        ("vae", {"shift_factor": "0.1"}, "has shift_factor '0.1', which must be a finite number"),
        ("vae", {"latents_mean": [0.1] * 4}, "has latents_mean .*: its latents are scaled by a number per channel"),
        ("vae", {"norm_num_groups": None}, "has norm_num_groups null, which must be given"),
        ("vae", {"norm_num_groups": 0}, "has norm_num_groups 0, which must be a whole number"),
        ("vae", {"norm_num_groups": 5}, "has norm_num_groups 5, which must be a divisor of all block_out_channels"),
        ("vae", {"down_block_types": [None, 1]}, r"has down_block_types\[0\] null, which must be given"),
        ("vae", {"act_fn": None}, "has act_fn null, which must be given"),
        ("vae", {"use_quant_conv": "no"}, "has use_quant_conv 'no', which must be true or false"),
        ("vae", {"_class_name": "AutoencoderDC"}, "holds a AutoencoderDC, not an AutoencoderKL"),
        ("vae", {"_class_name": None}, "holds a model with _class_name null, not an AutoencoderKL"),
        (
            "vae",
            {"layers_per_block": 10**9},
            "has layers_per_block 1000000000, which must be a whole number from 1 to 64",
        ),
        ("t5", {"num_layers": 10**9}, "has num_layers 1000000000, which must be a whole number from 1 to 1000"),
        ("clip", {"text_config": {"num_hidden_layers": "12"}}, "text_config has num_hidden_layers '12', which must be"),
        ("dinov2", {"num_hidden_layers": 0}, "has num_hidden_layers 0, which must be"),
        ("pca", {"scaling_factor": "2"}, "has scaling_factor '2', which must be a finite number"),
        ("t5", {"eos_token_id": [1, 2]}, r"has eos_token_id \[1, 2\], which must be a whole number"),
        ("t5", {"d_kv": None}, "has d_kv null, which must be given"),
        ("t5", {"relative_attention_max_distance": 0}, "has relative_attention_max_distance 0, which must be a whole"),
        ("t5", {"layer_norm_epsilon": None}, "has layer_norm_epsilon null, which must be given"),
        ("minilm", {"num_attention_heads": -1}, "has num_attention_heads -1, which must be a whole number from 1"),
        ("clip", {"text_config": {"eos_token_id": None}}, "text_config has eos_token_id null, which must be given"),
        ("clip", {"text_config": {"layer_norm_eps": "x"}}, "text_config has layer_norm_eps 'x', which must be"),
        ("t5", {"model_type": ["t5"]}, r"holds a model of type \['t5'\], not t5"),
        ("clip", {"text_config": "base"}, "has text_config 'base', which must be keys and values"),
        ("clip", {"text_config": {"hidden_size": None}}, "config.json', text_config has hidden_size null"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_other_values(tmp_path: Path, kind: str, changes: dict[str, Any], words: str) -> None:
    values, read = READERS[kind]
    with pytest.raises(UserError, match=rf"^data\.\w+\.path: .*{words}") as error:
        read(folder_of(tmp_path / "bad", {**values, **changes}))
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", READERS)
def test_no_json_says_what_it_is(tmp_path: Path, kind: str) -> None:
    _, read = READERS[kind]
    for text, words in (
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
            "is not JSON: it is a git-LFS pointer",
        ),
        ("<!DOCTYPE html><html>", r"is not JSON: it is a web page \(HTML\)"),
        ("", "is not JSON: it is an empty file"),
        ("[1]", "holds a list and not keys and values"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": 1', "is not valid JSON"),
    ):
        with pytest.raises(UserError, match=rf"^data\.\w+\.path: '.*config\.json' {words}"):
            read(folder_of(tmp_path / "bad", text))


def test_the_factor_of_an_autoencoder_is_that_of_diffusers(tmp_path: Path) -> None:
    """All but the last of its block_out_channels halve the resolution; a T5 may name no pad token."""
    facts = codec_facts(VaeConfig(path=str(folder_of(tmp_path, {**VAE, "use_quant_conv": False}))))
    assert (facts.factor, facts.channels, facts.scale, facts.shift) == (2, 4, 0.5, 0.0)
    assert codec_facts(VaeConfig(path=str(folder_of(tmp_path, {"_class_name": "AutoencoderKL"})))).factor == 1
    assert T5TextEncoder(folder_of(tmp_path, {**T5, "pad_token_id": None})).dim == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shards": [{**SHARD, "file": "../x.tar"}]}, r"shards\[0\] has file '../x.tar', which must be the name of a"),
        ({"shards": [{**SHARD, "file": "/x.tar"}]}, "has file '/x.tar'"),
        ({"shards": [{**SHARD, "bytes": -1}]}, "has bytes -1, which must be a whole number of 0 or more"),
        ({"shards": [{**SHARD, "samples": "2"}]}, "has samples '2'"),
        ({"shards": [3]}, r"has shards\[0\] 3, which must be keys and values"),
        ({"shards": None}, "has shards null"),
        ({"classes": [1]}, r"has classes\[0\] 1, which must be a text"),
        ({"classes": "ab"}, "has classes 'ab', which must be a list"),
        ({"image_size": None}, "has image_size null"),
        ({"stored": {"scale": "1"}}, "stored has scale '1', which must be a finite number"),
        ({"stored": {"depth": 1}}, "stored has depth, which is not known here"),
        ({"made": [1]}, r"has made \[1\], which must be keys and values"),
        ({"version": 2}, "its version is 2, this megadit reads 1"),
        ({"format": 3}, "has format 3 and not megadit tars"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_manifest_of_tars(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(MANIFEST))
    manifest = load_manifest(tmp_path)
    assert manifest is not None and manifest.stored is not None and manifest.stored.scale == 0.5
    file.write_text(json.dumps({**MANIFEST, **changes}))
    with pytest.raises(UserError, match=rf"^data\.path: '.*manifest\.json'.*{words}.*, or remove it if"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("texts", ["{}", "[1]", "[" * 50_000, "null", "["])
def test_texts_beside_kept_conditions(tmp_path: Path, texts: str) -> None:
    save_file({}, tmp_path / "x.safetensors", {"texts": texts})
    with pytest.raises(UserError, match=r"x\.safetensors' is missing or damaged"):
        load_conditions(tmp_path / "x.safetensors")


def test_dinov2_of_other_pictures(tmp_path: Path) -> None:
    folder, file = folder_of(tmp_path, DINO), tmp_path / "preprocessor_config.json"
    for mean, words in (
        ([0.5, 0.5, 0.5], r"has image_mean \[0\.5, 0\.5, 0\.5\], and pictures are normalized by \[0\.485"),
        ([0.485, "0.456", 0.406], r"has image_mean\[1\] '0\.456', which must be a finite number"),
        (0.5, "has image_mean 0.5, which must be a list"),
    ):
        file.write_text(json.dumps({"image_mean": mean}))
        with pytest.raises(UserError, match=rf"^data\.features\.path: '.*preprocessor_config\.json' {words}"):
            check_dinov2(str(folder), 28)
    file.write_text(json.dumps({"image_mean": [0.485, 0.456, 0.406], "image_std": None}))
    check_dinov2(str(folder), 28)


@pytest.mark.parametrize("kind", ["vae", "t5", "dinov2"])
def test_caches_of_the_hub(tmp_path: Path, kind: str) -> None:
    """Their snapshot is named; a snapshot that was copied without what its links point to says so."""
    values, read = READERS[kind]
    (tmp_path / "models--a--b/snapshots/0f").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a cache of the Hugging Face hub; give its snapshot '.*/snapshots/0f'"):
        read(tmp_path / "models--a--b")
    folder_of(tmp_path / "copied", values)
    (tmp_path / "copied/config.json").unlink()
    (tmp_path / "copied/config.json").symlink_to("../../blobs/ab")
    with pytest.raises(UserError, match=r"copied/config\.json' is a link to '\.\./\.\./blobs/ab', which is missing"):
        read(tmp_path / "copied")
