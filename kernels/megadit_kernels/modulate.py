"""Adaptive LayerNorm and gated residual of a DiT block: shift, scale and gate per sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit_kernels.registry import Op


@Op
def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """``LN(x) * (1 + scale) + shift``: LayerNorm without affine, then scale and shift per sample.

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
    """``x + gate * branch``: x and branch (B, T, n), gate (B, n) -> (B, T, n)."""
    return x + gate.unsqueeze(1) * branch


@gated_residual.implementation("torch", device=None, works=lambda: True)
def _gated_addcmul(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return torch.addcmul(x, gate.unsqueeze(1), branch)
