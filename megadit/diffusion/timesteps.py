"""How times are drawn, shifted and binned. Times are positions on the noise schedule: 0 clean, 1 pure noise."""

from __future__ import annotations

import torch
from torch import Tensor

from megadit.rng import batch_normal, batch_uniform

MODEL_TIME = 1000.0  # models see times in [0, 1000], whatever the objective


def uniform_times(keys: Tensor) -> Tensor:
    """Uniform times: keys (B,) -> float32 (B,) in (0, 1]."""
    return batch_uniform(keys)


def logit_normal_times(keys: Tensor, mean: float, std: float) -> Tensor:
    """sigmoid(mean + std * n) with n standard normal: keys (B,) -> float32 (B,) (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * batch_normal(keys, ()))


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Resolution shift s t / (1 + (s - 1) t), which spends more time on noise for s > 1 (Esser et al. 2024, eq. 23)."""
    return shift * times / (1.0 + (shift - 1.0) * times)


def discrete_steps(times: Tensor, count: int) -> Tensor:
    """Indices of a schedule of ``count`` equal bins: (B,) in [0, 1] -> int64 (B,) in [0, count - 1]."""
    return (times.double() * count).floor().long().clamp_(0, count - 1)
