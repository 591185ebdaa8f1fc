"""What a fault in the parallel layers does to a run: each of these is seen in what the parity tests compare.

Two ranks that share layers train two steps with one thing left out; the run of one process shows the difference. The
same comparison passes where nothing is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.layouts.matrix import gaps
from helpers.layouts.parity import TOLERANCE
from helpers.ranks import run_ranks
from helpers.training import small_config, train_rank
from megadit.config import RunConfig
from megadit.models.layers import RowParallelLinear

STEPS = 3  # the readout starts at zero: the body has a gradient from the second step on, and shows it in the third
SEEN = 1e-4  # ten times what parity allows


def config_of(**parallel: Any) -> RunConfig:
    """A DiT whose readout has a multiplier."""
    model = {"width": 64, "heads": 4, "qk_norm": "rms", "depth": 2, "output_mult": 2.0}
    return small_config(
        model=model, ema={"decays": (0.9,)}, parallel=parallel, train={"micro_batch": 8, "steps": STEPS}
    )


def _same(x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return x


def no_sum_of_rows() -> None:
    """A row layer's products stay what each rank has."""
    from megadit.models.layers import linear

    linear.reduce_from_tensor_parallel_region = _same


def no_sum_of_input_gradients() -> None:
    """The gradient of a column layer's input stays what each rank's channels say."""
    from megadit.models.layers import linear
    from megadit.parallel.collectives import AsyncCollective

    linear.start_all_reduce = lambda x, _layout: AsyncCollective(x, None)


def no_sum_of_the_condition() -> None:
    """The gradient of what all blocks are modulated by stays what each rank's rows of their modulations say."""
    from megadit.models.dit import model as dit

    dit.shared_block_input = _same


def no_sum_of_head_gains() -> None:
    """The gain of all heads has the gradient of this rank's."""
    from megadit.models.layers import norm

    norm.copy_to_tensor_parallel_region = _same


def no_sum_of_scattered_tokens() -> None:
    """Under sequence parallelism a rank takes its tokens of its own products alone."""
    from megadit.models.layers import linear
    from megadit.parallel.collectives import scatter_to_sequence_parallel_region

    linear.reduce_scatter_to_sequence_parallel_region = scatter_to_sequence_parallel_region


def no_sum_of_row_bias() -> None:
    """Under sequence parallelism a row layer's bias has the gradient of this rank's tokens."""
    from megadit.models.layers import linear

    plain = linear.copy_to_tensor_parallel_region
    linear.copy_to_tensor_parallel_region = lambda x, layout: x if x.dim() == 1 else plain(x, layout)


def one_mark_missing() -> None:
    """One kind of layer, of those that ranks share, is taken for one that each holds whole."""
    from megadit.models.layers import linear

    plain = linear.mark_shards
    linear.mark_shards = lambda module: None if isinstance(module, linear.RowParallelLinear) else plain(module)


def _change_specs(change: Callable[[str, Any], None]) -> None:
    from megadit.models import build

    plain = build.init_parameters

    def init_parameters(model: torch.nn.Module, seed: int) -> None:
        for name, module in model.named_modules():
            if hasattr(module, "forward_mult"):
                change(name, module)
        plain(model, seed)

    build.init_parameters = init_parameters


def no_multiplier() -> None:
    """The readout's multiplier is 1."""

    def change(name: str, module: Any) -> None:
        if name == "final_layer.linear":
            module.param_specs["weight"] = dataclasses.replace(module.param_specs["weight"], forward_mult=1.0)

    _change_specs(change)


def fan_in_of_the_share() -> None:
    """Row layers go by the fan-in of what a rank holds: a wider start and a larger learning rate."""

    def change(_name: str, module: Any) -> None:
        if isinstance(module, RowParallelLinear):
            spec = module.param_specs["weight"]
            module.param_specs["weight"] = dataclasses.replace(
                spec, fan_in=spec.fan_in // 2, init_std=spec.init_std * math.sqrt(2), lr_mult=spec.lr_mult * 2
            )

    _change_specs(change)


def nothing() -> None:
    """No fault."""


SHARED, TOKENS = {"tensor": 2, "zero_stage": 1}, {"tensor": 2, "sequence": True, "zero_stage": 1}
# What is left out, on which layout, and in which of the comparisons it is seen.
MUTATIONS: list[tuple[Callable[[], None], dict[str, Any], str]] = [
    (no_sum_of_rows, SHARED, "loss"),
    (no_sum_of_input_gradients, SHARED, "gradients"),
    (no_sum_of_the_condition, SHARED, "gradients"),
    (no_sum_of_the_condition, TOKENS, "gradients"),
    (no_sum_of_head_gains, SHARED, "gradients"),
    (no_sum_of_scattered_tokens, TOKENS, "loss"),
    (no_sum_of_row_bias, TOKENS, "gradients"),
    (one_mark_missing, SHARED, "norm"),
    (no_multiplier, SHARED, "norm"),
    (fan_in_of_the_share, SHARED, "gradients"),
]
NAMES = [f"{fault.__name__}-{'tokens' if on is TOKENS else 'shared'}" for fault, on, _ in MUTATIONS]


def mutated(fault: Callable[[], None], config: RunConfig, folder: str) -> dict[str, Any]:
    fault()
    result: dict[str, Any] = train_rank(config, folder, STEPS)
    return result


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    [result] = run_ranks(1, train_rank, config_of(), str(tmp_path_factory.mktemp("alone")), STEPS)
    outcome: dict[str, Any] = result
    return outcome


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", [SHARED, TOKENS], ids=["shared", "tokens"])
def test_without_a_fault_there_is_no_difference(
    single_process: dict[str, Any], tmp_path: Path, parallel: dict[str, Any]
) -> None:
    measured = gaps(run_ranks(2, mutated, nothing, config_of(**parallel), str(tmp_path)), single_process)
    # Weights are left out: three steps behind a readout that started at zero, Adam makes rounding of biases as large.
    assert max(measured[quantity] for quantity in ("loss", "norm", "norms by role", "gradients")) < TOLERANCE, measured


@pytest.mark.distributed
@pytest.mark.parametrize(("fault", "parallel", "quantity"), MUTATIONS, ids=NAMES)
def test_a_fault_is_seen(
    single_process: dict[str, Any], tmp_path: Path, fault: Callable[[], None], parallel: dict[str, Any], quantity: str
) -> None:
    measured = gaps(run_ranks(2, mutated, fault, config_of(**parallel), str(tmp_path)), single_process)
    assert measured[quantity] > SEEN, measured
