"""fp16's dynamic loss scale: updates that overflow are left out and counted, and a resume continues the scale.

DeepSpeed refuses fp16 on a CPU, though torch computes it there; the check is lifted so that its logic is tested here.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank

SCALE_POWER = 20  # too high for the first gradients of this model: some updates overflow


def train_fp16_rank(*args):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return train_rank(*args)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        *((2, {"zero_stage": stage}) for stage in (1, 2, 3)),
        (2, {"tensor": 2, "zero_stage": 1}),
        (2, {"pipeline": 2}),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_overflow_is_skipped_and_resumed_through(tmp_path, world, parallel):
    config = small_config(parallel=parallel, train={"precision": "fp16", "micro_batch": 4})
    ds = {"fp16": {"enabled": True, "initial_scale_power": SCALE_POWER, "hysteresis": 1}}

    def ranks(folder, *rest):
        return run_ranks(world, train_fp16_rank, config, str(tmp_path / folder), *rest, ds)

    straight = ranks("straight", None, None)
    norms = straight[0]["norms"]
    skipped = sum(math.isinf(norm) for norm in norms)
    assert math.isinf(norms[0]) and math.isfinite(norms[-1]) and 0 < skipped < 10
    assert straight[0]["skipped"] == skipped
    assert straight[0]["adam_step"] == 10 - skipped
    assert straight[0]["loss_scale"]["cur_scale"] == 2.0 ** (SCALE_POWER - skipped)
    assert straight[0]["losses"][0] > straight[0]["losses"][-1]

    half = ranks("halves", 2, None)  # in the middle of the overflows
    rest = ranks("halves", None, half[0]["saved"])
    assert half[0]["losses"] + rest[0]["losses"] == straight[0]["losses"]
    assert half[0]["norms"] + rest[0]["norms"] == norms
    assert rest[0]["loss_scale"] == straight[0]["loss_scale"]
    assert rest[0]["skipped"] == skipped
    uninterrupted, resumed = merge_weights(straight), merge_weights(rest)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "parallel", "within"),
    [
        (2, {"pipeline": 2}, 0.0),
        pytest.param(2, {"tensor": 2, "zero_stage": 1}, 1e-3, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, 1e-3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_that_share_a_model_skip_what_one_process_skips(tmp_path, world, parallel, within):
    """An overflow on one rank is all ranks', and gradients of other stages and shares carry the same scale."""
    ds = {"fp16": {"enabled": True, "initial_scale_power": SCALE_POWER, "hysteresis": 1}}

    def trained(world, **parallel):
        config = small_config(parallel=parallel, train={"precision": "fp16", "micro_batch": 4})
        return run_ranks(world, train_fp16_rank, config, str(tmp_path / str(world)), None, None, ds)

    [expected] = trained(1, zero_stage=1)
    assert math.isinf(expected["norms"][0]) and math.isfinite(expected["norms"][-1])
    for result in trained(world, **parallel):
        assert result["skipped"] == expected["skipped"] and result["loss_scale"] == expected["loss_scale"]
        for key in ("losses", "norms"):
            assert result[key] == pytest.approx(expected[key], rel=within, abs=0)


@pytest.mark.distributed
def test_another_precision_does_not_take_the_loss_scale(tmp_path):
    ds = {"fp16": {"enabled": True, "initial_scale_power": SCALE_POWER}}
    half = small_config(train={"precision": "fp16"}, parallel={"zero_stage": 1})
    saved = run_ranks(1, train_fp16_rank, half, str(tmp_path), 2, None, ds)[0]["saved"]
    assert json.loads(Path(saved, "state.json").read_text())["loss_scale"]["cur_scale"] > 1
    other = small_config(train={"precision": "bf16"}, parallel={"zero_stage": 1})
    rest = run_ranks(1, train_rank, other, str(tmp_path), 4, saved)[0]
    assert rest["loss_scale"] == {} and all(map(math.isfinite, rest["norms"]))
