"""Flow matching on straight paths (Liu et al. 2022): x_t = (1 - t) x0 + t noise, predict noise - x0."""

from __future__ import annotations

from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.config.schema.run import ObjectiveConfig
from megadit.diffusion.objective import LossTerms, NoisyBatch, Objective, check_channels, sample_mean
from megadit.diffusion.timesteps import MODEL_TIME, logit_normal_times, shift_times, uniform_times
from megadit.errors import UserError


class FlowObjective(Objective):
    """Predict the velocity noise - x0 at a uniform or logit-normal time, shifted for the resolution.

    Raises UserError if the model learns a variance, which a velocity has no use for.
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
            times = uniform_times(keys)
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
