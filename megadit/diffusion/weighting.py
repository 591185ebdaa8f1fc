"""Weights of the mean squared error over noise levels."""

from __future__ import annotations

import torch
from torch import Tensor


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Min-SNR-gamma weight of a squared error (Hang et al. 2023, section 3.4), any shape.

    The paper weights the error of x0 by min(SNR, gamma). An error of eps is SNR times, one of v is SNR + 1 times
    that of x0, which gives min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1).
    """
    capped = torch.clamp(snr, max=gamma)
    return capped / (snr if prediction == "eps" else snr + 1.0)
