"""Every layout trains the same model: losses, gradient norms and weights equal a plain torch loop's."""

import pytest
import torch

from helpers.layouts.parity import WEIGHT_TOLERANCE
from helpers.ranks import run_ranks
from helpers.training import merge_weights, plain_torch_run, small_config, train_rank

STEPS = 10
TOLERANCE = 1e-5  # relative, float32, after ten steps

LAYOUTS = [(1, 0, 16), (1, 1, 8), (1, 2, 4), (1, 3, 16)]
LAYOUTS += [(world, stage, micro) for world, micro in ((2, 4), (4, 4)) for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(1)
    return plain_torch_run(small_config(), STEPS)


def assert_close(values, expected, tolerance):
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=tolerance, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "stage", "micro"), LAYOUTS)
def test_layout_equals_plain_torch(reference, tmp_path, world, stage, micro):
    config = small_config(parallel={"zero_stage": stage}, train={"micro_batch": micro})
    results = run_ranks(world, train_rank, config, str(tmp_path))
    assert_same_training(results, reference)


# Ways of DeepSpeed to keep the same state: shares gathered when used, several buffers per group, state on the CPU.
OPTIONS = [
    {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1000},
    {"stage": 2, "round_robin_gradients": True, "reduce_bucket_size": 500},
    *({"stage": stage, "offload_optimizer": {"device": "cpu"}} for stage in (1, 2, 3)),
    {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
]


@pytest.mark.distributed
@pytest.mark.parametrize("zero", OPTIONS, ids=lambda zero: "-".join(map(str, zero)) + f"-{zero['stage']}")
def test_deepspeed_options_equal_plain_torch_through_a_resume(reference, tmp_path, zero):
    ds, config = {"zero_optimization": zero}, small_config(train={"micro_batch": 4})
    half = run_ranks(2, train_rank, config, str(tmp_path), 5, None, ds)
    rest = run_ranks(2, train_rank, config, str(tmp_path), None, half[0]["saved"], ds)
    for first, second in zip(half, rest, strict=True):
        second |= {key: first[key] + second[key] for key in ("losses", "norms")}
    assert_same_training(rest, reference)


def assert_same_training(results, reference):
    for result in results:
        assert_close(result["losses"], reference["losses"], TOLERANCE)
        assert_close(result["norms"], reference["norms"], TOLERANCE)
        assert result["adam_step"] == STEPS
    weights = merge_weights(results)
    assert weights.keys() == reference["weights"].keys()
    for name, expected in reference["weights"].items():
        gap = (weights[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        # A key bias has no gradient in exact arithmetic: Adam makes full steps of its rounding noise.
        if name.endswith("qkv.bias"):
            query, _, value = (weights[name] - expected).chunk(3)
            gap = torch.cat([query, value]).norm() / expected.norm()
        assert gap <= WEIGHT_TOLERANCE, f"{name}: {gap:.2e}"


@pytest.mark.distributed
def test_norm_is_reported_without_clipping_too(tmp_path):
    config = small_config(optim={"clip": {"value": None}})
    expected = plain_torch_run(config, 3)
    for stage in (0, 1, 2, 3):
        staged = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": stage})})
        result = run_ranks(2, train_rank, staged, str(tmp_path / str(stage)), 3)[0]
        assert_close(result["norms"], expected["norms"], TOLERANCE)
        assert_close(result["losses"], expected["losses"], TOLERANCE)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32_within_its_rounding(reference, tmp_path, stage):
    """bf16 keeps 8 bits: losses within 2% of float32's over ten steps, masters stay float32."""
    config = small_config(parallel={"zero_stage": stage}, train={"precision": "bf16"})
    results = run_ranks(2, train_rank, config, str(tmp_path))
    assert_close(results[0]["losses"], reference["losses"], 2e-2)
    weights = merge_weights(results)
    assert all(values.dtype == torch.float32 for values in weights.values())
    hidden = weights["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(hidden, hidden.bfloat16().float()), "master weights were rounded to bf16"
