"""DDPM on a schedule of betas, with the learned range variance of improved DDPM (Nichol & Dhariwal 2021).

As in the DiT code: loss = mse + vb, both means over C, H, W, vb in bits, added without a weight. ``prediction: v``
changes the target of the mse to v (Salimans & Ho 2022), and not the vb term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.config.schema.run import ObjectiveConfig
from megadit.diffusion.objectives.objective import (
    MODEL_TIME,
    LossTerms,
    NoiseLevel,
    NoisyBatch,
    Objective,
    check_channels,
)
from megadit.errors import UserError
from megadit.rng import batch_uniform
from megadit_kernels import squared_error, variance_bound
from megadit_kernels.variance_bound.reference import COLUMNS

# First and last beta of 1000 steps. linear: of DDPM and DiT; scaled_linear, evenly spaced in the square root: of the
# latents of Stable Diffusion and U-ViT.
BETA_ENDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"linear": (1e-4, 2e-2), "scaled_linear": (0.00085, 0.012)}
)
BETA_STEPS = 1000


def beta_ends(schedule: str, steps: int) -> tuple[float, float]:
    """First and last beta of ``objective.beta_schedule`` for a number of steps.

    Those of 1000 steps times 1000 / steps, so that alpha-bar agrees. Raises UserError where the last one is not below
    1: at 20 steps and fewer (linear), or 12 and fewer (scaled_linear).
    """
    first, last = BETA_ENDS[schedule]
    scale = BETA_STEPS / steps
    if scale * last >= 1.0:
        fewest = int(BETA_STEPS * last) + 1
        raise UserError(
            f"objective.diffusion_steps: {steps} is too short for the {schedule} schedule; use {fewest} or more"
        )
    return scale * first, scale * last


def schedule_betas(schedule: str, steps: int) -> Tensor:
    """Betas of ``objective.beta_schedule``, float64 (steps,). Raises UserError as ``beta_ends`` does."""
    first, last = beta_ends(schedule, steps)
    if schedule == "linear":
        return torch.linspace(first, last, steps, dtype=torch.float64)
    return torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64).square()


class NoiseSchedule:
    """Tables of the forward process, computed in float64, used in float32 (Ho et al. 2020, eqs. 4 to 7)."""

    def __init__(self, steps: int, schedule: str = "linear") -> None:
        betas = schedule_betas(schedule, steps)
        alphas = 1.0 - betas
        bar = torch.cumprod(alphas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        variance = betas * (1.0 - previous) / (1.0 - bar)
        self.steps = steps
        self._tables = {
            "log_beta": betas.log(),
            "sqrt_bar": bar.sqrt(),
            "sqrt_one_minus_bar": (1.0 - bar).sqrt(),
            "snr": bar / (1.0 - bar),
            # The posterior's variance is 0 at step 0: its log is clipped to that of step 1.
            "posterior_log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
            "posterior_from_x0": betas * previous.sqrt() / (1.0 - bar),
            "posterior_from_x": (1.0 - previous) * alphas.sqrt() / (1.0 - bar),
        }
        self._tables["bound"] = self._bound_table()
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def _bound_table(self) -> Tensor:
        """What the variational bound needs of each step, float64 (steps, 7)."""
        values = {
            **self._tables,
            "signal": self._tables["sqrt_bar"],
            "sigma": self._tables["sqrt_one_minus_bar"],
            "first": (torch.arange(self.steps) == 0).double(),
        }
        return torch.stack([values[name] for name in COLUMNS], dim=1)

    def table(self, name: str) -> Tensor:
        """A table, float64 (steps,) on the CPU."""
        return self._tables[name]

    def at(self, name: str, steps: Tensor) -> Tensor:
        """A table at ``steps`` (B,), float32 (B,) on the device of ``steps``; of ``bound`` (B, 7)."""
        key = (name, steps.device)
        if key not in self._copies:
            self._copies[key] = self._tables[name].float().to(steps.device)
        return self._copies[key][steps]


class DDPMObjective(Objective):
    """Predict eps or v at a uniform step; with ``learn_sigma`` the second half of the output is the variance."""

    def __init__(self, config: ObjectiveConfig, *, learn_sigma: bool, null: Conditioning | None) -> None:
        super().__init__(null=null, label_dropout=config.label_dropout)
        self.config = config
        self.learn_sigma = learn_sigma
        self.target = "noise" if config.prediction == "eps" else "v"
        self.schedule = NoiseSchedule(config.diffusion_steps, config.beta_schedule)

    def draw_times(self, keys: Tensor) -> Tensor:
        """Uniform over the schedule: int64 (B,) -> float32 (B,)."""
        return batch_uniform(keys)

    def level(self, t01: Tensor) -> NoiseLevel:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise; the model's time is 1000 t / T, so t at 1000 steps."""
        steps = discrete_steps(t01, self.schedule.steps)
        signal, sigma = self.schedule.at("sqrt_bar", steps), self.schedule.at("sqrt_one_minus_bar", steps)
        time01 = steps.float() / self.schedule.steps
        t = steps.float() * (MODEL_TIME / self.schedule.steps)
        return NoiseLevel(signal, sigma, t, time01, steps)

    def loss(self, output: Tensor, noisy: NoisyBatch) -> LossTerms:
        """``mse`` (weighted if asked) plus, with a learned variance, ``vb``. Raises ValueError on a wrong shape."""
        check_channels(output, noisy, 2 if self.learn_sigma else 1)
        assert noisy.steps is not None
        prediction, *variance = output.split(noisy.x.shape[1], dim=1)
        weight = None
        if self.config.weighting == "min_snr":
            snr = self.schedule.at("snr", noisy.steps)
            weight = min_snr_weight(snr, self.config.min_snr_gamma, self.config.prediction)
        terms = {"mse": squared_error(prediction, noisy.target, weight)}
        if variance:
            # It trains the variance only, the mean is left to the mse.
            terms["vb"] = self._bound(prediction, variance[0], noisy)
        return LossTerms(total=torch.stack(list(terms.values())).sum(dim=0), terms=terms)

    def _bound(self, prediction: Tensor, variance: Tensor, noisy: NoisyBatch) -> Tensor:
        """One term of the variational bound per sample, in bits per dimension, (B,)."""
        assert noisy.steps is not None
        coefficients = self.schedule.at("bound", noisy.steps)
        return variance_bound(variance, prediction, noisy.x0, noisy.x, coefficients, self.target)


def discrete_steps(times: Tensor, count: int) -> Tensor:
    """Indices of a schedule of ``count`` equal bins: (B,) in [0, 1] -> int64 (B,) in [0, count - 1]."""
    return (times.double() * count).floor().long().clamp_(0, count - 1)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Min-SNR-gamma weight of a squared error (Hang et al. 2023, section 3.4), any shape.

    The paper weights the error of x0 by min(SNR, gamma). An error of eps is SNR times, one of v is SNR + 1 times
    that of x0, which gives min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1).
    """
    capped = torch.clamp(snr, max=gamma)
    return capped / (snr if prediction == "eps" else snr + 1.0)
