"""What a folder is, said where a run or one file of weights is expected, with a remedy that names the right format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megadit.files.folder_kind import folder_instead, run_instead


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["global_step4/zero/w/fp32.pt", "latest_universal"],
            "is a checkpoint of DeepSpeed; read it with .*-universal$",
        ),
        (["zero/w/fp32.pt", "mp_rank_00_model_states.pt"], "is a checkpoint of DeepSpeed; read it with .*-universal$"),
        (["global_step4/mp_rank_00_model_states.pt", "latest"], "is a checkpoint of DeepSpeed; .*--from deepspeed$"),
        (
            ["snapshots/abc/model.safetensors"],
            "is a cache of the Hugging Face hub; give its snapshot '.*/snapshots/abc'",
        ),
        ([".metadata", "__0_0.distcp"], "is a checkpoint of torch.distributed.checkpoint .*dcp_to_torch"),
        (["model_index.json"], "is a folder of diffusers; .*--from diffusers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_checkpoint_of_another_kind(tmp_path: Path, names: list[str], words: str) -> None:
    make(tmp_path, names)
    sentence = folder_instead(tmp_path)
    assert sentence is not None and re.search(words, sentence), sentence
    assert run_instead(tmp_path) == f"it {sentence}"


def test_weights_where_a_run_is_wanted(tmp_path: Path) -> None:
    make(tmp_path, ["model.safetensors", "notes.txt"])
    assert folder_instead(tmp_path) is None
    assert str(run_instead(tmp_path)).startswith("it holds weights (model.safetensors); tools/convert_checkpoint.py")
    (tmp_path / "model.safetensors").unlink()
    assert run_instead(tmp_path) is None


def make(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
