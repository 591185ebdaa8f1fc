"""Fused operations, each with a torch reference of the same signature. Imports nothing of megadit."""

from megadit_kernels.linear import for_autocast, scaled_linear, scaled_linear_reference
from megadit_kernels.modulate import (
    gated_residual,
    gated_residual_reference,
    layer_norm_modulate,
    layer_norm_modulate_reference,
)

__all__ = [
    "for_autocast",
    "gated_residual",
    "gated_residual_reference",
    "layer_norm_modulate",
    "layer_norm_modulate_reference",
    "scaled_linear",
    "scaled_linear_reference",
]
