"""Adaptive LayerNorm and the gated residual of a DiT block, per-sample shift, scale and gate over tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit_kernels.registry import Op


@Op
def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without affine, then the sample's own scale and shift: ``LN(x) * (1 + scale) + shift``.

    x (B, T, n), shift and scale (B, n) -> (B, T, n).
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


@layer_norm_modulate.implementation("torch", device=None, works=lambda: True)
def _layer_norm_addcmul(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1))


@Op
def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """``x + gate * branch``, the gate of the sample: x and branch (B, T, n), gate (B, n) -> (B, T, n)."""
    return x + gate.unsqueeze(1) * branch


@gated_residual.implementation("torch", device=None, works=lambda: True)
def _gated_addcmul(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return torch.addcmul(x, gate.unsqueeze(1), branch)
