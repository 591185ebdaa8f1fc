"""Folders of networks and autoencoders in which one file is something else: named before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from megadit.config.schema.data import TextSource, VaeConfig
from megadit.data.codecs.folder import codec_folder
from megadit.data.text.folders import check_source, load_network
from megadit.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2700000000\n"
PAGE = b"<!DOCTYPE html>\n<html><head>"
WEIGHTS = save({"weight": torch.zeros(100)})
OTHERS = {
    "pointer": (LFS, "it is a git-LFS pointer; run `git lfs pull`"),
    "page": (PAGE, r"it is a web page \(HTML\)"),
}


def text_folder(folder: Path) -> None:
    """As a t5 and its tokenizer lie there."""
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "spiece.model").write_bytes(b"\n\x0e\n\x05<pad>\x15\x00\x00\x00\x00\x18\x03")
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["model.safetensors", "spiece.model", "vocab.txt", "tokenizer.json", "config.json"])
def test_a_file_of_a_text_network_that_is_something_else(tmp_path: Path, name: str, kind: str) -> None:
    text_folder(tmp_path)
    source = TextSource(encoder="t5", path=str(tmp_path))
    check_source(source)
    data, sentence = OTHERS[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"^data.text.path: .*{name}.*{sentence}"):
        check_source(source)


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_an_autoencoder_that_are_something_else(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(WEIGHTS)
    assert codec_folder(VaeConfig(path=str(tmp_path))) == tmp_path
    data, sentence = OTHERS[kind]
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=f"^data.vae.path: .*diffusion_pytorch_model.safetensors' is not .*{sentence}"):
        codec_folder(VaeConfig(path=str(tmp_path)))


def test_weights_that_are_cut_off_are_named_when_they_are_loaded(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS[:-8])
    sentence = "model.safetensors' is not what its name says: it is cut off: its tensors need"
    with pytest.raises(UserError, match=f"does not load as a T5EncoderModel .*{sentence}"):
        load_network(tmp_path, "T5EncoderModel", "data.text.path", torch.float32)
