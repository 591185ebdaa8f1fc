"""Convolutions: patches to tokens, and the k x k smoothing of a predicted image."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim, ParamSpec
from megadit_kernels import scaled_linear


class MuPatchProjection(nn.Module):
    """Non-overlapping p x p patches to tokens: a strided convolution, computed as one GEMM.

    Weight (n, C, p, p) as in a convolution, bias (n,). An input layer of fan-in C p^2.
    """

    def __init__(self, channels: int, out_dim: Dim, patch: int, param: Parametrization) -> None:
        super().__init__()
        self.patch = patch
        dims = (out_dim, Dim(channels), Dim(patch), Dim(patch))
        self.param_specs: dict[str, ParamSpec] = {
            "weight": param.spec(dims, "patch"),
            "bias": param.spec((out_dim,), "patch_bias", drawn_fan_in=channels * patch * patch),
        }
        self.weight = nn.Parameter(torch.empty(out_dim.size, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(out_dim.size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, n), tokens row-major."""
        b, c, h, w = x.shape
        p = self.patch
        patches = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(b, (h // p) * (w // p), c * p * p)
        return scaled_linear(patches, self.weight.flatten(1), self.bias, self.param_specs["weight"].forward_mult)


class MuConv(nn.Module):
    """k x k convolution (B, C, H, W) -> (B, C, H, W) with zero padding: weight (C, C, k, k), bias (C,), k odd.

    Finite under muP: none of its dimensions grows with width. It is initialised as the patch embedding, without
    weight decay by default, since it acts on the prediction itself (arXiv 2209.12152, section 3.1).
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
