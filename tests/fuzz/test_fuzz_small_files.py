"""Small files beside runs and weights, and what a file is said to be."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from helpers.fuzz.hunt import efforts, hunt, mutated
from helpers.fuzz.weight_files import HEADER_WORDS, STATE, Runs, torch_files
from megadit.data.conditions import load_conditions
from megadit.data.features.encoders import CachedEncoder
from megadit.data.text import feature_table as table
from megadit.evaluate.pictures import read_pictures
from megadit.files.file_kind import file_instead, kind_of


@efforts
def test_conditions_of_a_run(effort: str, tmp_path: Path) -> None:
    """null_text.safetensors and prompts.safetensors."""
    file = tmp_path / "prompts.safetensors"
    tensors = {
        "text": torch.zeros(2, 3, 4),
        "text_mask": torch.ones(2, 3, dtype=torch.bool),
        "pooled": torch.zeros(2, 5),
    }
    words = (b'"texts":"[1]"', b'"texts":"{}"', b'"texts":"[[[["', *HEADER_WORDS)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        load_conditions(file)

    hunt(effort, mutated([save(tensors, {"texts": '["a", "b"]'})], words), read)


@efforts
@pytest.mark.filterwarnings("ignore")
def test_pictures_of_evaluate(effort: str, tmp_path: Path) -> None:
    """The npz of sampled pictures."""
    import numpy as np

    file, mark = tmp_path / "pictures.npz", tmp_path / "it ran"
    files = []
    for values in ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, {"arr_0": np.array([Runs(str(mark))], object)}):
        for write in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            write(buffer, **values)  # type: ignore[arg-type]
            files.append(buffer.getvalue())

    def read(data: bytes) -> None:
        file.write_bytes(data)
        try:
            read_pictures(file)
        finally:
            assert not mark.exists()

    words = (
        b"'|u1'",
        b"'|O'",
        b"(999999999, 4, 4, 3)",
        b"arr_0.npy",
        b"PK\1\2",
        b"PK\5\6",
        b"PK\3\4",
        b"\x0c\0",
        b"\x63\0",
    )
    hunt(effort, mutated(files, words), read, quick=22)


@efforts
def test_what_a_file_is(effort: str, tmp_path: Path) -> None:
    """``file_kind`` tells or does not, and never raises."""
    file = tmp_path / "file"
    heads = [
        save(STATE),
        *torch_files(tmp_path / "x")[:2],
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html>",
        b"\x89PNG\r\n\x1a\n",
    ]

    def read(data: bytes) -> None:
        kind = kind_of(data)
        assert kind is None or (kind.id and kind.name and kind.remedy)
        file.write_bytes(data)
        file_instead(file, "safetensors", "torch")

    hunt(effort, st.one_of(st.binary(max_size=600), mutated(heads)), read, quick=27)


@efforts
def test_caches(effort: str, tmp_path: Path) -> None:
    """Features of texts and of pictures that were computed before: what is damaged is computed again."""
    file = tmp_path / "cache.safetensors"
    texts = {
        "states": torch.zeros(5, 4, dtype=torch.float16),
        "ends": torch.tensor([2, 5]),
        "pooled": torch.zeros(2, 3),
        "cut": torch.tensor(0),
    }
    features = CachedEncoder(SimpleNamespace(identity="x", dim=4), tmp_path)  # type: ignore[arg-type]
    files = [save(texts, {"encoder": "x"}), save({"features": torch.zeros(4, 2, 2)})]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        table._read(file, 2)
        features._read(file)

    hunt(effort, mutated(files, HEADER_WORDS), read)
