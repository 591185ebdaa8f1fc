"""What ZeRO holds beside the training state: its buckets and the weights it gathered, in the plan and in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import assemble_rank, layout_of, small_config, train_on
from megadit.config import RunConfig
from megadit.config.deepspeed.gradients import bucket_bytes, with_bucket
from megadit.models import count_parameters
from megadit.plan.layout import StagePlan, plan_layout


def config_of(precision: str = "bf16", **parallel: Any) -> RunConfig:
    return small_config(parallel=parallel, train={"precision": precision, "micro_batch": 4})


def held_beside(config: RunConfig, folder: str, ds: dict[str, Any] | None) -> tuple[int, int]:
    """Of two steps of a rank: bytes of its buckets, of weights that were gathered after a forward pass."""
    run = assemble_rank(config, folder, None, ds)
    zero: Any = run.engine._engine.optimizer
    buckets: list[int] = []
    gathered: list[int] = [0]

    def look() -> None:
        buffers = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        flat = [tensor for buffer in buffers for tensor in (buffer if isinstance(buffer, list) else [buffer])]
        buckets.append(sum(tensor.nbytes for tensor in flat))

    release = getattr(zero, "_release_ipg_buffers", None)  # not of stage 3, which keeps its bucket

    def look_and_release() -> None:
        look()
        release()  # type: ignore[misc]

    def went_forward(module: torch.nn.Module, _args: Any, _out: Any) -> None:
        available = [
            p for p in module.parameters() if getattr(p, "ds_status", None) and p.ds_status.name == "AVAILABLE"
        ]
        gathered.append(sum(p.data.nbytes for p in available))

    if release is None:
        look()
    else:
        zero._release_ipg_buffers = look_and_release
    run.engine.module.register_forward_hook(went_forward)
    train_on(run, 2)
    return max(buckets), max(gathered)


def planned(config: RunConfig, world: int, ds: dict[str, Any] | None) -> tuple[StagePlan, ...]:
    resolved, merged = layout_of(config, world, ds)
    return plan_layout(resolved, world, merged, count_parameters(resolved.model, fixed=False)).stages


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("parallel", "precision", "ds"),
    [
        ({"zero_stage": 1}, "bf16", {}),
        ({"zero_stage": 1}, "fp32", {}),
        ({"zero_stage": 1}, "bf16", {"communication_data_type": "bf16"}),
        ({}, "bf16", {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 30000}}),
        ({"zero_stage": 3}, "bf16", {}),
        ({"pipeline": 2}, "bf16", {}),
        ({"pipeline": 2}, "fp32", {}),
        ({"pipeline": 2}, "bf16", {"zero_optimization": {"stage": 1, "overlap_comm": True}}),
        (
            {"zero_stage": 1},
            "bf16",
            {"zero_optimization": {"contiguous_gradients": False, "offload_optimizer": {"device": "cpu"}}},
        ),
    ],
    ids=str,
)
def test_a_rank_holds_the_buckets_and_weights_that_are_planned(tmp_path, parallel, precision, ds):
    config = config_of(precision, **parallel)
    stages = planned(config, 2, ds)
    for rank, (buckets, gathered) in enumerate(run_ranks(2, held_beside, config, str(tmp_path), ds)):
        stage = stages[rank if len(stages) > 1 else 0]
        assert buckets == stage.bytes["buckets"]
        assert gathered == stage.bytes.get("gathered weights", 0)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ahead", "live", "reuse"),
    [(1000, 40000, 0), (1000, 10000, 60000), (0, 40000, 0)],
    ids=["fetched ahead", "used again soon", "neither"],
)
def test_zero_3_keeps_what_is_planned_of_weights_that_it_may_let_go(tmp_path, ahead, live, reuse):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": ahead}
    zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": reuse}
    config = config_of(zero_stage=3)
    [stage] = planned(config, 2, {"zero_optimization": zero})
    for _, gathered in run_ranks(2, held_beside, config, str(tmp_path), {"zero_optimization": zero}):
        assert gathered == pytest.approx(stage.bytes["gathered weights"], rel=0.05)  # whole tensors come and go


def test_a_bucket_is_no_larger_than_what_fills_it():
    ds_config = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}
    assert with_bucket({"zero_optimization": {"stage": 1}}, 100)["zero_optimization"]["reduce_bucket_size"] == 100
    assert (
        with_bucket({"zero_optimization": {"stage": 1}}, 10**10)["zero_optimization"]["reduce_bucket_size"] == 5 * 10**8
    )
    assert with_bucket(ds_config, 100) == ds_config
    assert bucket_bytes({"zero_optimization": {"stage": 0}}, 100, "fp32", False) == 0
    assert bucket_bytes({"zero_optimization": {"stage": 1, "contiguous_gradients": False}}, 100, "fp32", False) == 0
