"""Flow matching on straight paths (Liu et al. 2022): x_t = (1 - t) x0 + t noise, predict noise - x0."""

from __future__ import annotations

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
from megadit.rng import batch_normal, batch_uniform
from megadit_kernels import squared_error


class FlowObjective(Objective):
    """Predict the velocity noise - x0 at a uniform or logit-normal time, shifted for the resolution.

    Raises UserError where ``learn_sigma`` is True, since a velocity has no variance.
    """

    target = "velocity"

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

    def level(self, t01: Tensor) -> NoiseLevel:
        """The point at time t on the line from x0 to noise; the model's time is 1000 t."""
        return NoiseLevel(signal=1.0 - t01, sigma=t01, t=t01 * MODEL_TIME, time01=t01)

    def loss(self, output: Tensor, noisy: NoisyBatch) -> LossTerms:
        """``mse`` of the velocity. Raises ValueError on a wrong shape."""
        check_channels(output, noisy, 1)
        mse = squared_error(output, noisy.target)
        return LossTerms(total=mse, terms={"mse": mse})


def logit_normal_times(keys: Tensor, mean: float, std: float) -> Tensor:
    """sigmoid(mean + std * n) with n standard normal: keys (B,) -> float32 (B,) (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * batch_normal(keys, ()))


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Resolution shift s t / (1 + (s - 1) t), towards noise for s > 1 (Esser et al. 2024, eq. 23)."""
    return shift * times / (1.0 + (shift - 1.0) * times)
