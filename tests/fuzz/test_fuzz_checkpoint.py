"""Checkpoint folders: what is damaged is refused with a remedy, or an earlier checkpoint takes its place."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from helpers.fuzz.hunt import efforts, hunt, json_bytes, mutated, odd_values
from helpers.ranks import run_ranks
from helpers.training import small_config, train_rank
from megadit.checkpoint.compatibility import check_same_model, describe_changes
from megadit.checkpoint.find import find_checkpoint, open_checkpoint
from megadit.checkpoint.format import _sum_of
from megadit.checkpoint.inspect import (
    compare,
    describe_comparison,
    describe_summary,
    open_for_inspection,
    summary,
    verify,
)
from megadit.checkpoint.read import StoredCheckpoint
from megadit.checkpoint.restore import load_weights
from megadit.config import RunConfig
from megadit.models import build_model

CONFIG: RunConfig = small_config(
    model={"depth": 1, "width": 16, "heads": 1}, train={"steps": 2}, ema={"decays": (0.9,)}, optim={"warmup_steps": 0}
)
STEP = "step-00000002"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, and an earlier copy of it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(1, train_rank, CONFIG, str(folder))
    return folder


def look_at(run: Path) -> None:
    """What a resume, inspect_checkpoint and a start from weights read of a run directory."""
    opened = open_checkpoint(run)
    if opened is None:
        return
    stored = opened.stored
    describe_summary(summary(stored, norms=True))
    verify(stored)
    check_same_model(stored, CONFIG)
    describe_changes(stored.config, CONFIG.model_dump(mode="json"))
    load_weights(stored, build_model(CONFIG.model), "0.9")


@efforts
def test_damaged_bytes(effort: str, saved: Path, tmp_path: Path) -> None:
    """One of the files of a checkpoint, or the pointer to it, is damaged."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    folder = run / "checkpoints"
    names = [f"{STEP}/{path.name}" for path in sorted((folder / STEP).iterdir())] + ["latest"]
    assert len(names) == 4
    whole = {name: (folder / name).read_bytes() for name in names}

    def read(drawn: tuple[str, bytes]) -> None:
        name, data = drawn
        (folder / name).write_bytes(data)
        try:
            look_at(run)
        finally:
            (folder / name).write_bytes(whole[name])

    hunt(
        effort, st.one_of(*(st.tuples(st.just(name), mutated([whole[name]], most=2)) for name in names)), read, quick=27
    )


@efforts
@pytest.mark.parametrize("version", [1, 2])
def test_odd_values_with_a_right_checksum(effort: str, version: int, saved: Path, tmp_path: Path) -> None:
    """index.json and state.json as a program with a fault, or a person, would have written them."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    folder = run / "checkpoints" / STEP
    index, state = (json.loads((folder / name).read_text()) for name in ("index.json", "state.json"))
    del index["crc32"]
    index["pieces"] = index["pieces"][:6]
    if version == 1:
        index = {"format": index["format"], "version": 1, "parameters": index["parameters"], "pieces": index["pieces"]}

    def read(drawn: tuple[Any, Any]) -> None:
        new_index, new_state = drawn
        text = json_bytes(new_state)
        (folder / "state.json").write_bytes(text)
        new_index = signed(new_index, text) if version == 2 else new_index
        (folder / "index.json").write_bytes(json_bytes(new_index))
        look_at(run)

    odd = st.one_of(st.tuples(odd_values([index]), st.just(state)), st.tuples(st.just(index), odd_values([state])))
    hunt(effort, odd, read, quick=33)


def signed(index: Any, state: bytes) -> Any:
    """The index with the checksum that it should have, where it is such a thing at all."""
    if not isinstance(index, dict):
        return index
    files = index.get("files")
    if isinstance(files, dict) and isinstance(files.get("state.json"), dict):
        files["state.json"] |= {"bytes": len(state), "crc32": zlib.crc32(state)}
    try:
        return {**index, "crc32": _sum_of(json.loads(json_bytes(index)))}
    except (ValueError, RecursionError):
        return index


@efforts
def test_comparing(effort: str, saved: Path, tmp_path: Path) -> None:
    """``inspect_checkpoint A --against B`` where B's state has odd values."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    folder = run / "checkpoints" / STEP
    index, state = (json.loads((folder / name).read_text()) for name in ("index.json", "state.json"))
    del index["crc32"]
    sound = StoredCheckpoint(saved / "checkpoints" / STEP)

    def read(values: Any) -> None:
        text = json_bytes(values)
        (folder / "state.json").write_bytes(text)
        (folder / "index.json").write_bytes(json_bytes(signed(index, text)))
        describe_comparison(compare(sound, open_for_inspection(str(run)).stored))

    hunt(effort, odd_values([state]), read, quick=13)


def test_an_earlier_sound_checkpoint_takes_the_place_of_a_broken_one(saved: Path, tmp_path: Path) -> None:
    """So that the fuzz tests above are about refusals that have an end."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    newer = run / "checkpoints" / "step-00000009"
    shutil.copytree(run / "checkpoints" / STEP, newer)
    (newer / "index.json").write_text("[" * 5000)
    (run / "checkpoints" / "latest").write_text("step-00000009\n")
    assert find_checkpoint(run) == run / "checkpoints" / STEP
