"""Fused kernels under tensor and sequence parallelism and ZeRO-3: in Triton's interpreter, ranks do what one does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kernels.interpreter import need_interpreter
from helpers.layouts.tensor_shards import gaps_of_shares
from helpers.models.tiny_dit import dit_inputs, tiny_mup_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mup_mmdit
from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.config import ModelConfig
from megadit.config.schema.kernels import KernelConfig
from megadit.engine.kernels import select_kernels
from megadit.models.layers import norm
from megadit.train import run
from megadit_kernels import FUSED_KEYS

TOLERANCE = 1e-5  # kernels compute in float32 whatever they are given
FUSED: dict[str, Any] = dict.fromkeys(FUSED_KEYS, "fused")
CASES: dict[str, tuple[ModelConfig, Any]] = {
    "dit": (tiny_mup_dit(64, depth=1, input_size=6, qk_norm="rms", mlp="gelu"), dit_inputs),
    "mmdit": (tiny_mup_mmdit(64, depth=2, input_size=6, qk_norm="rms", mlp="swiglu"), mmdit_inputs),
}


def gaps(name: str, sequence: bool) -> dict[str, float]:
    need_interpreter()
    select_kernels(KernelConfig(**FUSED))
    config, inputs = CASES[name]
    return gaps_of_shares(config, sequence, partial(inputs, config), tap=1)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("dit", False),
        ("mmdit", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dit", True), ("mmdit", False))),
    ],
)
def test_shares_compute_what_the_whole_does(name: str, sequence: bool) -> None:
    for of_rank in run_ranks(2, gaps, name, sequence):
        assert max(of_rank.values()) < TOLERANCE, {key: gap for key, gap in of_rank.items() if gap >= TOLERANCE}


def without_the_sum_of_gains(name: str) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(norm, "copy_to_tensor_parallel_region", lambda gain, _layout: gain.view_as(gain))
        return gaps(name, False)


@pytest.mark.distributed
@pytest.mark.slow
def test_gains_that_heads_share_need_the_sum_over_ranks() -> None:
    for of_rank in run_ranks(2, without_the_sum_of_gains, "mmdit"):
        wrong = {key for key, gap in of_rank.items() if gap > 1e-2}
        assert wrong and all(".ln_" in key for key in wrong), wrong


def train(tmp: str, kernels: dict[str, Any], zero: dict[str, Any]) -> Any:
    """Three steps; kernels that are asked for run in the interpreter."""
    need_interpreter()
    model = {"qk_norm": "rms", "mlp": "gelu_tanh"}
    config = small_config(model=model, kernels=kernels, train={"micro_batch": 4})
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(run, "check_kernels", lambda *_: None)
        return train_rank(config, tmp, 3, None, {"zero_optimization": zero})


@pytest.mark.distributed
@pytest.mark.slow
def test_zero_3_gathers_the_gains_and_the_biases(tmp_path: Path) -> None:
    """Nothing stays gathered between modules; training is that of ZeRO-1 by torch's own kernels."""
    whole = {"stage": 3, "stage3_param_persistence_threshold": 0}
    plain = merge_weights(run_ranks(2, train, str(tmp_path / "plain"), {}, {"stage": 1}))
    fused = merge_weights(run_ranks(2, train, str(tmp_path / "fused"), FUSED, whole))
    assert plain.keys() == fused.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=1e-3, atol=1e-5)
