"""A loss far above those before is told once, with its step and samples, wherever it lies between two log lines."""

import functools

import pytest

from helpers.nonfinite_runs import files, loud_sample, whole_run
from helpers.ranks import run_ranks
from helpers.training import small_config
from megadit.train.divergence import Spike, SpikeDetector


def test_a_loss_of_566_after_a_fifth_is_a_spike():
    detector = SpikeDetector()
    assert detector.update(1, [0.25, 0.2, 0.19, 0.21, 0.2]) == []
    assert detector.update(6, [0.2, 566.0, 0.2]) == [Spike(7, 566.0, 0.2, 6)]


def test_it_is_told_once_until_the_loss_came_down():
    detector = SpikeDetector([0.2] * 20)
    assert [spike.step for spike in detector.update(1, [9.0, 8.0, 7.0])] == [1]
    assert [spike.step for spike in detector.update(4, [6.0, 0.2, 5.0, 5.0])] == [6]


def test_a_level_that_lasts_is_the_new_one():
    detector = SpikeDetector([0.2] * 20)
    assert [spike.step for spike in detector.update(1, [9.0] * 200)] == [1]
    assert [spike.step for spike in detector.update(201, [0.2, 9.0, 100.0])] == [203]


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 0.5, 0.3, 0.2, 0.9, 0.4, 1.9],  # what training does
        [0.1, 0.9, 0.05, 0.4, 0.15, 0.06, 0.95, 0.08],  # few samples a step
        [-0.3, -0.31, -0.2, -0.35, -0.1, 0.0],  # with REPA's term
        [1.0, float("nan"), 1.0, float("inf"), 1.1],  # which others tell of
    ],
)
def test_what_is_none(losses):
    assert SpikeDetector([losses[0]] * 3 + losses).update(1, losses) == []


@pytest.mark.parametrize("losses", [[1.7, 1.7e4], [-0.3, -0.31, -0.29, 40.0]])
def test_few_or_negative_losses_before_do(losses):
    assert [spike.step for spike in SpikeDetector().update(1, losses)] == [len(losses)]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"zero_stage": 1}), (2, {"pipeline": 2})], ids=str)
def test_a_run_tells_of_a_step_between_its_log_lines(tmp_path, world, parallel):
    config = small_config(
        parallel=parallel, train={"steps": 12, "micro_batch": 4, "log_every": 4, "checkpoint_every": 8}
    )
    plant = functools.partial(loud_sample, 99, 1e4)  # of step 7
    results = run_ranks(world, whole_run, config, str(tmp_path), plant)
    assert {result["code"] for result in results} == {0}
    warning = "warning: loss spike at step 7: "
    assert [result["stderr"].count(warning) for result in results] == [1] + [0] * (world - 1)
    assert "over 6 steps; the step took samples 96 to 111" in results[0]["stderr"]
    _, rows = files(tmp_path)
    assert [row["step"] for row in rows if "events" in row] == [8]
    [event] = rows[2]["events"]
    assert (event["kind"], event["step"], event["samples"]) == ("loss spike", 7, [[96, 112]])
    assert event["loss"] == pytest.approx(rows[2]["max_step_loss"]) and event["loss"] > 1000 > 10 * event["median"]
    quiet = [row["max_step_loss"] / row["loss"] for row in rows if row["step"] != 8]
    assert all(1 <= ratio < 2 for ratio in quiet)
