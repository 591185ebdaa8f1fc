"""bf16 on every layout: what replicas, stages and ZeRO share is the training of one process, shares differ by rounding.

A product in bf16 is rounded once where a rank has it whole, once per share where ranks add up shares of it; all else
is the same numbers in another order, since gradients add up in float32 and are sent so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.layouts.parity import AVERAGE, distance
from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.config import RunConfig

STEPS, HALF = 5, 3
SENT = {"communication_data_type": "fp32"}  # at stages 2 and 3 too
# Relative: of losses, of gradient norms (roles' too), of weights, averages and gradients.
SAME = (1e-6, 1e-6, 1e-6)  # measured: 0, 8e-8, 1e-7
ROUNDED = (1e-3, 5e-3, 2e-2)  # measured: see docs/parallel.md


def config_of(clip: str = "global", **parallel: Any) -> RunConfig:
    return small_config(
        model={"width": 64, "heads": 4, "qk_norm": "rms"},
        train={"precision": "bf16", "micro_batch": 2, "steps": STEPS},
        optim={"clip": {"mode": clip, "value": 0.5}},
        ema={"decays": (0.9,)},
        parallel=parallel,
    )


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    """One process, eight micro batches a step, by clip mode."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        clip: run_ranks(1, train_rank, config_of(clip, zero_stage=1), str(folder / clip))
        for clip in ("global", "per_group")
    }


def merged_values(results: list[dict[str, Any]], kind: str) -> torch.Tensor:
    values = merge_weights(results, kind)
    return torch.cat([values[name] for name in sorted(values)])


def assert_close(results: Any, expected: Any, within: tuple[float, float, float], skip: int = 0) -> None:
    losses, norms, tensors = within
    for result in results:
        assert result["losses"] == pytest.approx(expected[0]["losses"][skip:], rel=losses)
        assert result["norms"] == pytest.approx(expected[0]["norms"][skip:], rel=norms)
        for one, other in zip(result["role_norms"], expected[0]["role_norms"][skip:], strict=True):
            assert one == pytest.approx(other, rel=norms)
    for kind in ("pieces", AVERAGE, "exp_avg", "exp_avg_sq"):
        gap = distance(merged_values(results, kind), merged_values(expected, kind))
        assert gap <= tensors, f"{kind}: {gap:.1e}"


LAYOUTS = [
    ("per_group", 2, {"pipeline": 2}, None, SAME),
    ("global", 4, {"pipeline": 2}, None, SAME),
    *(
        pytest.param(clip, *rest, marks=pytest.mark.slow)
        for clip, *rest in [
            ("global", 2, {"zero_stage": 1}, None, SAME),
            ("per_group", 2, {"zero_stage": 1}, None, SAME),
            ("global", 2, {"zero_stage": 2}, SENT, SAME),
            ("global", 2, {}, {**SENT, "zero_optimization": {"stage": 3, "memory_efficient_linear": False}}, SAME),
            ("global", 2, {"zero_stage": 3}, SENT, ROUNDED),  # DeepSpeed's linear rounds before it adds the bias
            ("global", 2, {"zero_stage": 2}, None, ROUNDED),
            ("global", 2, {"tensor": 2}, None, ROUNDED),
            ("per_group", 4, {"tensor": 2, "pipeline": 2}, None, ROUNDED),
        ]
    ),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("clip", "world", "parallel", "ds", "within"), LAYOUTS, ids=str)
def test_layouts_train_what_one_process_does(single_process, tmp_path, clip, world, parallel, ds, within):
    results = run_ranks(world, train_rank, config_of(clip, **parallel), str(tmp_path), None, None, ds)
    assert_close(results, single_process[clip], within)


STAGES, ALONE = (2, {"pipeline": 2}), (1, {"zero_stage": 1})
TWO, THREE = (2, {"zero_stage": 2}), (2, {"zero_stage": 3})
BOTH = (4, {"tensor": 2, "pipeline": 2})


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "after", "within"),
    [
        (STAGES, TWO, SAME),
        (THREE, STAGES, ROUNDED),
        (STAGES, ALONE, SAME),
        (BOTH, ALONE, ROUNDED),
        (ALONE, BOTH, ROUNDED),
    ],
    ids=str,
)
def test_a_run_goes_on_in_another_layout(single_process, tmp_path, before, after, within):
    (first, parallel), (second, other) = before, after
    half = run_ranks(first, train_rank, config_of(**parallel), str(tmp_path), HALF, None, SENT)
    rest = run_ranks(second, train_rank, config_of(**other), str(tmp_path), None, half[0]["saved"], SENT)
    assert all(result["adam_step"] == STEPS for result in rest)
    assert_close(rest, single_process["global"], within, skip=HALF)
