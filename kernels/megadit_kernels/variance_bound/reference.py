"""One term of the variational bound of a diffusion model that learns its variance, in plain torch.

Nichol & Dhariwal 2021, equation 15; Ho et al. 2020, equations 5 to 7 and 13.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What the columns of ``coefficients`` hold: log variances of the posterior and of beta, the weights of x0 and of x in
# the posterior's mean, signal and noise of x, and 1 at the schedule's first step, 0 elsewhere.
COLUMNS = ("posterior_log_variance", "log_beta", "posterior_from_x0", "posterior_from_x", "signal", "sigma", "first")


def variance_bound(
    variance: Tensor, prediction: Tensor, x0: Tensor, x: Tensor, coefficients: Tensor, predicts: str
) -> Tensor:
    """The bound's term per sample in bits per dimension: float32 (B,), computed in float32.

    variance, prediction (B, ...) of any float dtype: the two halves of a model's output; x0, x float32 of their shape;
    coefficients float32 (B, 7), see ``COLUMNS``; predicts: ``noise`` or ``v``.

    KL between the posterior q(x_{t-1} | x_t, x0) and the model's Gaussian; at the first step the negative log
    likelihood of 8-bit data. The log variance lies between the posterior's and beta's: f log beta + (1 - f) log
    posterior with f = (variance + 1) / 2, not clipped. Only the variance has a gradient.
    """
    each = (-1, *[1] * (x.dim() - 1))
    low, high, from_x0, from_x, signal, sigma, first = coefficients.unbind(dim=1)
    low, high, from_x0, from_x, signal, sigma = (
        column.reshape(each) for column in (low, high, from_x0, from_x, signal, sigma)
    )
    share = (variance.float() + 1.0) / 2.0
    log_variance = share * high + (1.0 - share) * low
    given = prediction.detach().float()
    denoised = (x - sigma * given) / signal if predicts == "noise" else signal * x - sigma * given
    true_mean = from_x0 * x0 + from_x * x
    mean = from_x0 * denoised + from_x * x
    bound = gaussian_kl(true_mean, low, mean, log_variance).flatten(1).mean(dim=1)
    is_first = first > 0
    # Few batches have a first step. On a GPU the test would synchronize; on a CPU it saves half of the work.
    if not is_first.is_cpu or bool(is_first.any()):
        likelihood = discretized_log_likelihood(x0, mean, log_variance / 2.0).flatten(1).mean(dim=1)
        bound = torch.where(is_first, -likelihood, bound)
    return bound / math.log(2.0)


def gaussian_kl(mean_p: Tensor, log_variance_p: Tensor, mean_q: Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(p || q) of two diagonal Gaussians per element, in nats; shapes broadcast."""
    ratio = log_variance_q - log_variance_p
    distance = (mean_p - mean_q).square() * torch.exp(-log_variance_q)
    return 0.5 * (ratio - 1.0 + torch.exp(-ratio) + distance)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability, in nats, of 8-bit data scaled to [-1, 1] under a Gaussian per element (Ho et al. 2020, eq. 13).

    Bins are 2/255 wide, the first and the last are open. Uses the tanh approximation of the normal CDF, as DiT does.
    """
    inverse = torch.exp(-log_std)
    upper = _normal_cdf((x - mean + 1.0 / 255.0) * inverse)
    lower = _normal_cdf((x - mean - 1.0 / 255.0) * inverse)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
