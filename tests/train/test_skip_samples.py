"""``train.skip_samples`` in a run: across resumes, on every layout, in the checkpoint and in the metrics."""

import functools
import json

import pytest

from helpers.nonfinite_runs import files, nan_sample, whole_run
from helpers.ranks import run_ranks
from helpers.training import small_config
from megadit.errors import UserError

BROKEN = 70  # of step 5 in batches of 16


def config_of(*windows, steps=8, **parallel):
    return small_config(
        parallel=parallel,
        train={"steps": steps, "micro_batch": 4, "checkpoint_every": 2, "keep_last": 9, "skip_samples": windows},
    )


def run(folder, *windows, world=1, plant=None, steps=8, **parallel):
    config = config_of(*windows, steps=steps, **parallel)
    return run_ranks(world, whole_run, config, str(folder), plant)[0]


def losses(folder):
    return [(row["step"], row["loss"]) for row in files(folder)[1]]


def stored(folder, step):
    return json.loads((folder / f"checkpoints/step-{step:08d}/state.json").read_text())


@pytest.mark.distributed
def test_a_resume_without_the_broken_sample_is_the_run_that_never_had_it(tmp_path):
    plant = functools.partial(nan_sample, BROKEN)
    dead, whole = tmp_path / "dead", tmp_path / "whole"
    assert run(dead, plant=plant)["code"] == 1

    again = run(dead, plant=plant)  # as it was: into the same death, but not in silence
    assert again["code"] == 1
    assert "warning: an earlier start ended at step 5, where the loss of sample 70 was not finite" in again["stderr"]
    assert "take them again: train.skip_samples=[[70,71]] leaves them out" in again["stderr"]

    resumed = run(dead, (BROKEN, BROKEN + 1), plant=plant)
    assert resumed["code"] == 0
    assert (
        "at step 5, where the loss of sample 70 was not finite; train.skip_samples leaves them out" in resumed["stderr"]
    )
    assert "note: step 5 skips sample 70 (train.skip_samples)" in resumed["stderr"]
    assert run(whole, (BROKEN, BROKEN + 1), plant=plant)["code"] == 0
    assert losses(dead) == losses(whole) and [step for step, _ in losses(whole)] == list(range(1, 9))
    rows = files(dead)[1]
    assert [row.get("events") for row in rows if row["step"] != 5] == [None] * 7
    assert rows[4]["events"] == [{"kind": "samples left out", "step": 5, "samples": [[70, 71]]}]
    assert rows[-1]["samples_seen"] == 128
    assert stored(dead, 4)["samples"] == {"next": 64, "left_out": []}
    assert stored(dead, 8)["samples"] == {"next": 129, "left_out": [[70, 71]]}


@pytest.mark.distributed
def test_what_was_left_out_stays_so_and_what_was_trained_on_cannot_be(tmp_path):
    assert run(tmp_path / "a", (70, 80), steps=6)["code"] == 0
    later = run(tmp_path / "a")  # the window is of the past, and the sample numbers go on behind it
    assert later["code"] == 0
    run(tmp_path / "b", (70, 80))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert stored(tmp_path / "a", 8)["samples"] == stored(tmp_path / "b", 8)["samples"]

    before = sorted((tmp_path / "a").rglob("*"))
    with pytest.raises(UserError) as refused:
        run(tmp_path / "a", (60, 75), (200, 210), steps=10)
    assert "train.skip_samples: samples 60 to 69 come before sample 138" in str(refused.value)
    assert sorted((tmp_path / "a").rglob("*")) == before


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"zero_stage": 2}),
        pytest.param(2, {"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"zero_stage": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_layout_leaves_out_the_same(tmp_path, world, parallel):
    windows = ((3, 20), (33, 34), (60, 100))
    run(tmp_path / "alone", *windows)
    run(tmp_path / "ranks", *windows, world=world, **parallel)
    alone, ranks = losses(tmp_path / "alone"), losses(tmp_path / "ranks")
    assert [step for step, _ in ranks] == [step for step, _ in alone]
    assert [loss for _, loss in ranks] == pytest.approx([loss for _, loss in alone], rel=1e-5)
    run(tmp_path / "plain")
    assert losses(tmp_path / "plain")[1:] != alone[1:]
