"""A convolution from image to image, which no dimension of grows with the model's width."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim, ParamSpec


class MuConv(nn.Module):
    """k x k convolution (B, C, H, W) -> (B, C, H, W) with zero padding: weight (C, C, k, k), bias (C,), k odd.

    Finite under muP: nothing of it changes with width. It starts as the patch embedding does, and is not decayed by
    default: it acts on the prediction itself (arXiv 2209.12152, section 3.1).
    """

    def __init__(self, channels: int, kernel: int, param: Parametrization) -> None:
        super().__init__()
        dims = (Dim(channels), Dim(channels), Dim(kernel), Dim(kernel))
        self.param_specs: dict[str, ParamSpec] = {
            "weight": dataclasses.replace(param.spec(dims, "patch"), decay=False, wd_mult=0.0),
            "bias": param.spec((Dim(channels),), "patch_bias", drawn_fan_in=channels * kernel * kernel),
        }
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        mult = self.param_specs["weight"].forward_mult
        padding = self.weight.shape[-1] // 2
        return F.conv2d(x if mult == 1.0 else x * mult, self.weight, self.bias, padding=padding)
