"""Samplers: their steps, and that each of them solves a problem whose solution is known in closed form.

For data N(mu, s^2) the best possible prediction is known, and the deterministic samplers' exact answer is a linear
map of the first noise, so a whole sampling run is compared with it number by number.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.run import ObjectiveConfig, SampleConfig
from megadit.diffusion.sampling.sample import sample
from megadit.diffusion.sampling.schedulers import build_sampler, scheduler_name, spaced_steps
from megadit.errors import UserError
from megadit.rng import batch_normal, sample_keys

MEAN, STD = 0.5, 0.3


def small(learn_sigma: bool = False) -> ModelConfig:
    return ModelConfig(width=16, heads=1, depth=1, in_channels=2, input_size=4, learn_sigma=learn_sigma, num_classes=0)


def alpha_bar(steps: int = 1000, schedule: str = "linear") -> Tensor:
    scale = 1000 / steps
    if schedule == "scaled_linear":
        return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2, 0)
    return torch.cumprod(1 - torch.linspace(1e-4 * scale, 2e-2 * scale, steps, dtype=torch.float64), 0)


class GaussianDenoiser(nn.Module):
    """The optimal network for pixels drawn from N(mean, std^2), in closed form."""

    def __init__(self, prediction: str, mean: float, std: float, steps: int = 1000, variance: float | None = None):
        super().__init__()
        self.prediction, self.mean, self.std, self.variance = prediction, mean, std, variance
        self.bar, self.steps = alpha_bar(steps), steps

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if self.prediction == "flow":
            share = t.double() / 1000
            a, b = 1 - share, share
        else:
            bar = self.bar[(t.double() * self.steps / 1000).round().long()]
            a, b = bar.sqrt(), (1 - bar).sqrt()
        a, b = a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)
        whitened = (x.double() - a * self.mean) / (a**2 * self.std**2 + b**2)
        noise, clean = b * whitened, self.mean + a * self.std**2 * whitened
        best = {"eps": noise, "v": a * noise - b * clean, "flow": noise - clean}[self.prediction].float()
        return best if self.variance is None else torch.cat([best, torch.full_like(best, self.variance)], dim=1)


def draw(model: nn.Module, objective: ObjectiveConfig, config: SampleConfig, count: int, learn_sigma: bool = False):
    numbers = range(count)
    first = batch_normal(sample_keys(config.seed, "sample", numbers), (2, 4, 4))
    return first, sample(model, small(learn_sigma), objective, config, numbers=numbers, cond=Conditioning())


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("scheduler", "steps", "tolerance"), [("ddim", 200, 0.03), ("dpm", 80, 0.01)])
def test_deterministic_ddpm_samplers_reach_the_exact_solution(prediction, scheduler, steps, tolerance):
    first, drawn = draw(
        GaussianDenoiser(prediction, MEAN, STD),
        ObjectiveConfig(prediction=prediction),
        SampleConfig(scheduler=scheduler, steps=steps),
        count=4,
    )
    bar = alpha_bar()[-1]
    exact = MEAN + STD * (first - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar).sqrt()
    assert (drawn - exact).abs().max() < tolerance


@pytest.mark.parametrize(("scheduler", "steps", "tolerance"), [("ddim", 200, 0.03), ("dpm", 400, 0.03)])
def test_samplers_know_the_scaled_linear_schedule(scheduler, steps, tolerance):
    model = GaussianDenoiser("eps", MEAN, STD)
    model.bar = alpha_bar(schedule="scaled_linear")
    objective = ObjectiveConfig(beta_schedule="scaled_linear")
    first, drawn = draw(model, objective, SampleConfig(scheduler=scheduler, steps=steps), count=4)
    bar = model.bar[-1]
    exact = MEAN + STD * (first - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar).sqrt()
    assert (drawn - exact).abs().max() < tolerance


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_reaches_the_exact_solution_of_the_flow(shift):
    first, drawn = draw(
        GaussianDenoiser("flow", MEAN, STD),
        ObjectiveConfig(kind="flow", shift=shift),
        SampleConfig(steps=200),
        count=4,
    )
    assert (drawn - (MEAN + STD * first)).abs().max() < 0.02


def test_more_euler_steps_are_closer_to_the_exact_solution():
    errors = []
    for steps in (10, 20, 40):
        first, drawn = draw(
            GaussianDenoiser("flow", MEAN, STD), ObjectiveConfig(kind="flow"), SampleConfig(steps=steps), count=2
        )
        errors.append((drawn - (MEAN + STD * first)).abs().max().item())
    # A first-order method: each doubling of the steps about halves the error.
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.5)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ancestral_sampling_recovers_mean_and_deviation(prediction):
    _, drawn = draw(
        GaussianDenoiser(prediction, MEAN, STD),
        ObjectiveConfig(prediction=prediction),
        SampleConfig(scheduler="ddpm", steps=250),
        count=128,
    )
    assert drawn.mean() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(drawn.numel()))
    assert drawn.std() == pytest.approx(STD, rel=0.05)


def test_learned_variance_reaches_the_scheduler():
    """For unit normal data the exact reverse variance is beta, the upper end of the range, at any number of steps."""
    objective, config = ObjectiveConfig(), SampleConfig(scheduler="ddpm", steps=10)
    _, upper = draw(GaussianDenoiser("eps", 0.0, 1.0, variance=1.0), objective, config, count=128, learn_sigma=True)
    _, lower = draw(GaussianDenoiser("eps", 0.0, 1.0, variance=-1.0), objective, config, count=128, learn_sigma=True)
    assert upper.std() == pytest.approx(1.0, rel=0.03)
    assert lower.std() < 0.95


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_deterministic_samplers_ignore_the_variance(scheduler):
    objective, config = ObjectiveConfig(), SampleConfig(scheduler=scheduler, steps=5)
    _, plain = draw(GaussianDenoiser("eps", MEAN, STD), objective, config, count=2)
    _, with_variance = draw(
        GaussianDenoiser("eps", MEAN, STD, variance=0.7), objective, config, count=2, learn_sigma=True
    )
    assert torch.equal(plain, with_variance)


def test_other_schedule_lengths_scale_the_model_time():
    objective, config = ObjectiveConfig(diffusion_steps=250), SampleConfig(scheduler="ddim", steps=100)
    sampler = build_sampler(objective, config, learn_sigma=False)
    assert sampler.model_times[0] == pytest.approx(249 * 4)
    first, drawn = draw(GaussianDenoiser("eps", MEAN, STD, steps=250), objective, config, count=2)
    bar = alpha_bar(250)[-1]
    exact = MEAN + STD * (first - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar).sqrt()
    assert (drawn - exact).abs().max() < 0.05


def test_ddim_is_the_textbook_update_at_a_step_count_that_does_not_divide_the_schedule():
    count, bar = 7, alpha_bar()
    model = GaussianDenoiser("eps", MEAN, STD)
    first, drawn = draw(model, ObjectiveConfig(), SampleConfig(scheduler="ddim", steps=count), count=2)
    steps = spaced_steps(1000, count)
    x = first.double()
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        eps = model(x.float(), torch.full((2,), float(step)), Conditioning()).double()
        clean = (x - (1 - bar[step]).sqrt() * eps) / bar[step].sqrt()
        target = bar[following] if following is not None else torch.ones(())
        x = target.sqrt() * clean + (1 - target).sqrt() * eps
    assert (drawn - x).abs().max() < 1e-4


def test_steps_span_the_schedule():
    assert spaced_steps(1000, 1) == [999]
    assert spaced_steps(1000, 4) == [999, 666, 333, 0]
    assert spaced_steps(1000, 3, down_to_zero=False) == [999, 666, 333]
    assert spaced_steps(1000, 1, down_to_zero=False) == [999]
    assert spaced_steps(1000, 1000) == list(range(999, -1, -1))
    for count in (2, 61, 103, 999):
        steps = spaced_steps(1000, count, down_to_zero=False)
        assert len(set(steps)) == count and steps[0] == 999 and steps[-1] > 0


def test_flow_sigmas_are_even_then_shifted_once():
    sampler = build_sampler(ObjectiveConfig(kind="flow", shift=3.0), SampleConfig(steps=4), learn_sigma=False)
    even = [1.0, 0.75, 0.5, 0.25]
    assert sampler.model_times == pytest.approx([1000 * 3 * s / (1 + 2 * s) for s in even], rel=1e-6)
    assert sampler.scheduler.sigmas[-1] == 0


@pytest.mark.parametrize(
    ("kind", "scheduler", "expected"),
    [("ddpm", "auto", "dpm"), ("flow", "auto", "euler"), ("ddpm", "ddim", "ddim"), ("flow", "euler", "euler")],
)
def test_auto_picks_the_objectives_own_sampler(kind, scheduler, expected):
    assert scheduler_name(ObjectiveConfig(kind=kind), SampleConfig(scheduler=scheduler)) == expected


@pytest.mark.parametrize(("kind", "scheduler"), [("flow", "dpm"), ("flow", "ddpm"), ("ddpm", "euler")])
def test_foreign_samplers_are_refused(kind, scheduler):
    with pytest.raises(UserError, match=rf"sample.scheduler: {scheduler}.*{kind}"):
        build_sampler(ObjectiveConfig(kind=kind), SampleConfig(scheduler=scheduler), learn_sigma=False)


@pytest.mark.parametrize(("scheduler", "most"), [("ddpm", 1000), ("ddim", 1000), ("dpm", 999)])
def test_too_many_steps_are_refused(scheduler, most):
    objective = ObjectiveConfig()
    build_sampler(objective, SampleConfig(scheduler=scheduler, steps=most), learn_sigma=False)
    with pytest.raises(UserError, match=f"sample.steps: {most + 1}.*use {most}"):
        build_sampler(objective, SampleConfig(scheduler=scheduler, steps=most + 1), learn_sigma=False)
