"""Exact resume: stopping and going on leaves no trace, on the same layout bit for bit."""

import json
import math
from pathlib import Path

import pytest
import torch

from helpers.layouts.parity import WEIGHT_TOLERANCE
from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.checkpoint.compatibility import check_same_model, describe_changes
from megadit.checkpoint.find import find_checkpoint, load_model
from megadit.checkpoint.inspect import compare
from megadit.checkpoint.read import StoredCheckpoint
from megadit.errors import UserError


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_resume_is_bit_exact_on_the_same_layout(tmp_path, world, stage):
    config = small_config(parallel={"zero_stage": stage}, train={"micro_batch": 4})
    straight = run_ranks(world, train_rank, config, str(tmp_path / "straight"))
    half = run_ranks(world, train_rank, config, str(tmp_path / "halves"), 5)
    resumed = run_ranks(world, train_rank, config, str(tmp_path / "halves"), 10, half[0]["saved"])
    assert half[0]["losses"] + resumed[0]["losses"] == straight[0]["losses"]
    assert half[0]["norms"] + resumed[0]["norms"] == straight[0]["norms"]
    assert half[0]["lrs"] + resumed[0]["lrs"] == straight[0]["lrs"]
    assert resumed[0]["adam_step"] == 10
    for before, after in zip(straight, resumed, strict=True):
        for old, new in zip(before["pieces"], after["pieces"], strict=True):
            assert old[:4] == new[:4]
            assert torch.equal(old[4], new[4]), old[0]


LAYOUTS = [(world, stage) for world in (1, 2, 4) for stage in (0, 1, 2, 3)]
AVERAGES = {"decays": (0.9,), "sigma_rels": (0.1,)}
TOLERANCE = 1e-5
HALF, FULL = 3, 6


def on_layout(stage):
    return small_config(parallel={"zero_stage": stage}, train={"micro_batch": 4, "steps": FULL}, ema=AVERAGES)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that was never stopped, on one rank: its losses, and its checkpoint at the end."""
    folder = tmp_path_factory.mktemp("straight")
    result = run_ranks(1, train_rank, on_layout(0), str(folder))[0]
    return result["losses"], StoredCheckpoint(find_checkpoint(folder))


@pytest.fixture(scope="module")
def canonical(tmp_path_factory):
    """The first half, by two ranks under ZeRO-2."""
    folder = tmp_path_factory.mktemp("canonical")
    return run_ranks(2, train_rank, on_layout(2), str(folder), HALF)[0]


def assert_continues(first, folder, world, stage, straight):
    """Going on from ``first`` on a layout gives the losses, weights, moments and averages of the run never stopped."""
    resumed = run_ranks(world, train_rank, on_layout(stage), str(folder), FULL, first["saved"])[0]
    losses, end = straight
    resumed_losses = first["losses"] + resumed["losses"]
    torch.testing.assert_close(torch.tensor(resumed_losses), torch.tensor(losses), rtol=TOLERANCE, atol=0)
    other = StoredCheckpoint(Path(resumed["saved"]))
    compared = compare(end, other)
    assert compared["kinds"].keys() == {"weights", "exp_avg", "exp_avg_sq", "ema/0.9", "ema/sigma-0.1"}
    assert not compared["counters"] and not any(compared["not_in_both"].values())
    with end.reader() as expected, other.reader() as reader:
        for row in compared["tensors"]:
            pair = torch.empty(2, math.prod(end.parameters[row["name"]]))
            for values, source in zip(pair, (expected, reader), strict=True):
                source.read_into(values, row["kind"], row["name"])
            # A key bias has no gradient in exact arithmetic: its moments are rounding noise, and Adam follows them.
            if row["name"].endswith("qkv.bias"):
                pair = torch.cat([pair.chunk(3, 1)[0], pair.chunk(3, 1)[2]], dim=1)
            gap = (pair[1] - pair[0]).norm() / pair[0].norm()
            within = TOLERANCE if row["kind"].startswith("exp_avg") else WEIGHT_TOLERANCE
            assert gap <= within, f"{row['kind']} of {row['name']}: {gap:.2e}"


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "stage"), [layout for layout in LAYOUTS if layout != (2, 2)])
def test_any_layout_goes_on_from_the_canonical_one(tmp_path, canonical, straight, world, stage):
    """What each of them writes at the end is read as whole tensors, which is the canonical layout again."""
    assert_continues(canonical, tmp_path, world, stage, straight)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "stage"), LAYOUTS)
def test_any_layout_goes_on_from_any_other(tmp_path, straight, world, stage):
    first = run_ranks(world, train_rank, on_layout(stage), str(tmp_path / "first"), HALF)[0]
    for number, (other, target) in enumerate(LAYOUTS):
        assert_continues(first, tmp_path / str(number), other, target, straight)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A run directory with one checkpoint, from two ranks under ZeRO-2, and the weights that it must hold."""
    from megadit.config import save_config

    folder = tmp_path_factory.mktemp("run")
    config = small_config(parallel={"zero_stage": 2})
    results = run_ranks(2, train_rank, config, str(folder), 3)
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
    checkpoint = find_checkpoint(folder)
    other = config.model_copy(update={"model": config.model.model_copy(update={"depth": 3})})
    with pytest.raises(UserError, match=r"model\.depth 2 → 3"):
        check_same_model(StoredCheckpoint(checkpoint), other)
    reseeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": 4})})
    with pytest.raises(UserError, match=r"train\.seed: 4 differs from 3"):
        check_same_model(StoredCheckpoint(checkpoint), reseeded)


@pytest.mark.distributed
def test_how_the_weights_began_is_no_part_of_the_model(saved_run):
    """A file whose default start has changed, as configs/pixart has, goes on with the runs that it began."""
    folder, config = saved_run[0], saved_run[1]
    stored = StoredCheckpoint(next((folder / "checkpoints").glob("step-*")))
    changed = config.model_copy(
        update={"model": config.model.model_copy(update={"init": "original", "adaln_init": "zero"})}
    )
    check_same_model(stored, changed)
    assert "model.init auto → original" in describe_changes(stored.config, changed.model_dump(mode="json"))


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
