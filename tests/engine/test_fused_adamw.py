"""``optim.implementation: fused``, by Triton's interpreter.

At every ZeRO stage training is that of torch's AdamW, without DeepSpeed's own passes over a shard; where it cannot run
it is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.kernels.interpreter import counted, need_interpreter
from helpers.ranks import run_ranks
from helpers.training import assemble_rank, merge_weights, small_config, train_on, train_rank
from megadit.engine.optimizer import check_implementation, resolve_implementation
from megadit.errors import UserError
from megadit_kernels.adamw import FusedAdamW

STEPS = 4
# SGD-like sensitivity, as Adam divides a constant factor away: epsilon is large beside the gradients.
OPTIM: dict[str, Any] = {"eps": 0.1, "lr": 0.05, "warmup_steps": 2}
GLOBAL = {"value": 0.02}
PER_GROUP = {"mode": "per_group", "value": 0.01, "groups": {"hidden": 0.002, "vector": 50.0, "input": 0.005}}
FP16 = {"initial_scale_power": 18, "hysteresis": 1}  # so large that the first gradients overflow
SPLIT = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1000}


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    need_interpreter()


def config_of(implementation: str, clip: dict[str, Any], precision: str, micro: int, **parallel: int) -> Any:
    return small_config(
        model={"depth": 1},
        optim={**OPTIM, "clip": clip, "implementation": implementation},
        train={"micro_batch": micro, "precision": precision},
        parallel=parallel,
    )


def train(*arguments: Any) -> dict[str, Any]:
    """``train_rank``, which may compute in fp16 on a CPU."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return train_rank(*arguments)


def both(world: int, folder: Path, zero: dict[str, Any], *config: Any, **parallel: int) -> tuple[Any, Any]:
    """Results of all ranks by the fused kernel, and by torch's."""
    ours, theirs = (
        run_ranks(
            world,
            train,
            config_of(name, *config, **parallel),
            str(folder / name),
            STEPS,
            None,
            {"zero_optimization": zero, "fp16": FP16},
        )
        for name in ("fused", "torch-fused")
    )
    return ours, theirs


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    for kind in ("pieces", "exp_avg", "exp_avg_sq"):
        mine, other = merge_weights(ours, kind), merge_weights(theirs, kind)
        for name, expected in other.items():
            gap = (mine[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
            assert gap <= tolerance, f"{kind} of {name}: {gap:.2e}"
    for a, b in zip(ours, theirs, strict=True):
        assert a["adam_step"] == b["adam_step"] > 1 and a["working"].keys() == b["working"].keys()
        for name, weights in b["working"].items():
            torch.testing.assert_close(a["working"][name], weights, rtol=8 * tolerance, atol=2 * tolerance)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a["losses"], b["losses"], rtol=tolerance, atol=0)
        torch.testing.assert_close(a["norms"], b["norms"], rtol=tolerance, atol=0)
        assert a["lrs"] == b["lrs"] and a["skipped"] == b["skipped"] and a["loss_scale"] == b["loss_scale"]


TOLERANCE = {"fp32": 2e-6, "bf16": 2**-8, "fp16": 2**-10}  # a weight or gradient may be rounded the other way
slow = pytest.mark.slow


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "zero", "clip", "precision", "parallel"),
    [
        (1, {"stage": 0}, PER_GROUP, "fp32", {}),
        pytest.param(2, {"stage": 1}, GLOBAL, "bf16", {}, marks=slow),
        (2, SPLIT, PER_GROUP, "bf16", {}),
        pytest.param(1, {"stage": 0}, GLOBAL, "fp32", {}, marks=slow),
        pytest.param(2, {"stage": 0}, GLOBAL, "fp32", {"tensor": 2}, marks=slow),
        pytest.param(2, {"stage": 0}, PER_GROUP, "fp32", {}, marks=slow),
        pytest.param(2, {"stage": 1}, PER_GROUP, "fp32", {}, marks=slow),
        pytest.param(4, {"stage": 1}, PER_GROUP, "bf16", {"tensor": 2}, marks=slow),
        pytest.param(2, {"stage": 1}, GLOBAL, "bf16", {"pipeline": 2}, marks=slow),
        pytest.param(2, {"stage": 2}, GLOBAL, "fp32", {}, marks=slow),
        pytest.param(2, {"stage": 2}, PER_GROUP, "bf16", {}, marks=slow),
        pytest.param(2, {"stage": 3}, GLOBAL, "fp32", {}, marks=slow),
        pytest.param(2, {"stage": 3}, {}, "bf16", {}, marks=slow),
        pytest.param(2, {"stage": 1}, GLOBAL, "fp16", {}, marks=slow),
        pytest.param(2, {"stage": 3}, PER_GROUP, "fp16", {}, marks=slow),
        pytest.param(2, {"stage": 2, "round_robin_gradients": True}, GLOBAL, "bf16", {}, marks=slow),
    ],
    ids=str,
)
def test_training_is_that_of_torchs(tmp_path, world, zero, clip, precision, parallel):
    """Masters, moments, counters and working weights; gradients are accumulated over two micro batches."""
    shards = world // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    ours, theirs = both(world, tmp_path, zero, clip, precision, 8 // shards, **parallel)
    assert_same(ours, theirs, TOLERANCE[precision])
    finite = [norm for norm in ours[0]["norms"] if math.isfinite(norm)]
    assert not clip or max(finite) > 2 * clip["value"]  # so that it is clipped
    assert (ours[0]["skipped"] > 0) == (precision == "fp16")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 2}, SPLIT], ids=str)
def test_a_clip_coefficient_that_is_left_out_is_noticed(tmp_path, monkeypatch, zero):
    prepare = FusedAdamW.prepare
    monkeypatch.setattr(FusedAdamW, "prepare", lambda self, p, scale=None, **rest: prepare(self, p, **rest))
    ours, theirs = both(1, tmp_path, zero, PER_GROUP, "fp32", 8)
    with pytest.raises(AssertionError, match="pieces of"):
        assert_same(ours, theirs, TOLERANCE["fp32"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("names", [("torch-fused", "fused"), ("fused", "torch-fused")], ids=str)
def test_a_run_goes_on_with_another_implementation(tmp_path, names):
    """From its checkpoint, at another ZeRO stage too."""

    def ranks(implementation: str, folder: str, steps: int, checkpoint: str | None, stage: int) -> Any:
        config = config_of(implementation, GLOBAL, "fp32", 8)
        zero = {"zero_optimization": {"stage": stage}}
        return run_ranks(2, train_rank, config, str(tmp_path / folder), steps, checkpoint, zero)

    straight = ranks("torch-fused", "straight", STEPS, None, 1)
    half = ranks(names[0], "halves", 2, None, 1)
    for stage in (1, 3):
        rest = ranks(names[1], "halves", STEPS, half[0]["saved"], stage)
        for kind in ("pieces", "exp_avg", "exp_avg_sq"):
            mine, other = merge_weights(rest, kind), merge_weights(straight, kind)
            for name, expected in other.items():
                torch.testing.assert_close(mine[name], expected, rtol=2e-5, atol=2e-6)
        assert rest[0]["adam_step"] == STEPS


class PassesOverShards(TorchDispatchMode):
    """Counts torch's calls that join, convert to float32, scale or copy as many elements as a large shard has."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.calls = sizes, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if torch.is_tensor(out) and out.numel() in self.sizes and out.stride() != (0,):
            onto_itself = name == "copy_" and args[0].data_ptr() == args[1].data_ptr()  # moves nothing
            widens = name == "_to_copy" and out.dtype == torch.float32
            if (name in ("cat", "mul_", "copy_") and not onto_itself) or widens:
                self.calls[name] += 1
        return out


def passes(implementation: str, stage: int, folder: str) -> tuple[float, Counter[str]]:
    """Of the second step: the bytes that kernels move per parameter, and torch's passes over shards."""
    config = config_of(implementation, GLOBAL, "bf16", 16)
    run = assemble_rank(config, folder, None, {"zero_optimization": {"stage": stage}})
    train_on(run, 1)
    sizes = {f.flat.numel() for f in run.engine.partitions.fragments()}
    zero = run.engine.partitions._engine.optimizer
    update, mode = zero.step, PassesOverShards({size for size in sizes if size > 1000})

    def step(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return update(*args, **kwargs)

    zero.step = step
    with counted() as launches:
        train_on(run, 2)
    parameters = sum(math.prod(shape) for _, shape in {(f.name, f.shape) for f in run.engine.partitions.fragments()})
    return sum(launch.bytes for launch in launches) / parameters, mode.calls


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=slow), pytest.param(3, marks=slow)])
def test_deepspeeds_passes_over_a_shard_are_gone(tmp_path, stage):
    """bf16: 2 bytes of gradient, 24 of float32 master and moments read and written, 2 of the weight."""
    [(moved, calls)] = run_ranks(1, passes, "fused", stage, str(tmp_path / "fused"))
    [(_, of_deepspeed)] = run_ranks(1, passes, "torch-fused", stage, str(tmp_path / "torch"))
    assert 28 <= moved < 28.2 and not calls
    assert {*of_deepspeed} == {"cat", "_to_copy", "mul_", "copy_"}


def test_refused_without_a_gpu() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"^optim.implementation: fused needs a GPU and Triton \(.*auto or torch-fused"):
        check_implementation("fused", cpu)
    with pytest.raises(UserError, match=r"^optim.implementation: apex needs a GPU and NVIDIA's apex \(NVIDIA's apex: "):
        check_implementation("apex", cpu)
    check_implementation("auto", cpu)
    check_implementation("torch-fused", cpu)


def test_auto_is_torchs_until_the_kernel_has_been_measured() -> None:
    assert resolve_implementation("auto", torch.device("cuda")) == "torch-fused"
