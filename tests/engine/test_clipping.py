"""Clipping by role: every layout clips as one process does by each role's own norm, and logs those norms."""

import copy
import math

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import merge_weights, plain_torch_run, small_config, train_rank
from megadit.config import LoadedConfig
from megadit.config.deepspeed.merge import merge_ds_config
from megadit.engine.clipping import clip_plan
from megadit.errors import UserError
from megadit.models import build_model
from megadit.mup.groups import clip_mults, param_groups
from megadit.mup.spec import param_specs

STEPS = 8
TOLERANCE = 1e-6  # relative, float32
# What hits: output always, vectors never, the others at some steps (hidden has no gradient at the first).
CLIP = {"mode": "per_group", "value": 0.04, "groups": {"hidden": 0.004, "vector": 50.0, "input": 0.02, "finite": 0.3}}
SPLIT = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1000}


def clipped_config(**sections):
    # SGD-like sensitivity: Adam divides a constant factor away, so epsilon is large beside the gradients.
    optim = {"clip": CLIP, "eps": 0.1, "lr": 0.05}
    return small_config(**{**sections, "optim": {**optim, **sections.get("optim", {})}})


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(1)
    return plain_torch_run(clipped_config(), STEPS)


def assert_as_reference(results, reference, tolerance=TOLERANCE):
    for result in results:
        torch.testing.assert_close(result["losses"], reference["losses"], rtol=tolerance, atol=0)
        torch.testing.assert_close(result["norms"], reference["norms"], rtol=tolerance, atol=0)
        for got, expected in zip(result["role_norms"], reference["role_norms"], strict=True):
            assert got.keys() == expected.keys()
            for role, norm in expected.items():
                assert got[role] == pytest.approx(norm, rel=tolerance), role
    weights = merge_weights(results)
    for name, expected in reference["weights"].items():
        gap = (weights[name] - expected).norm() / expected.norm().clamp_min(1e-3)
        assert gap <= tolerance, f"{name}: {gap:.2e}"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "micro", "zero"),
    [
        (1, 8, {"stage": 0}),
        (2, 4, {"stage": 0}),
        (4, 2, {"stage": 1}),
        (2, 4, {"stage": 2}),
        (4, 4, SPLIT),
        (2, 4, {"stage": 1, "offload_optimizer": {"device": "cpu"}}),
        (2, 4, {"stage": 3, "offload_optimizer": {"device": "cpu"}}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_every_layout_clips_as_one_process(reference, tmp_path, world, micro, zero):
    config = clipped_config(train={"micro_batch": micro})
    results = run_ranks(world, train_rank, config, str(tmp_path), STEPS, None, {"zero_optimization": zero})
    assert_as_reference(results, reference)
    limits = clip_plan_of(config).limits
    hit = {role: sum(norms[role] > limits[role] for norms in reference["role_norms"]) for role in limits}
    assert (
        hit["output"] == STEPS and hit["vector"] == 0 and all(0 < hit[r] < STEPS for r in ("hidden", "input", "finite"))
    )


def clip_plan_of(config):
    model = build_model(config.model, device="meta")
    roles = tuple(group["role"] for group in param_groups(model, config.optim))
    return clip_plan(roles, clip_mults(param_specs(model)), config.optim.clip)


def test_thresholds_follow_width_and_roles():
    config = clipped_config(model={"width": 64, "heads": 4, "base_width": 16})
    plan = clip_plan_of(config)
    assert dict(plan.limits) == {"input": 0.01, "hidden": 0.004, "vector": 25.0, "output": 0.02, "finite": 0.3}
    assert set(plan.roles) == set(plan.limits)
    assert clip_plan_of(small_config()).limits is None
    some = clip_plan_of(small_config(optim={"clip": {"mode": "per_group", "groups": {"hidden": 2.0}}}))
    assert dict(some.limits) == {"hidden": 2.0}


def test_sp_has_no_width_factor():
    sp = small_config(
        model={"parametrization": "sp", "base_width": None}, optim={"clip": {"mode": "per_group", "value": 1.0}}
    )
    assert set(clip_plan_of(sp).limits.values()) == {1.0}


def test_what_contradicts_is_refused():
    with pytest.raises(ValueError, match=r"groups\.hidden: 1.* belongs to mode per_group"):
        small_config(optim={"clip": {"groups": {"hidden": 1.0}}})
    with pytest.raises(ValueError, match=r"mode: per_group has no threshold"):
        small_config(optim={"clip": {"mode": "per_group", "value": None}})
    for value in (1.0, 0):
        with pytest.raises(UserError, match=r"gradient_clipping: .* contradicts optim\.clip\.mode: per_group"):
            merge_ds_config(LoadedConfig(clipped_config()), {"gradient_clipping": value}, 1)
    merged = merge_ds_config(LoadedConfig(clipped_config()), {"gradient_clipping": "auto"}, 1)
    assert merged.ds_config["gradient_clipping"] == 0.0
    assert merge_ds_config(LoadedConfig(small_config()), None, 1).ds_config["gradient_clipping"] == 0.5


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 3])
def test_global_clipping_logs_the_same_norms(tmp_path, stage):
    config = small_config(parallel={"zero_stage": stage})
    expected = plain_torch_run(config, 3)
    for result in run_ranks(2, train_rank, config, str(tmp_path), 3):
        for got, norms in zip(result["role_norms"], expected["role_norms"], strict=True):
            assert got == pytest.approx(norms, rel=1e-5)
        totals = [math.hypot(*norms.values()) for norms in result["role_norms"]]
        assert totals == pytest.approx(result["norms"], rel=1e-6)


@pytest.mark.distributed
def test_bf16_clips_by_the_norms_it_logs(tmp_path):
    """Norms and losses follow float32's; a threshold that nothing reaches may move without a trace."""
    config = clipped_config(train={"precision": "bf16"}, parallel={"zero_stage": 1})
    weaker = copy.deepcopy(CLIP)
    weaker["groups"]["vector"] = 100.0
    same = clipped_config(train={"precision": "bf16"}, parallel={"zero_stage": 1}, optim={"clip": weaker})
    one, other = (run_ranks(2, train_rank, c, str(tmp_path / str(i)), 4) for i, c in enumerate((config, same)))
    assert one[0]["losses"] == other[0]["losses"]
    reference = plain_torch_run(clipped_config(), 4)
    torch.testing.assert_close(one[0]["losses"], reference["losses"], rtol=2e-2, atol=0)
    for got, expected in zip(one[0]["role_norms"], reference["role_norms"], strict=True):
        assert got == pytest.approx(expected, rel=6e-2)


def train_fp16_rank(*args):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return train_rank(*args)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_unscales_by_what_it_scaled_with(tmp_path, stage):
    """A loss scale that doubles every few steps leaves the training as a fixed one has it: powers of two are exact."""
    config = clipped_config(train={"precision": "fp16"}, parallel={"zero_stage": stage})
    fixed = {"fp16": {"enabled": True, "loss_scale": 64.0}}
    growing = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}}
    one, other = (
        run_ranks(2, train_fp16_rank, config, str(tmp_path / name), STEPS, None, ds)
        for name, ds in (("fixed", fixed), ("growing", growing))
    )
    assert other[0]["loss_scale"]["cur_scale"] > 2**5 and other[0]["skipped"] == 0
    torch.testing.assert_close(other[0]["losses"], one[0]["losses"], rtol=2e-3, atol=0)
    for got, expected in zip(other[0]["role_norms"], one[0]["role_norms"], strict=True):
        assert got == pytest.approx(expected, rel=2e-2)
