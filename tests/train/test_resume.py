"""Exact resume: stopping and going on leaves no trace, on the same layout bit for bit."""

import json

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.errors import UserError
from megadit.train.checkpoint import StoredCheckpoint, find_checkpoint, load_model


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_resume_is_bit_exact_on_the_same_layout(tmp_path, world, stage):
    config = small_config(parallel={"zero_stage": stage}, train={"micro_batch": 4})
    straight = run_ranks(world, train_rank, config, str(tmp_path / "straight"), timeout=120)
    half = run_ranks(world, train_rank, config, str(tmp_path / "halves"), 5, timeout=120)
    resumed = run_ranks(world, train_rank, config, str(tmp_path / "halves"), 10, half[0]["saved"], timeout=120)
    assert half[0]["losses"] + resumed[0]["losses"] == straight[0]["losses"]
    assert half[0]["norms"] + resumed[0]["norms"] == straight[0]["norms"]
    assert half[0]["lrs"] + resumed[0]["lrs"] == straight[0]["lrs"]
    assert resumed[0]["adam_step"] == 10
    for before, after in zip(straight, resumed, strict=True):
        for old, new in zip(before["pieces"], after["pieces"], strict=True):
            assert old[:4] == new[:4]
            assert torch.equal(old[4], new[4]), old[0]


@pytest.mark.distributed
def test_another_layout_reads_the_same_checkpoint(tmp_path):
    """The format names index ranges, not ranks: ZeRO-3 on two ranks continues what ZeRO-1 on four began."""
    one = small_config(parallel={"zero_stage": 1})
    three = small_config(parallel={"zero_stage": 3})
    straight = run_ranks(1, train_rank, one, str(tmp_path / "straight"), timeout=120)
    half = run_ranks(4, train_rank, one, str(tmp_path / "a"), 5, timeout=120)
    rest = run_ranks(2, train_rank, three, str(tmp_path / "b"), 10, half[0]["saved"], timeout=120)
    torch.testing.assert_close(
        torch.tensor(half[0]["losses"] + rest[0]["losses"]), torch.tensor(straight[0]["losses"]), rtol=1e-5, atol=0
    )


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A run directory with one checkpoint, from two ranks under ZeRO-2, and the weights that it must hold."""
    from megadit.config import save_config

    folder = tmp_path_factory.mktemp("run")
    config = small_config(parallel={"zero_stage": 2})
    results = run_ranks(2, train_rank, config, str(folder), 3, timeout=120)
    save_config(config, folder / "config.yaml")
    return folder, config, merge_weights(results)


@pytest.mark.distributed
def test_load_model_gives_the_master_weights(saved_run):
    folder, _, weights = saved_run
    _, model = load_model(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), weights[name]), name


@pytest.mark.distributed
def test_a_checkpoint_of_another_model_is_refused(saved_run):
    folder, config, _ = saved_run
    found = find_checkpoint(folder)
    other = config.model_copy(update={"model": config.model.model_copy(update={"depth": 3})})
    with pytest.raises(UserError, match=r"model\.depth 2 → 3"):
        StoredCheckpoint(found).check_same_model(other)
    reseeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": 4})})
    with pytest.raises(UserError, match=r"train\.seed: 4 differs from 3"):
        StoredCheckpoint(found).check_same_model(reseeded)


@pytest.mark.distributed
def test_a_newer_format_and_a_broken_index_are_told(saved_run, tmp_path):
    import shutil

    folder, _, _ = saved_run
    copy = tmp_path / "copy"
    shutil.copytree(find_checkpoint(folder), copy)
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        StoredCheckpoint(copy)
    (copy / "index.json").write_text("{")
    with pytest.raises(UserError, match="index cannot be read"):
        StoredCheckpoint(copy)


def test_paths_that_are_no_checkpoint_are_told(tmp_path):
    assert find_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="is no checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step-00000007\n")
    with pytest.raises(UserError, match="step-00000007"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is no run directory"):
        load_model(tmp_path)
