"""Flow matching on straight paths (Liu et al. 2022): x_t = (1 - t) x0 + t noise, predict noise - x0."""

from __future__ import annotations

import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.config.schema.run import ObjectiveConfig
from megadit.diffusion.objectives.objective import (
    MODEL_TIME,
    LossTerms,
    NoisyBatch,
    Objective,
    check_channels,
    sample_mean,
)
from megadit.errors import UserError
from megadit.rng import batch_normal, batch_uniform


class FlowObjective(Objective):
    """Predict the velocity noise - x0 at a uniform or logit-normal time, shifted for the resolution.

    Raises UserError where ``learn_sigma`` is True, since a velocity has no variance.
    """

    def __init__(self, config: ObjectiveConfig, *, learn_sigma: bool, null: Conditioning | None) -> None:
        if learn_sigma:
            raise UserError(
                "model.learn_sigma: true does not go with objective.kind flow, which predicts a velocity "
                "without a variance; set model.learn_sigma=false"
            )
        super().__init__(null=null, label_dropout=config.label_dropout)
        self.config = config

    def draw_times(self, keys: Tensor) -> Tensor:
        """Times after the resolution shift: int64 (B,) -> float32 (B,)."""
        if self.config.time_sampling == "logit_normal":
            times = logit_normal_times(keys, self.config.logit_mean, self.config.logit_std)
        else:
            times = batch_uniform(keys)
        return shift_times(times, self.config.shift)

    def mix(self, x0: Tensor, noise: Tensor, t01: Tensor, cond: Conditioning) -> NoisyBatch:
        """The point at time t on the line from x0 to noise; the model's time is 1000 t."""
        t = t01.reshape(-1, *[1] * (x0.dim() - 1))
        x = (1.0 - t) * x0 + t * noise
        return NoisyBatch(x=x, t=t01 * MODEL_TIME, cond=cond, x0=x0, noise=noise, time01=t01)

    def loss(self, output: Tensor, noisy: NoisyBatch) -> LossTerms:
        """``mse`` of the velocity. Raises ValueError on a wrong shape."""
        check_channels(output, noisy, 1)
        mse = sample_mean((output.float() - (noisy.noise - noisy.x0)).square())
        return LossTerms(total=mse, terms={"mse": mse})


def logit_normal_times(keys: Tensor, mean: float, std: float) -> Tensor:
    """sigmoid(mean + std * n) with n standard normal: keys (B,) -> float32 (B,) (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * batch_normal(keys, ()))


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Resolution shift s t / (1 + (s - 1) t), towards noise for s > 1 (Esser et al. 2024, eq. 23)."""
    return shift * times / (1.0 + (shift - 1.0) * times)
