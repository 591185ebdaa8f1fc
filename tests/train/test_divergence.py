"""A loss or gradients that are not finite: seen at their step on all ranks, masked on the device, told, not saved."""

import functools

import pytest
import torch

from helpers.kernels.interpreter import need_interpreter
from helpers.nonfinite_runs import files, infinite_gradient, nan_sample, whole_run
from helpers.ranks import run_ranks
from helpers.training import small_config

BATCH = 16  # of small_config: step 4 takes the samples 48 to 63
LAYOUTS = [
    (1, {}, "fp32"),
    (2, {"zero_stage": 0}, "fp32"),
    (2, {"zero_stage": 1}, "bf16"),
    (2, {"zero_stage": 2}, "fp32"),
    (2, {"zero_stage": 3}, "fp32"),
    (2, {"tensor": 2}, "fp32"),
    (2, {"pipeline": 2}, "fp32"),
    pytest.param(2, {"tensor": 2, "zero_stage": 0}, "fp32", marks=pytest.mark.slow),
    pytest.param(2, {"zero_stage": 2}, "bf16", marks=pytest.mark.slow),
    pytest.param(2, {"zero_stage": 3}, "bf16", marks=pytest.mark.slow),
    pytest.param(4, {"tensor": 2, "pipeline": 2}, "bf16", marks=pytest.mark.slow),
]


def config_of(steps=8, precision="fp32", clip=0.5, implementation="auto", **parallel):
    return small_config(
        parallel=parallel,
        ema={"decays": (0.9,)},
        optim={"clip": {"value": clip}, "implementation": implementation},
        train={"steps": steps, "precision": precision, "micro_batch": 4, "log_every": 1, "checkpoint_every": 3},
    )


def assert_same_state(result):
    """As it was before the broken step, bit for bit."""
    before, after = result["before"], result["state"]
    assert before.keys() == after.keys() and before.pop("adam_step") == after.pop("adam_step") == 3
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "parallel", "precision"), LAYOUTS, ids=str)
def test_a_broken_sample_is_named_and_changes_nothing(tmp_path, world, parallel, precision):
    """One sample, on one rank, in one of several micro batches: all ranks stop there with the state before it."""
    plant = functools.partial(nan_sample, 53)
    results = run_ranks(world, whole_run, config_of(precision=precision, **parallel), str(tmp_path), plant)
    assert {(result["code"], result["step"]) for result in results} == {(1, 4)}
    for result in results:
        assert_same_state(result)
    message = "the loss at step 4 is nan for sample 53 (image "
    assert [message in result["stderr"] for result in results] == [True] + [False] * (world - 1)
    assert (
        "train.skip_samples=[[53,54]]" in results[0]["stderr"] and "lr" not in results[0]["stderr"].split("error: ")[1]
    )
    ended, rows = files(tmp_path)
    assert (ended["code"], ended["step"]) == (1, 4) and ended["reason"].startswith(f"diverged: {message}")
    assert [(row["step"], row["loss"] is None) for row in rows] == [(1, False), (2, False), (3, False), (4, True)]
    [event] = rows[-1]["events"]
    assert (event["kind"], event["step"], event["what"], event["value"]) == ("non-finite", 4, "loss", "nan")
    assert (event["samples"], event["broken_samples"]) == ([[48, 64]], [[53, 54]])
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000003\n"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "parallel", "clip", "implementation"),
    [
        (1, {}, 0.5, "auto"),
        (1, {}, None, "torch-foreach"),
        (2, {"zero_stage": 2}, None, "auto"),
        (2, {"zero_stage": 1}, 0.5, "torch-foreach"),
        pytest.param(1, {}, 0.5, "fused", marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 1}, 0.5, "fused", marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 3}, None, "fused", marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 3}, 0.5, "torch-foreach", marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 3}, 0.5, "auto", marks=pytest.mark.slow),
        pytest.param(2, {"pipeline": 2}, 0.5, "auto", marks=pytest.mark.slow),
        pytest.param(2, {"tensor": 2, "zero_stage": 0}, 0.5, "auto", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_infinite_gradients_of_a_finite_loss_change_nothing(tmp_path, world, parallel, clip, implementation):
    if implementation == "fused":
        need_interpreter()
    plant = functools.partial(infinite_gradient, 53)
    results = run_ranks(
        world, whole_run, config_of(clip=clip, implementation=implementation, **parallel), str(tmp_path), plant
    )
    assert {(result["code"], result["step"]) for result in results} == {(1, 4)}
    for result in results:
        assert_same_state(result)
    assert "the gradients at step 4 are not finite" in results[0]["stderr"]
    assert "not finite, though its loss is; it took samples 48 to 63. " in results[0]["stderr"]
    _, rows = files(tmp_path)
    assert rows[-1]["loss"] > 0 and rows[-1]["grad_norm"] is None
    assert rows[-1]["events"][0]["what"] == "gradients"


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"zero_stage": 1})], ids=str)
def test_between_log_lines_it_is_known_a_step_later(tmp_path, world, parallel):
    config = config_of(**parallel)
    config = config.model_copy(update={"train": config.train.model_copy(update={"log_every": 8})})
    results = run_ranks(world, whole_run, config, str(tmp_path), functools.partial(nan_sample, 64))
    assert {(result["code"], result["step"]) for result in results} == {(1, 5)}
    assert all(
        value.isfinite().all() for result in results for value in result["state"].values() if torch.is_tensor(value)
    )
    ended, rows = files(tmp_path)
    assert ended["step"] == 5 and [row["step"] for row in rows] == [1, 3, 5]
    assert rows[-1]["events"][0]["broken_samples"] == [[64, 65]] and rows[-1]["samples_seen"] == 80
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000003\n"


@pytest.mark.distributed
def test_what_is_due_at_the_broken_step_is_not_saved(tmp_path):
    [results] = run_ranks(1, whole_run, config_of(), str(tmp_path), functools.partial(nan_sample, 95, float("inf")))
    assert results["code"] == 1
    ended, rows = files(tmp_path)
    assert (ended["step"], rows[-1]["step"]) == (6, 6)
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000003\n"


@pytest.mark.distributed
def test_a_finite_update_that_makes_infinite_weights_is_not_saved(tmp_path):
    """The last step's update: no later loss tells of it."""
    config = config_of(3)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e39})})
    [results] = run_ranks(1, whole_run, config, str(tmp_path))
    assert results["code"] == 1
    ended, _ = files(tmp_path)
    assert ended["reason"].startswith("diverged: ")
    assert not (tmp_path / "checkpoints/latest").exists()


@pytest.mark.distributed
def test_fp16_skips_overflows_but_not_a_broken_loss(tmp_path):
    ds = {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}
    config = config_of(precision="fp16", zero_stage=1)
    [results] = run_ranks(1, whole_run, config, str(tmp_path), functools.partial(nan_sample, 100), ds)
    assert (results["code"], results["step"]) == (1, 7)
    assert "the loss at step 7 is nan for sample 100" in results["stderr"]
    _, rows = files(tmp_path)
    assert rows[-1]["skipped_steps"] > 1 and rows[0]["grad_norm"] is None  # overflows of the first steps, as always


@pytest.mark.distributed
def test_fp16_that_overflows_at_the_smallest_scale_ends_in_a_sentence(tmp_path):
    ds = {"fp16": {"enabled": True, "initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 1}}
    config = config_of(precision="fp16", zero_stage=1)
    plant = functools.partial(_always_infinite)
    [results] = run_ranks(1, whole_run, config, str(tmp_path), plant, ds)
    assert (results["code"], results["step"]) == (1, 2)
    assert "the gradients at step 2 are not finite at the smallest loss scale, 1" in results["stderr"]


def _always_infinite():
    for number in range(0, 256, 4):
        infinite_gradient(number)


def _host_reads(config, folder):
    """How often the host waits for a value of the device, by step; reading the data is not counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from helpers.training import assemble_rank
    from megadit.data import BatchStream
    from megadit.train.metrics import Meter

    run = assemble_rank(config, folder)
    reads = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"):
                reads[-1] += 1
            return func(*args, **(kwargs or {}))

    stream = BatchStream(run.train_set, run.layout, 0, flip=False, workers=0)
    meter, batches = Meter(run), iter([next(stream) for _ in range(4 * run.layout.accumulation)])
    for step in range(4):
        reads.append(0)
        run.position = run.position.__class__(step)
        with Counting():
            meter.add(run.engine.train_batch(step, meter.timed(batches), False).losses)
    return reads


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "parallel", "precision"),
    [
        (1, {}, "fp32"),
        (1, {"zero_stage": 1}, "bf16"),
        (1, {"zero_stage": 2}, "fp32"),
        (1, {"zero_stage": 3}, "bf16"),
        (2, {"pipeline": 2}, "bf16"),
    ],
    ids=str,
)
def test_no_step_waits_for_the_device(tmp_path, world, parallel, precision):
    for reads in run_ranks(world, _host_reads, config_of(precision=precision, **parallel), str(tmp_path)):
        assert reads[1:] == [0, 0, 0], reads
