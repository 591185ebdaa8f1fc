"""Flow matching: the straight path, its velocity, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from megadit.conditioning import Conditioning
from megadit.config.schema.run import ObjectiveConfig
from megadit.diffusion import build_objective
from megadit.errors import UserError
from megadit.optional import import_diffusers
from megadit.rng import batch_normal, normal, sample_keys


def objective(**settings):
    return build_objective(ObjectiveConfig(kind="flow", **settings), learn_sigma=False, num_classes=10)


def test_path_and_time_are_those_of_diffusers_scheduler():
    scheduler = import_diffusers().FlowMatchEulerDiscreteScheduler()
    times = scheduler.timesteps[[0, 100, 500, 998]]
    x0, noise = normal(1, (4, 3, 5, 5)), normal(2, (4, 3, 5, 5))
    noisy = objective().prepare(x0, Conditioning(), range(4), 0, t01=times / 1000, noise=noise)
    torch.testing.assert_close(noisy.x, scheduler.scale_noise(x0, times, noise))
    torch.testing.assert_close(noisy.t, times)
    assert noisy.t.dtype == torch.float32
    assert noisy.steps is None


def test_target_is_the_derivative_of_the_path():
    flow, x0 = objective(), normal(1, (2, 3, 4, 4))
    noise, h = normal(2, (2, 3, 4, 4)), 1e-2
    early, late = (
        flow.prepare(x0, Conditioning(), range(2), 0, t01=torch.full((2,), t), noise=noise) for t in (0.4, 0.4 + h)
    )
    assert flow.loss((late.x - early.x) / h, early).total.abs().max() < 1e-6
    assert flow.loss((late.x - early.x) / h + 1.0, early).total.tolist() == pytest.approx([1.0, 1.0], rel=1e-3)


def test_loss_has_one_term_per_sample():
    flow = objective()
    noisy = flow.prepare(normal(1, (3, 2, 4, 4)), Conditioning(), range(3), 0)
    output = normal(3, (3, 2, 4, 4)).to(torch.bfloat16)
    loss = flow.loss(output, noisy)
    noise = batch_normal(sample_keys(0, "noise", range(3)), (2, 4, 4))
    expected = (output.double() - noise + noisy.x0).square().flatten(1).mean(1)
    assert list(loss.terms) == ["mse"] and loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-6)


def test_learned_variance_is_refused_by_name():
    with pytest.raises(UserError, match=r"model\.learn_sigma.*flow"):
        build_objective(ObjectiveConfig(kind="flow"), learn_sigma=True, num_classes=10)


def test_a_two_fold_output_is_refused():
    flow = objective()
    noisy = flow.prepare(normal(1, (3, 2, 4, 4)), Conditioning(), range(3), 0)
    with pytest.raises(ValueError, match="model output"):
        flow.loss(torch.zeros(3, 4, 4, 4), noisy)


def test_times_follow_the_configured_distribution_and_shift():
    keys = sample_keys(0, "timestep", range(4001))
    plain, shifted = objective().draw_times(keys), objective(shift=3.0).draw_times(keys)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    normal_times = objective(time_sampling="logit_normal", logit_mean=-1.0, logit_std=0.5, shift=2.0).draw_times(keys)
    # A shift by s adds log s to the logit: median sigmoid(-1 + log 2), standard deviation of the logit unchanged.
    logits = torch.logit(normal_times)
    assert logits.median().item() == pytest.approx(-1.0 + math.log(2.0), abs=0.04)
    assert logits.std().item() == pytest.approx(0.5, abs=0.03)
