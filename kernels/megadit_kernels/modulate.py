"""Adaptive LayerNorm and the gated residual of a DiT block, per-sample shift, scale and gate over tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """``LN(x) * (1 + scale) + shift`` written plainly; see ``layer_norm_modulate``."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without affine, then the sample's own scale and shift.

    x (B, T, n), shift and scale (B, n) -> (B, T, n).
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1))


def gated_residual_reference(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """``x + gate * branch`` written plainly; see ``gated_residual``."""
    return x + gate.unsqueeze(1) * branch


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Add a branch through the sample's gate: x and branch (B, T, n), gate (B, n) -> (B, T, n)."""
    return torch.addcmul(x, gate.unsqueeze(1), branch)
