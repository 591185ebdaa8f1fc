"""The table of text features: computed once, read back the same, shared by processes, healed when damaged."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from megadit.data.text.encoders import TextEncoder, cut
from megadit.data.text.feature_table import build_table, cache_folder
from megadit.errors import UserError


class Letters(TextEncoder):
    """One token per letter and an end token; its states are the letter's number in every channel."""

    dim, pooled_dim, longest = 3, 2, None

    def __init__(self, log: Path | None = None, scale: float = 1.0, name: str = "letters") -> None:
        self.identity, self.log, self.scale = name, log, scale

    identity = "letters"

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*map(ord, text), 1] for text in texts]

    def features(self, texts, max_length, progress=None) -> Iterator:
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write("computed\n")
        for ids in self.token_ids(texts):
            states = self.scale * torch.tensor(cut(ids, max_length)).float()
            yield states[:, None].expand(-1, 3).clone(), torch.tensor([states.sum(), 1 / 3])


def test_features_come_back_by_text_padded(tmp_path):
    table = build_table(Letters(), ["abc", "", "b", "abc"], 5, tmp_path)
    features = table.of(["b", "abc", ""])
    assert features.text[:, :, 0].tolist() == [[98, 1, 0, 0, 0], [97, 98, 99, 1, 0], [1, 0, 0, 0, 0]]
    assert features.text_mask.sum(1).tolist() == [2, 4, 1]
    assert features.text.dtype == features.pooled.dtype == torch.float32
    assert features.pooled[:, 1].tolist() == [torch.tensor(1 / 3).item()] * 3  # not through float16
    assert len(table) == 3 and "b" in table and "c" not in table
    with pytest.raises(KeyError):
        table.of(["c"])


def test_they_are_computed_once_for_the_same_encoder_length_and_texts(tmp_path):
    log = tmp_path / "log"
    for texts, length, name in [
        (["a", "b"], 4, "x"),
        (["b", "a"], 4, "x"),
        (["a"], 4, "x"),
        (["a"], 5, "x"),
        (["a"], 5, "y"),
    ]:
        build_table(Letters(log, name=name), texts, length, tmp_path / "cache")
    assert log.read_text().count("computed") == 4
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["cut off", "other content", "sizes"])
def test_a_damaged_file_is_computed_again_and_told(tmp_path, capsys, damage):
    from safetensors.torch import load_file, save_file

    build_table(Letters(), ["a", "bc"], 4, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(good[:-3])
    elif damage == "other content":
        path.write_bytes(b"no such file")
    else:
        tensors = load_file(path)
        save_file({**tensors, "ends": tensors["ends"] + 1}, path)
    capsys.readouterr()
    features = build_table(Letters(), ["a", "bc"], 4, tmp_path).of(["bc"])
    assert features.text[0, :, 0].tolist() == [98, 99, 1, 0]
    assert "is damaged" in capsys.readouterr().err and path.read_bytes() == good


def test_cut_captions_are_counted_in_one_warning(tmp_path, caplog):
    for _ in range(2):  # computed, and read back
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            table = build_table(Letters(), ["abcdef", "ab", "abcd"], 4, tmp_path)
        assert [record.message for record in caplog.records] == [
            "model.text.max_length: 2 of 3 captions have more than 4 tokens and are cut"
        ]
    assert table.of(["abcdef"]).text[0, :, 0].tolist() == [97, 98, 99, 1]


def test_values_beyond_float16_keep_float32(tmp_path):
    table = build_table(Letters(scale=1e4), ["ab"], 4, tmp_path)
    assert table.of(["ab"]).text[0, 0, 0] == 97e4


def _build(folder: Path, log: Path) -> None:
    build_table(Letters(log), ["a", "bc"], 4, folder)


def test_of_several_processes_one_computes(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "computed\n"


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "megadit" / "text" and cache_folder("/x") == Path("/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.text\.cache: .*cannot be written"):
        build_table(Letters(), ["a"], 4, tmp_path / "file" / "cache")
