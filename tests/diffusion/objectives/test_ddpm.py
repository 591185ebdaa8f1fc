"""DDPM against diffusers' scheduler and against the bound written down again in float64, scalar by scalar."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.config.schema.run import ObjectiveConfig
from megadit.diffusion import build_objective
from megadit.diffusion.objectives.ddpm import NoiseSchedule, schedule_betas
from megadit.errors import UserError
from megadit.optional import import_diffusers
from megadit.rng import normal, uniform
from megadit_kernels.variance_bound.reference import discretized_log_likelihood

STEPS = [0, 1, 250, 500, 999]


def objective(learn_sigma: bool = True, **settings):
    return build_objective(ObjectiveConfig(**settings), learn_sigma=learn_sigma, num_classes=10)


def noisy_at(objective, steps=STEPS, total: int = 1000):
    count = len(steps)
    times = (torch.tensor(steps) + 0.5) / total
    x0 = uniform(1, (count, 4, 6, 6)) * 2 - 1
    return objective.prepare(x0, Conditioning(), range(count), seed=0, t01=times, noise=normal(2, (count, 4, 6, 6)))


class Reference:
    """The bound in float64 for single numbers, from the definitions in Ho et al. 2020 and Nichol & Dhariwal 2021."""

    def __init__(self, total: int = 1000) -> None:
        first, last = 1e-4 * 1000 / total, 2e-2 * 1000 / total
        self.beta = [first + (last - first) * i / (total - 1) for i in range(total)]
        self.bar, product = [], 1.0
        for beta in self.beta:
            product *= 1.0 - beta
            self.bar.append(product)

    def posterior_variance(self, t: int) -> float:
        before = self.bar[t - 1] if t else 1.0
        return self.beta[t] * (1.0 - before) / (1.0 - self.bar[t])

    def posterior_mean(self, t: int, x0: float, x: float) -> float:
        before = self.bar[t - 1] if t else 1.0
        from_x0 = math.sqrt(before) * self.beta[t] / (1.0 - self.bar[t])
        from_x = math.sqrt(1.0 - self.beta[t]) * (1.0 - before) / (1.0 - self.bar[t])
        return from_x0 * x0 + from_x * x

    def denoised(self, t: int, x: float, prediction: float, kind: str) -> float:
        signal, sigma = math.sqrt(self.bar[t]), math.sqrt(1.0 - self.bar[t])
        return (x - sigma * prediction) / signal if kind == "eps" else signal * x - sigma * prediction

    def bits(self, t: int, x0: float, x: float, prediction: float, logit: float, kind: str) -> float:
        low = math.log(self.posterior_variance(max(t, 1)))
        high = math.log(self.beta[t])
        log_variance = (logit + 1) / 2 * high + (1 - logit) / 2 * low
        mean = self.posterior_mean(t, self.denoised(t, x, prediction, kind), x)
        if t == 0:
            return -self.log_likelihood(x0, mean, math.exp(log_variance / 2)) / math.log(2)
        gap = (self.posterior_mean(t, x0, x) - mean) ** 2
        ratio = math.exp(low - log_variance)
        return 0.5 * (log_variance - low - 1 + ratio + gap / math.exp(log_variance)) / math.log(2)

    @staticmethod
    def log_likelihood(x: float, mean: float, std: float) -> float:
        def cdf(value: float) -> float:
            z = value / std
            return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        above, below = cdf(x - mean + 1 / 255), cdf(x - mean - 1 / 255)
        if x < -0.999:
            return math.log(max(above, 1e-12))
        if x > 0.999:
            return math.log(max(1 - below, 1e-12))
        return math.log(max(above - below, 1e-12))

    def bound(self, steps, x0: Tensor, x: Tensor, prediction: Tensor, logits: Tensor, kind: str) -> list[float]:
        result = []
        for i, t in enumerate(steps):
            parts = [part[i].double().flatten().tolist() for part in (x0, x, prediction, logits)]
            values = [self.bits(t, *numbers, kind=kind) for numbers in zip(*parts, strict=True)]
            result.append(sum(values) / len(values))
        return result


@pytest.mark.parametrize("total", [1000, 250])
def test_noise_is_mixed_in_as_diffusers_does(total):
    diffusers = import_diffusers()
    scale = 1000 / total
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=total, beta_start=1e-4 * scale, beta_end=2e-2 * scale)
    steps = [0, 1, total // 2, total - 1]
    noisy = noisy_at(objective(diffusion_steps=total), steps, total)
    assert noisy.steps.tolist() == steps
    assert noisy.t.tolist() == [step * scale for step in steps]
    expected = scheduler.add_noise(noisy.x0, noisy.target, torch.tensor(steps))
    torch.testing.assert_close(noisy.x, expected, atol=2e-6, rtol=1e-5)


def test_v_target_is_diffusers_velocity():
    scheduler = import_diffusers().DDPMScheduler()
    target = objective(learn_sigma=False, prediction="v")
    noisy = noisy_at(target)
    noise = noisy_at(objective(learn_sigma=False)).target
    velocity = scheduler.get_velocity(noisy.x0, noise, torch.tensor(STEPS))
    assert target.loss(velocity, noisy).total.abs().max() < 1e-9
    shifted = target.loss(velocity + 0.5, noisy).total
    torch.testing.assert_close(shifted, torch.full((5,), 0.25), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("total", [1000, 100])
def test_bound_equals_the_float64_reference(kind, total):
    steps = [0, 1, total // 4, total // 2, total - 1]
    target = objective(prediction=kind, diffusion_steps=total)
    noisy = noisy_at(target, steps, total)
    output = normal(3, (5, 8, 6, 6))
    # A prediction near the truth keeps the bound away from its clamps at step 0.
    truth = noisy.target
    prediction, logits = truth + 0.3 * output[:, :4], output[:, 4:]
    terms = target.loss(torch.cat([prediction, logits], dim=1), noisy).terms
    expected = Reference(total).bound(steps, noisy.x0, noisy.x, prediction, logits, kind)
    assert terms["vb"].tolist() == pytest.approx(expected, rel=2e-3)
    by_hand = (prediction - truth).double().square().flatten(1).mean(1)
    torch.testing.assert_close(terms["mse"].double(), by_hand, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("x", [-1.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("std", [0.01, 0.5])
def test_discretized_likelihood_of_single_values(x, std):
    value = discretized_log_likelihood(torch.tensor(x), torch.tensor(0.1), torch.tensor(math.log(std)))
    assert value.item() == pytest.approx(Reference.log_likelihood(x, 0.1, std), rel=1e-3)


def test_discretized_likelihoods_sum_to_one():
    levels = torch.arange(256) / 127.5 - 1
    total = discretized_log_likelihood(levels, torch.tensor(0.2), torch.tensor(math.log(0.3))).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-4)


def test_total_is_mse_plus_bound_without_a_weight():
    target = objective()
    noisy = noisy_at(target)
    loss = target.loss(normal(3, (5, 8, 6, 6)), noisy)
    assert list(loss.terms) == ["mse", "vb"]
    torch.testing.assert_close(loss.total, loss.terms["mse"] + loss.terms["vb"])


def test_bound_trains_the_variance_only():
    target = objective()
    noisy = noisy_at(target)
    output = normal(3, (5, 8, 6, 6)).requires_grad_()
    (bound,) = torch.autograd.grad(target.loss(output, noisy).terms["vb"].sum(), output)
    assert bound[:, :4].abs().max() == 0
    assert (bound[:, 4:].flatten(1).abs().sum(1) > 0).all()
    output = output.detach().requires_grad_()
    (error,) = torch.autograd.grad(target.loss(output, noisy).terms["mse"].sum(), output)
    assert error[:, 4:].abs().max() == 0
    expected = 2 * (output[:, :4].detach() - noisy.target) / noisy.target[0].numel()
    torch.testing.assert_close(error[:, :4], expected)


def test_a_perfect_model_at_the_lower_variance_has_no_divergence():
    target = objective()
    noisy = noisy_at(target)
    output = torch.cat([noisy.target, torch.full_like(noisy.target, -1.0)], dim=1)
    terms = target.loss(output, noisy).terms
    assert terms["mse"].abs().max() == 0
    assert terms["vb"][1:].abs().max() < 1e-4


def test_fixed_variance_has_the_error_only():
    target = objective(learn_sigma=False)
    noisy = noisy_at(target)
    loss = target.loss(torch.zeros(5, 4, 6, 6), noisy)
    assert list(loss.terms) == ["mse"]
    torch.testing.assert_close(loss.total, noisy.target.square().flatten(1).mean(1))


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_weighs_the_error_and_not_the_bound(kind):
    plain, weighted = objective(prediction=kind), objective(prediction=kind, weighting="min_snr", min_snr_gamma=5.0)
    noisy, output = noisy_at(plain), normal(3, (5, 8, 6, 6))
    before, after = plain.loss(output, noisy), weighted.loss(output, noisy)
    bar = Reference().bar
    snr = [bar[t] / (1 - bar[t]) for t in STEPS]
    weights = [min(value, 5.0) / (value if kind == "eps" else value + 1) for value in snr]
    torch.testing.assert_close(after.terms["mse"], before.terms["mse"] * torch.tensor(weights), rtol=1e-4, atol=1e-7)
    assert torch.equal(after.terms["vb"], before.terms["vb"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loss_is_float32_whatever_the_model_returns(dtype):
    target = objective()
    noisy = noisy_at(target)
    output = normal(3, (5, 8, 6, 6)).to(torch.bfloat16)
    loss = target.loss(output.to(dtype), noisy)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, target.loss(output.float(), noisy).total)


@pytest.mark.parametrize("shape", [(5, 4, 6, 6), (5, 8, 6, 5), (4, 8, 6, 6)])
def test_an_output_of_another_shape_is_refused(shape):
    target = objective()
    with pytest.raises(ValueError, match="model output"):
        target.loss(torch.zeros(shape), noisy_at(target))


def test_tables_are_float64_and_end_where_they_should():
    schedule = NoiseSchedule(1000)
    assert schedule.table("sqrt_bar").dtype == torch.float64
    assert schedule.table("sqrt_bar")[-1].item() == pytest.approx(math.sqrt(Reference().bar[-1]), rel=1e-12)
    assert schedule.table("posterior_log_variance")[0] == schedule.table("posterior_log_variance")[1]
    assert schedule_betas("linear", 1000)[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2], rel=1e-12)


def test_scaled_linear_is_stable_diffusions_schedule():
    betas = schedule_betas("scaled_linear", 1000)
    theirs = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # ldm, make_beta_schedule
    torch.testing.assert_close(betas, theirs, rtol=1e-12, atol=0)
    target = objective(beta_schedule="scaled_linear")
    bar = torch.cumprod(1 - theirs, 0)
    torch.testing.assert_close(target.schedule.table("sqrt_bar"), bar.sqrt(), rtol=1e-12, atol=0)
    shorter = torch.cumprod(1 - schedule_betas("scaled_linear", 250), 0)
    assert shorter[-1] == pytest.approx(float(bar[-1]), rel=0.1)
    with pytest.raises(UserError, match=r"objective\.diffusion_steps: 12 .*scaled_linear.*13 or more"):
        objective(beta_schedule="scaled_linear", diffusion_steps=12)


def test_a_schedule_too_short_is_refused():
    with pytest.raises(UserError, match=r"objective\.diffusion_steps: 20 .*21 or more"):
        objective(diffusion_steps=20)
    objective(diffusion_steps=21)
